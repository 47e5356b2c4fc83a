"""Debugging settings that slow down every step."""

from doctor.check import CheckResult, Status, check, ok, skip, warn
from doctor.context import CheckContext

CATEGORY = "network"


@check(
    "G-21",
    CATEGORY,
    "no debugging aid was left on",
    severity=Status.WARN,
)
def debugging(ctx: CheckContext) -> CheckResult:
    """Switches that help to find a fault make every step slower, or force NCCL onto slow ways, when they stay in the
    environment or in nccl.conf."""
    if not ctx.on_gpu:
        return skip("the ranks run on CPU")
    seen = []
    environ = ctx.host.environ
    if environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        seen.append("CUDA_LAUNCH_BLOCKING")
    seen += [name for name in ("CUDA_INJECTION64_PATH", "COMPUTE_PROFILE") if environ.get(name)]
    for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"):
        setting = ctx.nccl.settings.get(name)
        if setting and setting.value == "1":
            seen.append(name if setting.source == "environment" else f"{name} (in {setting.source})")
    if ctx.nccl.value("NCCL_DEBUG").upper() == "TRACE":
        seen.append("NCCL_DEBUG=TRACE")
    if seen:
        return warn(
            f"{', '.join(seen)} set", "unset, in production", "unset " + " ".join(s.split(" ")[0] for s in seen)
        )
    return ok("none")
