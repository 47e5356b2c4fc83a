"""GPU health, as NVML and the kernel log report it."""

import pynvml

from doctor import xids
from doctor.check import CheckResult, Repair, Status, check, error, ok, skip, warn
from doctor.context import CheckContext
from rtp_llm.machine.gpus import APPLICATION_CLOCKS, THROTTLE_REASONS

CATEGORY = "gpu"
NO_GPU = "the ranks run on CPU"
NOT_SUPPORTED = "this GPU does not tell"


@check(
    "G-15",
    CATEGORY,
    "the GPUs' memory is sound",
    symptoms=(
        "CUDA error: uncorrectable ECC error encountered",
        "Xid (PCI:…): 48",
        "Xid (PCI:…): 94",
        "Xid (PCI:…): 63",
    ),
    needs=("G-01", "G-02", "G-03"),
    repair=Repair.REPLACE,
)
def ecc(ctx: CheckContext) -> CheckResult:
    """HBM rows that fail are replaced by spare ones. A replacement that is pending needs a reset of the GPU; one that
    failed, or errors that were not corrected, need another GPU."""
    used = ctx.used_gpus
    if not used:
        return skip(NO_GPU)
    for gpu in used:
        if gpu.remap_failure:
            return error(f"{gpu.label}: replacing a memory row failed", "sound memory", "take this GPU out of service")
        if gpu.ecc_uncorrected:
            fix = f"nvidia-smi -i {gpu.index} -r; if it comes back, take the GPU out of service"
            return error(f"{gpu.label}: {gpu.ecc_uncorrected} uncorrected memory errors", "none", fix)
        if gpu.remap_pending or gpu.retired_pending:
            fix = f"nvidia-smi -i {gpu.index} -r, or reboot"
            return warn(f"{gpu.label}: a memory row waits to be replaced", "none pending", fix)
    if all(gpu.ecc_uncorrected is None and not gpu.remapped_rows for gpu in used):
        return skip(NOT_SUPPORTED)
    return ok("no uncorrected errors, nothing pending")


@check(
    "G-16",
    CATEGORY,
    "no GPU has fallen off the bus",
    symptoms=(
        "NVRM: Xid (PCI:…): 79, … GPU has fallen off the bus",
        "GPU is lost. Reboot the system to recover this GPU",
        "Unable to determine the device handle for GPU …",
    ),
    needs=("G-01", "G-02", "G-03"),
    repair=Repair.REBOOT,
)
def gpus_on_bus(ctx: CheckContext) -> CheckResult:
    """A GPU that lost its power or its link answers nothing any more. The kernel's log has an Xid for that and for what
    else the driver reports of its hardware; a container may often not read it."""
    if not ctx.gpus.all and not ctx.gpus.failed:
        return skip(NO_GPU)
    log = ctx.host.kernel_log
    if ctx.gpus.failed:
        index, code = ctx.gpus.failed[0]
        said = xids.xids_of_unknown_gpus(log or "", [gpu.bus for gpu in ctx.gpus.all])
        last = f"; the kernel reported Xid {said[-1][1]} of {said[-1][0]}" if said else ""
        actual = f"GPU {index}: {pynvml.NVMLError(code)}{last}"
        return error(actual, "an answer", "drain this machine and reboot it", code=code)
    reported = [(gpu, xid) for gpu in ctx.used_gpus for xid in xids.xids_of_gpu(log or "", gpu.bus)]
    if reported:
        gpu, xid = reported[-1]
        what, remedy = xids.MEANINGS[xid]
        count = f"; {len(reported)} such reports in all" if len(reported) > 1 else ""
        fix = remedy.format(gpu=gpu.index)
        return warn(f"{gpu.label} ({gpu.bus}): Xid {xid}, {what}, since the driver was loaded{count}", "no Xid", fix)
    unread = "; /dev/kmsg cannot be read, so Xids are not seen" if log is None else ", and the kernel reported no Xid"
    return ok(f"all {len(ctx.gpus.all)} GPUs answer{unread}")


@check("G-17", CATEGORY, "no GPU is slowed down by heat or power", severity=Status.WARN, needs=("G-09",))
def throttled(ctx: CheckContext) -> CheckResult:
    """A GPU that is too hot, or gets too little power, lowers its clock, and all other ranks wait for it."""
    used = ctx.used_gpus
    if not used:
        return skip(NO_GPU)
    for gpu in used:
        reasons = [text for bit, text in THROTTLE_REASONS.items() if (gpu.clock_reasons or 0) & bit]
        if reasons:
            return warn(
                f"{gpu.label}, {gpu.temperature} C: {', '.join(reasons)}", "no slowdown", "check cooling and power"
            )
        if gpu.temperature and gpu.slowdown_temperature and gpu.temperature >= gpu.slowdown_temperature - 2:
            return warn(f"{gpu.label}: {gpu.temperature} C", f"below {gpu.slowdown_temperature} C", "check cooling")
    temperatures = [gpu.temperature for gpu in used if gpu.temperature is not None]
    if not temperatures and all(gpu.clock_reasons is None for gpu in used):
        return skip(NOT_SUPPORTED)
    return ok(f"at most {max(temperatures)} C" if temperatures else "no slowdown")


@check("G-18", CATEGORY, "the driver stays loaded", severity=Status.WARN, needs=("G-09",))
def persistence(ctx: CheckContext) -> CheckResult:
    """Without persistence mode the driver leaves when the last process does, and every start waits seconds for it."""
    used = ctx.used_gpus
    if not used:
        return skip(NO_GPU)
    if all(gpu.persistence is None for gpu in used):
        return skip(NOT_SUPPORTED)
    off = [str(gpu.index) for gpu in used if gpu.persistence is False]
    return ok(
        f"persistence mode is off on GPU {', '.join(off)}: starts take longer" if off else "persistence mode is on"
    )


@check("G-19", CATEGORY, "the GPUs' PCIe links have their full width", severity=Status.WARN, needs=("G-09",))
def pcie(ctx: CheckContext) -> CheckResult:
    """A card that is not seated well trains with fewer lanes, and copies to and from it are slower by as much. (The
    link's generation is not judged: it drops when idle.)"""
    used = ctx.used_gpus
    if not used:
        return skip(NO_GPU)
    for gpu in used:
        if gpu.pcie_width and gpu.pcie_width_max and gpu.pcie_width < gpu.pcie_width_max:
            fix = "seat the card anew, and look at the BIOS"
            return warn(f"{gpu.label}: {gpu.pcie_width} PCIe lanes", f"{gpu.pcie_width_max}", fix)
    widths = [gpu.pcie_width for gpu in used if gpu.pcie_width]
    return ok(f"{min(widths)} lanes") if widths else skip(NOT_SUPPORTED)


@check("G-20", CATEGORY, "no application clocks are set", severity=Status.WARN, needs=("G-09",))
def clocks_not_lowered(ctx: CheckContext) -> CheckResult:
    """Somebody may have pinned the clocks for a measurement. For information."""
    used = ctx.used_gpus
    if not used:
        return skip(NO_GPU)
    if all(gpu.clock_reasons is None for gpu in used):
        return skip(NOT_SUPPORTED)
    pinned = [str(gpu.index) for gpu in used if (gpu.clock_reasons or 0) & APPLICATION_CLOCKS]
    return ok(
        f"application clocks are set on GPU {', '.join(pinned)} (nvidia-smi -rac)" if pinned else "clocks are free"
    )
