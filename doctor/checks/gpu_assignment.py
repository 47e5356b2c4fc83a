"""Checks that each local rank has a GPU of its own, that these GPUs are of one model, and that they are free."""

from collections import Counter

import pynvml

from doctor import fixes
from doctor.check import CheckResult, Repair, error, ok, skip, symptoms, warn
from doctor.checks.categories import gpu_check, used_gpu_check
from doctor.checks.preconditions import GPUS_PRESENT, NOT_RUNNING
from doctor.context import CheckContext
from doctor.host import format_bytes
from rtp_llm.machine.command_line import redacted_command

MIN_FOREIGN_BYTES = 1 << 30  # the driver or a display alone uses less
NOT_REPORTED = "these GPUs do not report it"


@used_gpu_check("G-10", "every rank has a GPU of its own")
@symptoms(
    "NCCL WARN Duplicate GPU detected : rank … and rank … both on CUDA device …",
    "Multiple Ranks are using the same GPU/Partition",
)
def gpus_are_distinct(ctx: CheckContext) -> CheckResult:
    """NCCL refuses two ranks on one device. This happens if two parts on one machine see the same GPUs, or if ranks use
    MIG instances of one GPU. `rtp-llm-doctor gang` also compares the GPU UUIDs of all parts."""
    uuid, count = Counter(gpu.uuid for gpu in ctx.used_gpus).most_common(1)[0]
    if count > 1:
        return error(
            f"{uuid} would be used by two ranks", "one GPU per rank", "CUDA_VISIBLE_DEVICES with distinct GPUs"
        )
    if shared := list(ctx.gang.shared_gpus().items()) if ctx.gang else []:
        uuid, parts = shared[0]
        fix = "CUDA_VISIBLE_DEVICES=0,1 for the first part of a machine, 2,3 for the second"
        return error(f"{uuid} is used by {' and '.join(parts)}", "separate GPUs for each part", fix)
    return ok(f"{len(ctx.used_gpus)} distinct GPUs")


@gpu_check("G-11", "all ranks use the same GPU model", needs=("G-09",))
@symptoms("The memory capacity is unbalanced. Some GPUs may be occupied by other processes")
def same_gpu_model(ctx: CheckContext) -> CheckResult:
    """With tensor parallelism all ranks wait for the slowest GPU, and the smallest GPU memory limits all."""
    models = {gpu.uuid: (gpu.name, gpu.memory_total, gpu.capability) for gpu in ctx.used_gpus}
    models |= ctx.gang.gpu_kinds() if ctx.gang else {}
    if not models:
        return skip("the ranks run on CPU")
    names = sorted({name for name, _, _ in models.values()})
    totals = [total for _, total, _ in models.values()]
    capabilities = {capability for _, _, capability in models.values()}
    differs = len(capabilities) > 1 or min(totals) < 0.9 * max(totals)
    if differs or len(names) > 1:
        actual, fix = f"several models: {', '.join(names)}", "select GPUs of one model with CUDA_VISIBLE_DEVICES"
        return (error if differs else warn)(actual, "GPUs of one model", fix)
    return ok(f"{len(models)} x {names[0]}")


@used_gpu_check("G-12", "the GPUs are in compute mode DEFAULT", preconditions=(NOT_RUNNING,))
@symptoms("CUDA error: all CUDA-capable devices are busy or unavailable")
def compute_mode_is_default(ctx: CheckContext) -> CheckResult:
    """In compute mode EXCLUSIVE_PROCESS a GPU accepts a single process, so a rank cannot share it with another one (an
    exporter, an earlier run). In mode PROHIBITED it accepts none."""
    for gpu in ctx.used_gpus:
        fix = f"nvidia-smi -i {gpu.index} -c 0"
        if gpu.compute_mode == pynvml.NVML_COMPUTEMODE_PROHIBITED:
            return error(f"{gpu.label} is in compute mode PROHIBITED (no process may use it)", "DEFAULT", fix)
        if gpu.compute_mode == pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS:
            used_by = f", and pid {gpu.processes[0].pid} uses it" if gpu.processes else ""
            make_result = error if gpu.processes else warn
            return make_result(f"{gpu.label} is in compute mode EXCLUSIVE_PROCESS{used_by}", "DEFAULT", fix)
    return skip(NOT_REPORTED) if all(gpu.compute_mode is None for gpu in ctx.used_gpus) else ok("DEFAULT")


@gpu_check(
    "G-13", "no rank uses a MIG instance if TP_SIZE > 1", needs=("G-01", "G-02", "G-03"), preconditions=(GPUS_PRESENT,)
)
@symptoms("device >= 0 && device < num_gpus INTERNAL ASSERT FAILED")
def no_mig_with_tensor_parallelism(ctx: CheckContext) -> CheckResult:
    """A CUDA process sees at most one MIG instance, and instances cannot access each other's memory, so tensor
    parallelism across them does not work."""
    mig_gpu = next((gpu for gpu in ctx.used_gpus if gpu.mig), None)
    if mig_gpu is None:
        return ok("no rank uses a MIG instance")
    if ctx.local_ranks > 1 or (ctx.plan and ctx.plan.world_size > 1):
        fix = f"TP_SIZE=1, or nvidia-smi -i {mig_gpu.index} -mig 0"
        return error(f"{mig_gpu.label} is in MIG mode", "GPUs without MIG if TP_SIZE > 1", fix)
    return ok("one rank on a MIG instance")


@used_gpu_check("G-14", "no other process uses the GPUs' memory", preconditions=(NOT_RUNNING,), repair=Repair.RESTART)
@symptoms(
    "Free memory on device cuda:… (…/… GiB) on startup is less than desired GPU memory utilization",
    "torch.OutOfMemoryError: CUDA out of memory",
)
def gpu_memory_is_free(ctx: CheckContext) -> CheckResult:
    """Another job, or an orphaned process of an earlier run, still uses GPU memory. NVML reports pids of the host; a
    pid that does not exist in this container belongs to a process outside of it."""
    for gpu in ctx.used_gpus:
        used_bytes = gpu.memory_total - gpu.memory_free
        if used_bytes <= MIN_FOREIGN_BYTES:
            continue
        owners = [f"{_describe_process(ctx, p.pid)} ({format_bytes(p.memory)})" for p in gpu.processes]
        used_by = ", ".join(owners) or "an unknown process"
        actual = f"{gpu.label}: {format_bytes(used_bytes)} of {format_bytes(gpu.memory_total)} used by {used_by}"
        if gpu.memory_free < gpu.memory_total // 2:
            return error(actual, "at least half of the memory free", fixes.free_gpu(gpu.index))
        return warn(actual, "all memory free", fixes.free_gpu(gpu.index))
    return ok(f"{format_bytes(min(gpu.memory_free for gpu in ctx.used_gpus))} free on each GPU")


def _describe_process(ctx: CheckContext, pid: int) -> str:
    command = redacted_command((ctx.host.read(f"/proc/{pid}/cmdline") or "").split("\0"))
    return f"pid {pid} ({command})" if command else f"pid {pid} of the host, outside of this container"
