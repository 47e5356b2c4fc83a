"""Checks of /dev/shm: size, free space and type; and of the host memory that NCCL may use instead."""

import ctypes
import os
import re
from dataclasses import dataclass

from doctor import fixes
from doctor.check import CheckResult, Reading, Repair, Status, error, ok, skip, symptoms, unknown, warn
from doctor.checks.categories import shm_check
from doctor.checks.preconditions import CGROUP_READABLE
from doctor.context import CheckContext
from doctor.fixes import Fix
from doctor.host import Host, format_bytes
from doctor.orphans import SHM, find_orphans
from rtp_llm.machine.cgroup import UNLIMITED
from rtp_llm.parallel import segment

MIB = 1 << 20
DOCKER_DEFAULT_BYTES = 64 * MIB
NCCL_MIN_BYTES, NCCL_RECOMMENDED_BYTES = 1 << 30, 2 << 30  # from the documentation of NCCL and of alibaba/rtp-llm
CUMEM_MIN_BYTES, CUMEM_RECOMMENDED_BYTES = 16 * MIB, 64 * MIB  # if NCCL allocates host memory through CUDA
GET_MEMPOLICY = {"x86_64": 239, "aarch64": 236}  # numbers of the system call


@dataclass(frozen=True)
class ShmRequirement:
    """The bytes of /dev/shm that the ranks of this part need. With less than `minimum` the server does not start; with
    less than `recommended` it may fail.

    `reason`: text for the report that says what needs the memory, or why nothing does.
    """

    minimum: int
    recommended: int
    reason: str


def shm_requirement(ctx: CheckContext) -> ShmRequirement:
    """Returns the required size of /dev/shm. It is 0 if nothing uses it, for example with a single rank.

    For CPU ranks of one machine it is the size of the file through which they exchange tensors. For GPU ranks it is the
    size of NCCL's files, which are small if uses_cumem_host().
    """
    ranks = ctx.local_ranks
    if ranks == 1 and not (ctx.is_multi_part and ctx.on_gpu):
        return ShmRequirement(0, 0, "a single rank needs no shared memory")
    if not ctx.on_gpu:
        if not segment.is_supported() or ctx.is_multi_part:
            return ShmRequirement(0, 0, "gloo needs no shared memory")
        size = -(-segment.segment_bytes(ranks) // MIB) * MIB
        return ShmRequirement(size, size, f"the shared memory of {ranks} ranks")
    if uses_cumem_host(ctx):
        reason = "NCCL allocates its host memory through CUDA here, and uses little of it"
        return ShmRequirement(CUMEM_MIN_BYTES, CUMEM_RECOMMENDED_BYTES, reason)
    return ShmRequirement(NCCL_MIN_BYTES, NCCL_RECOMMENDED_BYTES, f"NCCL between {ranks} ranks")


def uses_cumem_host(ctx: CheckContext) -> bool:
    """Returns whether NCCL allocates host memory through the CUDA driver, and so needs little of /dev/shm.

    NCCL 2.24 and later does so with CUDA 12.6 and later if NUMA system calls are permitted (NCCL documentation,
    troubleshooting; src/misc/cudawrap.cc). NCCL_CUMEM_HOST_ENABLE=0 or 1 overrides this.
    """
    setting = ctx.nccl.value("NCCL_CUMEM_HOST_ENABLE")
    if setting in ("0", "1"):
        return setting == "1"
    return ctx.nccl.version >= (2, 24) and ctx.gpus.cuda >= (12, 6) and bool(numa_allowed(ctx.host))


def numa_allowed(host: Host) -> bool | None:
    """Returns whether this process may call get_mempolicy(2), as an example of the NUMA system calls. Docker's default
    seccomp profile denies them. Returns None if the call's number is not known on `host`'s CPU architecture.
    """
    number = GET_MEMPOLICY.get(host.machine)
    if number is None:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(number, 0, 0, 0, 0, 0) == 0)


def _larger(num_bytes: int) -> Fix:
    return fixes.shm_size(max(2, -(-2 * num_bytes // (1 << 30))))


@shm_check("S-03", "/dev/shm is a writable tmpfs")
@symptoms(
    "failed to create shared memory file /dev/shm/nccl-…, error Permission denied (13)",
    "Read-only file system: '/dev/shm/…'",
)
def shm_is_tmpfs(ctx: CheckContext) -> CheckResult:
    """Processes of one machine share memory through files in /dev/shm. On another file system these would be written to
    disk; on a read-only one, or without permission, they cannot be created."""
    mount = ctx.host.mount(SHM)
    if mount is None or not ctx.host.exists(SHM):
        return error("/dev/shm does not exist", "a tmpfs", fixes.SHM_MOUNT)
    if mount.fstype not in ("tmpfs", "ramfs"):
        verb = "is" if mount.point == SHM else "lies on"
        return error(f"/dev/shm {verb} {mount.fstype}", "a tmpfs", fixes.SHM_MOUNT)
    if mount.read_only:
        return error("/dev/shm is mounted read-only", "writable", fixes.SHM_MOUNT)
    if not os.access(ctx.host.path(SHM), os.W_OK | os.X_OK):
        return error(f"uid {ctx.host.uid} cannot write to /dev/shm", "writable", fixes.SHM_MOUNT)
    return ok("/dev/shm is a tmpfs")


@shm_check("S-02", "no orphaned files fill /dev/shm", needs=("S-03",), repair=Repair.RESTART)
@symptoms("No space left on device: '/dev/shm/…'")
def no_orphaned_files(ctx: CheckContext) -> CheckResult:
    """A killed process leaves its files in /dev/shm, and in Kubernetes an emptyDir there outlives the container: after
    some restarts it is full, and every start fails. This server unlinks its own files there as soon as all ranks
    have opened them; NCCL and others do not."""
    scan = find_orphans(ctx.host)
    if not scan.files:
        unreadable = f"; {scan.unreadable} processes cannot be inspected" if scan.unreadable and scan.candidates else ""
        return ok(f"no orphaned file{unreadable}")
    space = ctx.host.space(SHM)
    names = ", ".join(f.name for f in scan.files[:3]) + (" …" if len(scan.files) > 3 else "")
    actual = f"{len(scan.files)} files that no process uses hold {format_bytes(scan.bytes)}: {names}"
    make_result = error if space.size >= shm_requirement(ctx).minimum > space.free else warn
    fix = fixes.orphaned_files(sum(f.ours for f in scan.files))
    return make_result(actual, "no orphaned files", fix, bytes=scan.bytes)


@shm_check("S-01", "/dev/shm is large enough", needs=("S-02", "S-03"))
@symptoms(
    "Caught signal 7 (Bus error: nonexistent physical address)",
    "Bus error (core dumped)",
    "Fatal Python error: Bus error",
    "exit code 135",
    "exitcode: -7",
    "failed to extend /dev/shm/nccl-… to … bytes",
    "Error while creating shared memory segment /dev/shm/nccl-…",
    "Call to posix_fallocate failed",
    "unhandled system error (run with NCCL_DEBUG=INFO for details)",
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed",
    "cannot reserve … MiB: No space left on device; enlarge /dev/shm",
)
def shm_is_large_enough(ctx: CheckContext) -> CheckResult:
    """Docker gives a container 64 MiB of shared memory. NCCL needs about 1 GiB between the GPUs of one machine, and a
    process that writes beyond the limit is killed by SIGBUS. The required size depends on the number of ranks, and on
    whether NCCL allocates its host memory through CUDA."""
    space = ctx.host.space(SHM)
    if ctx.running:
        free = f"{format_bytes(space.free)} of {format_bytes(space.size)} free"
        return ok(f"{free}, while this part's server is running and uses some of it")
    requirement = shm_requirement(ctx)
    minimum, recommended = requirement.minimum, requirement.recommended
    actual = f"/dev/shm has {format_bytes(space.size)}"
    actual += ", Docker's default" if space.size == DOCKER_DEFAULT_BYTES else ""
    actual += f", {format_bytes(space.free)} of it free" if space.free < space.size else ""
    for bound, make_result in ((minimum, error), (recommended, warn)):
        if space.free < bound:
            expected = f"{format_bytes(bound)} for {requirement.reason}"
            return make_result(actual, expected, _larger(bound), free=space.free)
    if ctx.tier >= 1 and minimum:
        failure = _try_reserve(ctx.host, minimum)
        if failure:
            actual += f", but reserving {format_bytes(minimum)} fails: {failure}"
            return error(actual, "free space that can be reserved", _larger(minimum))
        actual += f"; {format_bytes(minimum)} were reserved and released"
    return ok(f"{actual}; {requirement.reason}" + (f": {format_bytes(minimum)}" if minimum else ""))


def _try_reserve(host: Host, num_bytes: int) -> str:
    """Reserves and releases bytes of /dev/shm. Returns the kernel's error message; empty if it succeeds."""
    path = host.path(f"{SHM}/rtp-llm-doctor-{os.getpid()}")
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.unlink(path)
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        return error.strerror or str(error)
    finally:
        os.close(fd)
    return ""


@shm_check("S-04", "shared memory survives a logout", severity=Status.WARN)
@symptoms("unlink shared memory /dev/shm/nccl-… failed, error: No such file or directory")
def logind_keeps_ipc(ctx: CheckContext) -> CheckResult:
    """With RemoveIPC=yes, its default, systemd-logind deletes the shared memory of a user who logs out of the host. A
    server that this user started from a shell loses its shared memory, unless the user is a system user (uid below
    1000)."""
    text = ctx.host.read("/etc/systemd/logind.conf")
    if text is None or not ctx.host.exists("/run/systemd/system"):
        return skip("systemd-logind does not run here")
    if ctx.host.uid < 1000:
        return ok(f"uid {ctx.host.uid} is a system user, whose shared memory logind keeps")
    values = re.findall(r"^\s*RemoveIPC\s*=\s*(\S+)", text, re.MULTILINE)
    if values and values[-1].lower() in ("no", "false", "0", "off"):
        return ok("RemoveIPC=no")
    fix = "RemoveIPC=no in /etc/systemd/logind.conf of the host"
    return warn("logind deletes shared memory at logout", "RemoveIPC=no", fix)


@shm_check("S-06", "NCCL can allocate its host memory")
@symptoms("cuMem host allocations do not appear to be working; falling back to a /dev/shm/ based implementation")
def nccl_can_allocate_host_memory(ctx: CheckContext) -> CheckResult:
    """NCCL 2.24 and later allocates host memory through the CUDA driver, with NUMA system calls that Docker forbids.
    NCCL 2.26.5 and later detects this and falls back to /dev/shm; 2.24 to 2.26.4 fail or hang."""
    version = ctx.nccl.version
    if not ctx.on_gpu or not version:
        return skip("no GPU" if not ctx.on_gpu else "NCCL is not installed")
    if version < (2, 24) or ctx.gpus.cuda < (12, 6) or ctx.nccl.value("NCCL_CUMEM_HOST_ENABLE") == "0":
        return ok("NCCL uses /dev/shm here")
    allowed = numa_allowed(ctx.host)
    if allowed is None:
        return unknown(f"whether NUMA system calls are allowed is not known on {ctx.host.machine}")
    if allowed:
        return ok("NUMA system calls are allowed")
    make_result = error if version < (2, 26, 5) else warn
    actual = f"NUMA system calls are denied, NCCL {ctx.nccl.version_text}"
    return make_result(actual, "permission for NUMA system calls", fixes.CUMEM_HOST)


@shm_check(
    "S-07", "the container's memory limit also covers /dev/shm", severity=Status.WARN, preconditions=(CGROUP_READABLE,)
)
def shm_within_memory_limit(ctx: CheckContext) -> CheckResult | Reading:
    """Pages of a tmpfs count against the container's memory limit. If the limit is just enough for the processes, they
    are OOM-killed when /dev/shm fills."""
    limit, shm_bytes = ctx.host.cgroup.memory_max, shm_requirement(ctx).recommended
    if limit is None or limit >= UNLIMITED:
        return ok("the container has no memory limit")
    return Reading(
        limit,
        f"the memory limit is {format_bytes(limit)}, of which /dev/shm may take {format_bytes(shm_bytes)}",
        format_bytes(limit + shm_bytes),
        fixes.memory_limit(limit + shm_bytes),
        recommended=4 * shm_bytes,
    )
