"""/dev/shm: large enough, free enough, of the right kind; and what NCCL would use instead of it."""

import ctypes
import os
import re
from dataclasses import dataclass

from doctor.check import CheckResult, Fix, Repair, Status, check, error, ok, skip, unknown, warn
from doctor.context import CheckContext
from doctor.host import Host, format_bytes
from doctor.orphans import SHM, find_orphans
from rtp_llm.parallel import segment

CATEGORY = "shared memory"
DOCKER_DEFAULT = 64 << 20
NCCL_MIN_BYTES, NCCL_RECOMMENDED_BYTES = 1 << 30, 2 << 30  # NCCL's documentation; alibaba/rtp-llm's
MIB = 1 << 20
GET_MEMPOLICY = {"x86_64": 239, "aarch64": 236}


@dataclass(frozen=True)
class ShmRequirement:
    """Bytes of /dev/shm: without `least` the start fails, with less than `good` it may."""

    minimum: int
    recommended: int
    why: str


def shm_requirement(ctx: CheckContext) -> ShmRequirement:
    """What this plan takes: on CPU the ranks' own segment, on GPUs NCCL's, unless it uses other memory."""
    ranks = ctx.local_ranks
    if ranks == 1 and not (ctx.plan and ctx.plan.is_multi_part and ctx.on_gpu):
        return ShmRequirement(0, 0, "a single rank needs none")
    if not ctx.on_gpu:
        if not segment.is_supported() or (ctx.plan and ctx.plan.is_multi_part):
            return ShmRequirement(0, 0, "gloo needs none")
        size = -(-segment.segment_bytes(ranks) // MIB) * MIB
        return ShmRequirement(size, size, f"the segment of {ranks} ranks")
    if cumem_host(ctx):
        return ShmRequirement(
            16 * MIB, 64 * MIB, "NCCL takes its host memory from the driver here, and uses little of it"
        )
    return ShmRequirement(NCCL_MIN_BYTES, NCCL_RECOMMENDED_BYTES, f"NCCL between {ranks} ranks")


def cumem_host(ctx: CheckContext) -> bool:
    """Whether NCCL allocates host memory through the CUDA driver: NCCL 2.24, driver 12.6, NUMA system calls allowed
    (NCCL documentation, troubleshooting; src/misc/cudawrap.cc)."""
    chosen = ctx.nccl.value("NCCL_CUMEM_HOST_ENABLE")
    if chosen in ("0", "1"):
        return chosen == "1"
    return ctx.nccl.version >= (2, 24) and ctx.gpus.cuda >= (12, 6) and bool(numa_allowed(ctx.host))


def numa_allowed(host: Host) -> bool | None:
    """Whether get_mempolicy(2) may be called; None where that cannot be told. Docker's seccomp profile denies it."""
    number = GET_MEMPOLICY.get(host.machine)
    if number is None:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(number, 0, 0, 0, 0, 0) == 0)


def _larger(size: int) -> Fix:
    whole = max(2, -(-2 * size // (1 << 30)))
    return Fix(
        host=f"mount -o remount,size={whole}G /dev/shm",
        docker=f"docker run --shm-size={whole}g …",
        compose=f"shm_size: {whole}gb",
        kubernetes=f"volumes: [{{name: shm, emptyDir: {{medium: Memory, sizeLimit: {whole}Gi}}}}], mounted at /dev/shm",
    )


@check(
    "S-03",
    CATEGORY,
    "/dev/shm is a writable tmpfs",
    symptoms=(
        "failed to create shared memory file /dev/shm/nccl-…, error Permission denied (13)",
        "Read-only file system: '/dev/shm/…'",
    ),
)
def shm_is_tmpfs(ctx: CheckContext) -> CheckResult:
    """Files in /dev/shm are how processes of one machine share memory. On another file system they would be written to
    disk; on a read-only one, or with the wrong owner, they cannot be made."""
    mount = ctx.host.mount(SHM)
    fix = Fix(
        host="mount -t tmpfs -o size=2G,mode=1777 tmpfs /dev/shm",
        docker="docker run --shm-size=2g …, and mount nothing else at /dev/shm",
        compose="shm_size: 2gb, and mount nothing else at /dev/shm",
        kubernetes="mount an emptyDir {medium: Memory, sizeLimit: 2Gi} at /dev/shm; its owner: securityContext.fsGroup",
    )
    if mount is None or not ctx.host.exists(SHM):
        return error("/dev/shm does not exist", "a tmpfs", fix)
    if mount.fstype not in ("tmpfs", "ramfs"):
        place = f"lies on {mount.fstype}" if mount.point != SHM else f"is {mount.fstype}"
        return error(f"/dev/shm {place}", "a tmpfs", fix)
    if mount.read_only:
        return error("/dev/shm is mounted read-only", "writable", fix)
    if not os.access(ctx.host.path(SHM), os.W_OK | os.X_OK):
        return error(f"uid {ctx.host.uid} may not write to /dev/shm", "writable", fix)
    return ok("/dev/shm is a tmpfs")


@check(
    "S-02",
    CATEGORY,
    "nothing abandoned fills /dev/shm",
    symptoms=("No space left on device: '/dev/shm/…'",),
    needs=("S-03",),
    severity=Status.ERROR,
    repair=Repair.RESTART,
)
def no_orphaned_segments(ctx: CheckContext) -> CheckResult:
    """A process that is killed leaves its files in /dev/shm, and in Kubernetes an emptyDir there outlives the
    container: after some restarts it is full, and no start succeeds again. This server unlinks its segments as soon as
    all ranks have opened them; NCCL and others do not."""
    found = find_orphans(ctx.host)
    if found.unreadable:
        seen = f"; {found.unreadable} processes cannot be looked into" if found.candidates else ""
    else:
        seen = ""
    if not found.files:
        return ok(f"no abandoned file{seen}")
    wanted = shm_requirement(ctx)
    space = ctx.host.space(SHM)
    names = ", ".join(f.name for f in found.files[:3]) + (" …" if len(found.files) > 3 else "")
    actual = f"{len(found.files)} files that nobody uses hold {format_bytes(found.bytes)}: {names}"
    ours = sum(f.ours for f in found.files)
    remove = f"rtp-llm-doctor --fix shm removes {ours} of them that are provably this server's; " if ours else ""
    fix = Fix(
        host=remove + "remove the files that you know",
        docker=remove + "recreate the container",
        compose=remove + "docker compose up --force-recreate",
        kubernetes=remove + "delete the pod: an emptyDir outlives its containers",
    )
    judge = error if space.size >= wanted.minimum > space.free else warn
    return judge(actual, "no abandoned files", fix, bytes=found.bytes)


@check(
    "S-01",
    CATEGORY,
    "/dev/shm is large enough",
    symptoms=(
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
    ),
    needs=("S-02", "S-03"),
)
def shm_is_large_enough(ctx: CheckContext) -> CheckResult:
    """Docker gives a container 64 MiB of shared memory. NCCL needs about 1 GiB between the GPUs of one machine, and a
    process that writes beyond the end dies of a bus error. How much this plan needs depends on the number of ranks
    and on whether NCCL takes its host memory from the driver."""
    wanted = shm_requirement(ctx)
    space = ctx.host.space(SHM)
    if ctx.running:
        return ok(f"{format_bytes(space.free)} of {format_bytes(space.size)} free; this part is running")
    default = ", Docker's default" if space.size == DOCKER_DEFAULT else ""
    actual = f"/dev/shm has {format_bytes(space.size)}{default}" + (
        f", {format_bytes(space.free)} of it free" if space.free < space.size else ""
    )
    if space.free < wanted.minimum:
        return error(
            actual, f"{format_bytes(wanted.minimum)} for {wanted.why}", _larger(wanted.minimum), free=space.free
        )
    if space.free < wanted.recommended:
        return warn(
            actual, f"{format_bytes(wanted.recommended)} for {wanted.why}", _larger(wanted.recommended), free=space.free
        )
    if ctx.tier >= 1 and wanted.minimum:
        refused = _reserve(ctx.host, wanted.minimum)
        if refused:
            return error(
                f"{actual}, but reserving {format_bytes(wanted.minimum)} fails: {refused}",
                "room",
                _larger(wanted.minimum),
            )
        actual += f"; {format_bytes(wanted.minimum)} were reserved and given back"
    return ok(f"{actual}; {wanted.why}" + (f": {format_bytes(wanted.minimum)}" if wanted.minimum else ""))


def _reserve(host: Host, count: int) -> str:
    """Reserves and removes `count` bytes; what the kernel answers where it cannot."""
    path = host.path(f"{SHM}/rtp-llm-doctor-{os.getpid()}")
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.unlink(path)
        os.posix_fallocate(fd, 0, count)
    except OSError as error:
        return error.strerror or str(error)
    finally:
        os.close(fd)
    return ""


@check(
    "S-04",
    CATEGORY,
    "segments outlive a log-out",
    severity=Status.WARN,
    symptoms=("unlink shared memory /dev/shm/nccl-… failed, error: No such file or directory",),
)
def logind_keeps_ipc(ctx: CheckContext) -> CheckResult:
    """systemd-logind with RemoveIPC=yes, its default, removes the shared memory of a user who logs out of the host.
    That takes it from under a server that was started from a shell of that user, unless the user is a system user."""
    text = ctx.host.read("/etc/systemd/logind.conf")
    if text is None or not ctx.host.exists("/run/systemd/system"):
        return skip("no logind here")
    if ctx.host.uid < 1000:
        return ok(f"uid {ctx.host.uid} is a system user, whose segments logind leaves alone")
    chosen = re.findall(r"^\s*RemoveIPC\s*=\s*(\S+)", text, re.MULTILINE)
    if chosen and chosen[-1].lower() in ("no", "false", "0", "off"):
        return ok("RemoveIPC=no")
    return warn(
        "logind removes segments at log-out", "RemoveIPC=no", "RemoveIPC=no in /etc/systemd/logind.conf of the host"
    )


@check(
    "S-06",
    CATEGORY,
    "NCCL may allocate host memory as it wants to",
    severity=Status.ERROR,
    symptoms=("cuMem host allocations do not appear to be working; falling back to a /dev/shm/ based implementation",),
)
def numa_allowed_for_cumem(ctx: CheckContext) -> CheckResult:
    """NCCL 2.24 and later takes host memory from the CUDA driver, with NUMA system calls that Docker forbids. From
    2.26.5 it notices and falls back to /dev/shm; 2.24 to 2.26.4 fail or hang."""
    version = ctx.nccl.version
    if not ctx.on_gpu or not version:
        return skip("no GPU" if not ctx.on_gpu else "no NCCL is installed")
    if version < (2, 24) or ctx.gpus.cuda < (12, 6) or ctx.nccl.value("NCCL_CUMEM_HOST_ENABLE") == "0":
        return ok("NCCL uses /dev/shm here")
    allowed = numa_allowed(ctx.host)
    if allowed is None:
        return unknown(f"whether NUMA system calls are allowed is not known on {ctx.host.machine}")
    if allowed:
        return ok("NUMA system calls are allowed")
    fix = Fix(
        host="NCCL_CUMEM_HOST_ENABLE=0",
        docker="docker run --cap-add SYS_NICE …, or -e NCCL_CUMEM_HOST_ENABLE=0",
        compose="cap_add: [SYS_NICE]",
        kubernetes="securityContext: {capabilities: {add: [SYS_NICE]}}",
    )
    judge = error if version < (2, 26, 5) else warn
    return judge(f"NUMA system calls are denied, NCCL {'.'.join(map(str, version))}", "allowed", fix)


@check("S-07", CATEGORY, "the memory limit covers /dev/shm as well", severity=Status.WARN)
def shm_within_memory_limit(ctx: CheckContext) -> CheckResult:
    """Pages of a tmpfs count against the container's memory limit: a limit that is just enough for the processes ends
    in an OOM kill when /dev/shm fills."""
    if not ctx.host.cgroup.version:
        return unknown("no cgroup can be seen below /sys/fs/cgroup: whether there is a limit cannot be told")
    limit = ctx.host.cgroup.memory_max
    wanted = shm_requirement(ctx)
    if limit is None or limit >= 1 << 60:
        return ok("no memory limit")
    if limit < 4 * wanted.recommended:
        whole = -(-(limit + wanted.recommended) // (1 << 30))
        return warn(
            f"the memory limit is {format_bytes(limit)}, of which /dev/shm may take {format_bytes(wanted.recommended)}",
            f"{format_bytes(limit + wanted.recommended)}",
            Fix(
                host=f"raise the limit to {whole}G",
                docker=f"docker run --memory={whole}g …",
                compose=f"mem_limit: {whole}gb",
                kubernetes=f"resources.limits.memory: {whole}Gi",
            ),
        )
    return ok(f"the limit is {format_bytes(limit)}")
