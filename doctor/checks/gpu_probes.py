"""Checks that torch computes correctly on each GPU and has kernels for it. They run torch only with `--tier 1`."""

import pynvml

from doctor import probes
from doctor.check import CheckResult, Repair, error, ok, skip, symptoms, unknown
from doctor.checks.categories import gpu_check
from doctor.checks.preconditions import GPUS_USED
from doctor.context import CheckContext


@gpu_check(
    "G-04",
    "CUDA starts and computes on every GPU",
    needs=("G-05", "G-06", "G-07", "G-09", "G-12", "G-16"),
    preconditions=(GPUS_USED,),
    timeout=60,
    repair=Repair.REBOOT,
)
@symptoms("Error 802: system not yet initialized", "CUDA error: an illegal memory access was encountered")
def gpus_compute(ctx: CheckContext) -> CheckResult:
    """On NVSwitch machines CUDA starts only after the fabric manager, of the same version as the driver, has set up the
    switches. Starts CUDA in a process; with `--tier 1` (active tests that load the hardware), the process also computes
    on each GPU. It is killed if it hangs."""
    for gpu in ctx.used_gpus:
        if gpu.fabric_state not in (None, 0, pynvml.NVML_GPU_FABRIC_STATE_COMPLETED):
            fix = f"on the host: systemctl restart nvidia-fabricmanager (version {ctx.gpus.driver})"
            return error(f"{gpu.label}: the NVSwitch fabric is not set up", "fabric state COMPLETED", fix)
    if ctx.tier < 1:
        return skip("needs --tier 1, which computes on each GPU")
    for gpu, failure in probes.probe_compute(ctx.used_gpus).items():
        if failure:
            fix = "see the error message, and nvidia-smi -q"
            return error(f"GPU {gpu.index}: {failure}", "a correct product of two matrices", fix)
    return ok(f"{len(ctx.used_gpus)} GPUs allocate and compute")


@gpu_check("G-08", "torch has kernels for these GPUs", needs=("G-04",), preconditions=(GPUS_USED,), timeout=60)
@symptoms(
    "no kernel image is available for execution on the device",
    "with CUDA capability sm_… is not compatible with the current PyTorch installation",
)
def torch_has_kernels(ctx: CheckContext) -> CheckResult:
    """A build of torch contains kernels for a fixed list of GPU architectures (sm_80, sm_90, …). With `--tier 1`
    (active tests), the check reads the list from torch and compares it with the GPUs."""
    if ctx.tier < 1:
        return skip("needs --tier 1, which reads torch's list of GPU architectures")
    compiled = probes.architectures()
    if compiled is None:
        return unknown("torch does not report for which GPU architectures it has kernels")
    for gpu in ctx.used_gpus:
        if gpu.capability and not probes.supports_capability(compiled, gpu.capability):
            required = "sm_" + "".join(map(str, gpu.capability))
            actual = f"{gpu.label} is {required}, torch has kernels for {', '.join(compiled)}"
            fix = f"install a torch build with kernels for {required}"
            return error(actual, f"torch with kernels for {required}", fix)
    return ok(f"torch has kernels for {', '.join(compiled)}")
