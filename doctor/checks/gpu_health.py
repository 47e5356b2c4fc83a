"""Checks of GPU health, from NVML and the kernel log."""

import pynvml

from doctor import xids
from doctor.check import CheckResult, Repair, Status, error, ok, skip, symptoms, warn
from doctor.checks.categories import gpu_check, used_gpu_check
from doctor.checks.gpu_assignment import NOT_REPORTED
from doctor.checks.preconditions import GPUS_USED
from doctor.context import CheckContext
from rtp_llm.machine.gpus import APPLICATION_CLOCKS, THROTTLE_REASONS


@gpu_check(
    "G-15",
    "the GPU memory has no uncorrectable errors",
    needs=("G-01", "G-02", "G-03"),
    preconditions=(GPUS_USED,),
    repair=Repair.REPLACE,
)
@symptoms("CUDA error: uncorrectable ECC error encountered", "Xid (PCI:…): 48", "Xid (PCI:…): 94", "Xid (PCI:…): 63")
def no_memory_errors(ctx: CheckContext) -> CheckResult:
    """The GPU remaps failing rows of its memory to spare rows. A pending remapping, or an uncorrectable error, needs a
    reset of the GPU; a failed remapping, or errors that return, need another GPU."""
    for gpu in ctx.used_gpus:
        reset = f"nvidia-smi -i {gpu.index} -r"
        if gpu.remap_failure:
            return error(f"{gpu.label}: remapping a memory row failed", "no failure", "take this GPU out of service")
        if gpu.ecc_uncorrected:
            fix = f"{reset}; if errors return, take the GPU out of service"
            return error(f"{gpu.label}: {gpu.ecc_uncorrected} uncorrectable memory errors", "no errors", fix)
        if gpu.remap_pending or gpu.retired_pending:
            return warn(
                f"{gpu.label}: remapping a memory row is pending", "no pending remapping", f"{reset}, or reboot"
            )
    if all(gpu.ecc_uncorrected is None and not gpu.remapped_rows for gpu in ctx.used_gpus):
        return skip(NOT_REPORTED)
    return ok("no uncorrectable errors, no pending remapping")


@gpu_check("G-16", "no GPU has fallen off the bus", needs=("G-01", "G-02", "G-03"), repair=Repair.REBOOT)
@symptoms(
    "NVRM: Xid (PCI:…): 79, … GPU has fallen off the bus",
    "GPU is lost. Reboot the system to recover this GPU",
    "Unable to determine the device handle for GPU …",
)
def gpus_on_bus(ctx: CheckContext) -> CheckResult:
    """A GPU that lost its power or its PCIe link no longer responds. For this and for other hardware errors the driver
    writes an Xid (an error number of NVIDIA's) to the kernel log, which a container often cannot read."""
    gpus, log = ctx.gpus, ctx.host.kernel_log
    if not gpus.all and not gpus.failed:
        return skip("the ranks run on CPU")
    if gpus.failed:
        index, code = gpus.failed[0]
        reports = xids.xids_of_unknown_gpus(log or "", [gpu.bus for gpu in gpus.all])
        last_xid = f"; the kernel log has Xid {reports[-1][1]} of {reports[-1][0]}" if reports else ""
        actual = f"GPU {index}: {pynvml.NVMLError(code)}{last_xid}"
        return error(actual, "a GPU that responds", "drain this machine and reboot it", code=code)
    gpu_xids = [(gpu, xid) for gpu in ctx.used_gpus for xid in xids.xids_of_gpu(log or "", gpu.bus)]
    if gpu_xids:
        gpu, xid = gpu_xids[-1]
        meaning, fix = xids.MEANINGS[xid]
        count = f"; {len(gpu_xids)} Xids in all" if len(gpu_xids) > 1 else ""
        actual = f"{gpu.label} ({gpu.bus}): Xid {xid}, {meaning}, since the driver was loaded{count}"
        return warn(actual, "no Xid", fix.format(gpu=gpu.index))
    kernel = "; /dev/kmsg cannot be read, so Xids are not checked" if log is None else ", and the kernel log has no Xid"
    return ok(f"all {len(gpus.all)} GPUs respond{kernel}")


@used_gpu_check("G-17", "no GPU is throttled by heat or power", severity=Status.WARN)
def not_throttled(ctx: CheckContext) -> CheckResult:
    """A GPU that is too hot, or gets too little power, lowers its clock, and all other ranks wait for it."""
    for gpu in ctx.used_gpus:
        reasons = [text for bit, text in THROTTLE_REASONS.items() if (gpu.clock_reasons or 0) & bit]
        if reasons:
            actual = f"{gpu.label}, {gpu.temperature} C: {', '.join(reasons)}"
            return warn(actual, "no throttling", "check cooling and power")
        if gpu.temperature and gpu.slowdown_temperature and gpu.temperature >= gpu.slowdown_temperature - 2:
            return warn(f"{gpu.label}: {gpu.temperature} C", f"below {gpu.slowdown_temperature} C", "check cooling")
    temperatures = [gpu.temperature for gpu in ctx.used_gpus if gpu.temperature is not None]
    if not temperatures and all(gpu.clock_reasons is None for gpu in ctx.used_gpus):
        return skip(NOT_REPORTED)
    return ok(f"at most {max(temperatures)} C" if temperatures else "no throttling")


@used_gpu_check("G-18", "persistence mode keeps the driver loaded", severity=Status.WARN)
def persistence_mode_is_on(ctx: CheckContext) -> CheckResult:
    """Without persistence mode the driver is unloaded when the last process exits, and each start takes seconds longer.
    For information only: the check never fails."""
    if all(gpu.persistence is None for gpu in ctx.used_gpus):
        return skip(NOT_REPORTED)
    off = ", ".join(str(gpu.index) for gpu in ctx.used_gpus if gpu.persistence is False)
    return ok(f"persistence mode is off on GPU {off}: starts take longer" if off else "persistence mode is on")


@used_gpu_check("G-19", "the GPUs' PCIe links have their full width", severity=Status.WARN)
def pcie_width_is_full(ctx: CheckContext) -> CheckResult:
    """A card that is not seated well uses fewer PCIe lanes, and copies to and from it are slower by the same factor.
    The link's generation is not checked, because it drops when the GPU is idle."""
    for gpu in ctx.used_gpus:
        if gpu.pcie_width and gpu.pcie_width_max and gpu.pcie_width < gpu.pcie_width_max:
            fix = "reseat the card, and check the BIOS"
            return warn(f"{gpu.label}: {gpu.pcie_width} PCIe lanes", f"{gpu.pcie_width_max} PCIe lanes", fix)
    widths = [gpu.pcie_width for gpu in ctx.used_gpus if gpu.pcie_width]
    return ok(f"{min(widths)} PCIe lanes") if widths else skip(NOT_REPORTED)


@used_gpu_check("G-20", "no application clocks are set", severity=Status.WARN)
def no_application_clocks(ctx: CheckContext) -> CheckResult:
    """Application clocks (nvidia-smi -ac) that were set for a measurement and never reset limit the GPU's clock. For
    information only: if some are set, the check is ok and names the GPUs."""
    if all(gpu.clock_reasons is None for gpu in ctx.used_gpus):
        return skip(NOT_REPORTED)
    limited = ", ".join(str(gpu.index) for gpu in ctx.used_gpus if (gpu.clock_reasons or 0) & APPLICATION_CLOCKS)
    return ok(f"application clocks are set on GPU {limited} (nvidia-smi -rac)" if limited else "clocks are not limited")
