"""Check for debug settings that slow down every step."""

from doctor.check import CheckResult, Status, ok, warn
from doctor.checks.categories import network_check
from doctor.checks.preconditions import RANKS_ON_GPU
from doctor.context import CheckContext


@network_check("G-21", "no debug setting is active", severity=Status.WARN, preconditions=(RANKS_ON_GPU,))
def no_debug_settings(ctx: CheckContext) -> CheckResult:
    """Settings for debugging that stay in the environment or in nccl.conf make every step slower, or force NCCL to use
    slow paths."""
    environ, active = ctx.host.environ, []
    if environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        active.append("CUDA_LAUNCH_BLOCKING")
    active += [name for name in ("CUDA_INJECTION64_PATH", "COMPUTE_PROFILE") if environ.get(name)]
    for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"):
        setting = ctx.nccl.settings.get(name)
        if setting and setting.value == "1":
            active.append(name if setting.source == "environment" else f"{name} (in {setting.source})")
    if ctx.nccl.value("NCCL_DEBUG").upper() == "TRACE":
        active.append("NCCL_DEBUG=TRACE")
    if active:
        fix = "unset " + " ".join(text.split(" ")[0] for text in active)
        return warn(f"{', '.join(active)} set", "no debug setting in production", fix)
    return ok("no debug setting")
