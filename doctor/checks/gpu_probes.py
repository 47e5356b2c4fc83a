"""Probes that run a program on each GPU (tier 1)."""

import pynvml

from doctor import probes
from doctor.check import CheckResult, Repair, check, error, ok, skip, unknown
from doctor.context import CheckContext

CATEGORY = "gpu"
NO_GPU = "the ranks run on CPU"


@check(
    "G-04",
    CATEGORY,
    "CUDA starts and computes on every GPU",
    symptoms=("Error 802: system not yet initialized", "CUDA error: an illegal memory access was encountered"),
    needs=("G-05", "G-06", "G-07", "G-09", "G-12", "G-16"),
    timeout=60,
    repair=Repair.REBOOT,
)
def computes(ctx: CheckContext) -> CheckResult:
    """On NVSwitch machines CUDA starts only after the fabric manager, of the driver's own version, has set up the
    switches. Tier 1 lets a process of its own compute on every GPU, and kills it if it hangs."""
    used = ctx.used_gpus
    if not used:
        return skip(NO_GPU)
    completed = pynvml.NVML_GPU_FABRIC_STATE_COMPLETED
    waiting = next((g for g in used if g.fabric_state not in (None, 0, completed)), None)
    if waiting:
        fix = f"on the host: systemctl restart nvidia-fabricmanager (version {ctx.gpus.driver})"
        return error(f"{waiting.label}: its NVSwitch fabric is not set up", "fabric state completed", fix)
    if ctx.tier < 1:
        return skip("--tier 1 lets a process compute on each")
    failures = {gpu.index: text for gpu, text in probes.probe_compute(used).items() if text}
    if failures:
        index, text = next(iter(failures.items()))
        return error(f"GPU {index}: {text}", "a correct product of two matrices", "see the message; then nvidia-smi -q")
    return ok(f"{len(used)} GPUs allocate and compute")


@check(
    "G-08",
    CATEGORY,
    "torch has kernels for these GPUs",
    symptoms=(
        "no kernel image is available for execution on the device",
        "with CUDA capability sm_… is not compatible with the current PyTorch installation",
    ),
    needs=("G-04",),
    timeout=60,
)
def architectures(ctx: CheckContext) -> CheckResult:
    """A build of torch holds machine code for some GPU generations. Tier 1 asks it for the list."""
    used = ctx.used_gpus
    if not used:
        return skip(NO_GPU)
    if ctx.tier < 1:
        return skip("--tier 1 asks torch")
    known = probes.architectures()
    if known is None:
        return unknown("torch cannot be asked for its architectures")
    for gpu in used:
        if gpu.capability and not probes.supports_capability(known, gpu.capability):
            wanted = "sm_" + "".join(map(str, gpu.capability))
            return error(
                f"{gpu.label} is {wanted}, torch has {', '.join(known)}", wanted, "install a torch build that has it"
            )
    return ok(", ".join(known))
