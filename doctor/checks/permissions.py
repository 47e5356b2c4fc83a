"""What the user of this process can open, trace and write."""

import errno
import os
import pwd
from pathlib import Path

from doctor.check import CheckResult, Fix, Status, check, error, ok, skip, warn
from doctor.context import CheckContext

CATEGORY = "limits"


@check(
    "L-08",
    CATEGORY,
    "unified memory is there",
    symptoms=("/dev/nvidia-uvm: No such file or directory",),
    needs=("G-01",),
)
def uvm(ctx: CheckContext) -> CheckResult:
    """NCCL 2.23 and later, like CUDA itself, need the nvidia-uvm module and its device file."""
    if not ctx.on_gpu or not ctx.gpus.all:
        return skip("no GPU")
    path = ctx.host.path("/dev/nvidia-uvm")
    fix = Fix(
        host="nvidia-modprobe -u -c=0",
        docker="on the host: nvidia-modprobe -u -c=0, then recreate the container with --gpus all",
        kubernetes="on the node: nvidia-modprobe -u -c=0 (the device plugin mounts /dev/nvidia-uvm)",
    )
    if not path.exists():
        return error("/dev/nvidia-uvm is missing", "the device file", fix)
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError as problem:
        return error(f"/dev/nvidia-uvm cannot be opened: {problem.strerror}", "readable and writable", fix)
    return ok("/dev/nvidia-uvm can be opened")


@check("L-09", CATEGORY, "stacks of hung processes could be taken", severity=Status.WARN)
def ptrace(ctx: CheckContext) -> CheckResult:
    """`rtp-llm-doctor attach` shows stacks with py-spy, which needs ptrace. For information only."""
    scope = ctx.host.read_int("/proc/sys/kernel/yama/ptrace_scope") or 0
    allowed = ctx.host.has_capability("SYS_PTRACE") or scope == 0
    return ok("ptrace is allowed" if allowed else f"ptrace_scope={scope} without SYS_PTRACE: py-spy shows no stacks")


@check(
    "L-10",
    CATEGORY,
    "this user has a name",
    symptoms=("KeyError: 'getpwuid(): uid not found: …'",),
)
def user(ctx: CheckContext) -> CheckResult:
    """torch asks for the user's name when it is imported. An arbitrary uid, as OpenShift gives, has none, unless USER
    says one."""
    uid = ctx.host.uid
    names = {"LOGNAME", "USER", "LNAME", "USERNAME"}
    if any(ctx.host.environ.get(name) for name in names):
        return ok(f"uid {uid} is called by USER")
    if any(line.split(":")[2:3] == [str(uid)] for line in (ctx.host.read("/etc/passwd") or "").splitlines()):
        return ok(f"uid {uid} has a name")
    try:
        pwd.getpwuid(uid)  # a directory service may know it
        return ok(f"uid {uid} has a name")
    except KeyError:
        fix = Fix(
            host="export USER=rtp",
            docker="docker run -e USER=rtp -e HOME=/tmp …",
            compose="environment: {USER: rtp, HOME: /tmp}",
            kubernetes="env: [{name: USER, value: rtp}, {name: HOME, value: /tmp}]",
        )
        return error(f"uid {uid} has no name, and USER is not set", "a name", fix)


@check(
    "L-11",
    CATEGORY,
    "caches and temporary files can be written",
    symptoms=(
        "PermissionError: [Errno 13] Permission denied: '…/.cache",
        "…: failed to map segment from shared object",
    ),
    severity=Status.ERROR,
)
def caches(ctx: CheckContext) -> CheckResult:
    """Sockets and state lie in TMPDIR or RTP_RUN_DIR, kernels that Triton compiles in TRITON_CACHE_DIR or HOME; those
    are loaded as libraries, which a file system mounted noexec forbids."""
    environ = ctx.host.environ
    temporary = ctx.config.rtp_run_dir or environ.get("TMPDIR", "/tmp")
    fix = Fix(
        host=f"make {temporary} writable, or set TMPDIR to a folder that is",
        docker="docker run --tmpfs /tmp:exec …",
        compose="tmpfs: [/tmp:exec]",
        kubernetes="mount an emptyDir at /tmp",
    )
    closed = _closed(ctx, temporary)
    if closed:
        return error(f"{temporary} {closed}", "a writable folder", fix)
    cache = environ.get("TRITON_CACHE_DIR") or environ.get("HOME", "/")
    if not ctx.on_gpu:
        return ok(f"{temporary} can be written")
    closed = _closed(ctx, cache)
    mount = ctx.host.mount(cache)
    if not closed and mount and "noexec" in mount.options:
        closed = "is mounted noexec"
    if closed:
        return warn(f"{cache} {closed}", "a folder for compiled kernels", f"TRITON_CACHE_DIR={temporary}/triton")
    return ok(f"{temporary} and {cache} can be written")


def _closed(ctx: CheckContext, folder: str) -> str:
    """Why a folder cannot be written; empty where it can, or could be made."""
    path = ctx.host.path(folder)
    existing = next(p for p in (path, *path.parents) if p.exists())
    mount = ctx.host.mount(str(Path(folder)))
    if mount and mount.read_only:
        return "is on a read-only file system"
    if not existing.is_dir():
        return f"is below {existing}, which is no folder"
    return "" if os.access(existing, os.W_OK | os.X_OK) else os.strerror(errno.EACCES).lower()
