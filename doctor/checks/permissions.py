"""Checks that this process's user may open nvidia-uvm, trace processes (ptrace) and write to the caches."""

import errno
import os
import pwd

from doctor import fixes
from doctor.check import CheckResult, Status, error, ok, skip, symptoms, warn
from doctor.checks.categories import limits_check
from doctor.context import CheckContext

UVM = "/dev/nvidia-uvm"


@limits_check("L-08", "/dev/nvidia-uvm can be opened", needs=("G-01",))
@symptoms("/dev/nvidia-uvm: No such file or directory")
def uvm_can_be_opened(ctx: CheckContext) -> CheckResult:
    """CUDA, and NCCL 2.23 and later, need the nvidia-uvm kernel module (unified memory) and its device file."""
    if not ctx.on_gpu or not ctx.gpus.all:
        return skip("no GPU")
    path = ctx.host.path(UVM)
    if not path.exists():
        return error(f"{UVM} is missing", "the device file", fixes.UVM_DEVICE)
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError as exception:
        return error(f"{UVM} cannot be opened: {exception.strerror}", "readable and writable", fixes.UVM_DEVICE)
    return ok(f"{UVM} can be opened")


@limits_check("L-09", "py-spy can dump the stacks of hung processes", severity=Status.WARN)
def ptrace_is_allowed(ctx: CheckContext) -> CheckResult:
    """`rtp-llm-doctor attach` shows the stacks of hung processes with py-spy, which needs ptrace. For information only:
    the check never fails."""
    scope = ctx.host.read_int("/proc/sys/kernel/yama/ptrace_scope") or 0
    allowed = ctx.host.has_capability("SYS_PTRACE") or scope == 0
    return ok("ptrace is allowed" if allowed else f"ptrace_scope={scope} without SYS_PTRACE: py-spy shows no stacks")


@limits_check("L-10", "this process's user id has a user name")
@symptoms("KeyError: 'getpwuid(): uid not found: …'")
def user_has_name(ctx: CheckContext) -> CheckResult:
    """torch looks up the user's name when it is imported. An arbitrary uid, as OpenShift assigns, has no name unless
    USER sets one."""
    uid = ctx.host.uid
    if any(ctx.host.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        return ok(f"uid {uid} has a name: USER, LOGNAME, LNAME or USERNAME is set")
    if any(line.split(":")[2:3] == [str(uid)] for line in (ctx.host.read("/etc/passwd") or "").splitlines()):
        return ok(f"uid {uid} has a name")
    try:
        pwd.getpwuid(uid)  # finds users of a directory service, such as LDAP, as well
    except KeyError:
        return error(f"uid {uid} has no user name, and USER is not set", "a user name", fixes.USER_NAME)
    return ok(f"uid {uid} has a name")


@limits_check("L-11", "caches and temporary files can be written")
@symptoms("PermissionError: [Errno 13] Permission denied: '…/.cache", "…: failed to map segment from shared object")
def caches_are_writable(ctx: CheckContext) -> CheckResult:
    """Sockets and state files are in RTP_RUN_DIR or TMPDIR. Triton compiles kernels into TRITON_CACHE_DIR or HOME and
    loads them as libraries, which fails on a file system that is mounted noexec."""
    environ = ctx.host.environ
    run_dir = ctx.config.rtp_run_dir or environ.get("TMPDIR", "/tmp")
    reason = _not_writable(ctx, run_dir)
    if reason:
        return error(f"{run_dir} {reason}", "a writable folder", fixes.writable_folder(run_dir))
    if not ctx.on_gpu:
        return ok(f"{run_dir} can be written")
    cache = environ.get("TRITON_CACHE_DIR") or environ.get("HOME", "/")
    mount = ctx.host.mount(cache)
    is_noexec = mount and "noexec" in mount.options
    reason = _not_writable(ctx, cache) or ("is mounted noexec" if is_noexec else "")
    if reason:
        return warn(f"{cache} {reason}", "a folder for compiled kernels", f"TRITON_CACHE_DIR={run_dir}/triton")
    return ok(f"{run_dir} and {cache} can be written")


def _not_writable(ctx: CheckContext, folder: str) -> str:
    """Returns the reason why a folder cannot be written or created; empty if it can."""
    path = ctx.host.path(folder)
    existing = next(p for p in (path, *path.parents) if p.exists())
    mount = ctx.host.mount(folder)
    if mount and mount.read_only:
        return "is on a read-only file system"
    if not existing.is_dir():
        return f"is below {existing}, which is not a folder"
    return "" if os.access(existing, os.W_OK | os.X_OK) else os.strerror(errno.EACCES).lower()
