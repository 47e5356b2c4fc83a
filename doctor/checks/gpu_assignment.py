"""The GPUs that the local ranks use: distinct, of one model, and free for them."""

from collections import Counter

import pynvml

from doctor.check import CheckResult, Fix, Repair, Status, check, error, ok, skip, warn
from doctor.context import CheckContext
from doctor.host import format_bytes
from rtp_llm.machine.command_line import redacted_command

CATEGORY = "gpu"
NO_GPU = "the ranks run on CPU"
PART_IS_RUNNING = "this part is running, and holds it itself"
MIN_FOREIGN_BYTES = 1 << 30  # beyond what a driver or a display keeps for itself
NOT_SUPPORTED = "this GPU does not tell"


@check(
    "G-10",
    CATEGORY,
    "every rank has a GPU of its own",
    symptoms=(
        "NCCL WARN Duplicate GPU detected : rank … and rank … both on CUDA device …",
        "Multiple Ranks are using the same GPU/Partition",
    ),
    needs=("G-09",),
)
def own_gpu(ctx: CheckContext) -> CheckResult:
    """Two parts on one machine that see the same GPUs, or MIG instances of one GPU, put two ranks on one device: NCCL
    refuses that. Between parts, the gang tier compares the GPUs' UUIDs."""
    used = ctx.used_gpus
    if not used:
        return skip(NO_GPU)
    twice = [uuid for uuid, count in Counter(gpu.uuid for gpu in used).items() if count > 1]
    if twice:
        return error(f"{twice[0]} would serve two ranks", "one GPU per rank", "CUDA_VISIBLE_DEVICES with distinct GPUs")
    shared = ctx.gang.shared_gpus() if ctx.gang else {}
    if shared:
        uuid, parts = next(iter(shared.items()))
        return error(
            f"{uuid} is used by {' and '.join(parts)}",
            "GPUs of its own for each part",
            "CUDA_VISIBLE_DEVICES=0,1 for the first part of a machine, 2,3 for the second",
        )
    return ok(f"{len(used)} distinct GPUs")


@check(
    "G-11",
    CATEGORY,
    "the ranks' GPUs are alike",
    severity=Status.ERROR,
    symptoms=("The memory capacity is unbalanced. Some GPUs may be occupied by other processes",),
    needs=("G-09",),
)
def same_gpu_model(ctx: CheckContext) -> CheckResult:
    """In tensor parallelism the slowest GPU and the smallest memory set the pace for all."""
    kinds = {gpu.uuid: (gpu.name, gpu.memory_total, gpu.capability) for gpu in ctx.used_gpus}
    if ctx.gang:
        kinds |= ctx.gang.gpu_kinds()
    if not kinds:
        return skip(NO_GPU)
    names = sorted({name for name, _, _ in kinds.values()})
    totals = [total for _, total, _ in kinds.values()]
    if len({capability for _, _, capability in kinds.values()}) > 1 or min(totals) < 0.9 * max(totals):
        return error(f"mixed: {', '.join(names)}", "GPUs of one kind", "choose alike GPUs with CUDA_VISIBLE_DEVICES")
    if len(names) > 1:
        return warn(f"mixed: {', '.join(names)}", "GPUs of one kind", "choose alike GPUs with CUDA_VISIBLE_DEVICES")
    return ok(f"{len(kinds)} x {names[0]}")


@check(
    "G-12",
    CATEGORY,
    "the compute mode lets ranks in",
    symptoms=("CUDA error: all CUDA-capable devices are busy or unavailable",),
    needs=("G-09",),
)
def compute_mode(ctx: CheckContext) -> CheckResult:
    """In mode EXCLUSIVE_PROCESS a GPU takes a single process, so a rank and anything else (an exporter, an earlier run)
    exclude each other; in mode PROHIBITED it takes none."""
    used = ctx.used_gpus
    if not used or ctx.running:
        return skip(PART_IS_RUNNING if used else NO_GPU)
    for gpu in used:
        if gpu.compute_mode == pynvml.NVML_COMPUTEMODE_PROHIBITED:
            return error(f"{gpu.label} is in mode PROHIBITED", "DEFAULT", f"nvidia-smi -i {gpu.index} -c 0")
        if gpu.compute_mode == pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS:
            judge = error if gpu.processes else warn
            busy = f", and pid {gpu.processes[0].pid} has it" if gpu.processes else ""
            return judge(
                f"{gpu.label} is in mode EXCLUSIVE_PROCESS{busy}", "DEFAULT", f"nvidia-smi -i {gpu.index} -c 0"
            )
    return skip(NOT_SUPPORTED) if all(gpu.compute_mode is None for gpu in used) else ok("DEFAULT")


@check(
    "G-13",
    CATEGORY,
    "no rank is on a MIG instance while there are several",
    symptoms=("device >= 0 && device < num_gpus INTERNAL ASSERT FAILED",),
    needs=("G-01", "G-02", "G-03"),
)
def mig(ctx: CheckContext) -> CheckResult:
    """A CUDA process sees one MIG instance at most, and instances cannot reach each other's memory, so tensor
    parallelism over them does not work."""
    sliced = next((gpu for gpu in ctx.used_gpus if gpu.mig), None)
    if not ctx.gpus.all:
        return skip(NO_GPU)
    if sliced is None:
        return ok("no MIG")
    if ctx.local_ranks > 1 or (ctx.plan and ctx.plan.world_size > 1):
        return error(
            f"{sliced.label} is in MIG mode",
            "whole GPUs for TP > 1",
            f"TP_SIZE=1, or nvidia-smi -i {sliced.index} -mig 0",
        )
    return ok("one rank on a MIG instance")


@check(
    "G-14",
    CATEGORY,
    "nobody else holds the GPUs' memory",
    symptoms=(
        "Free memory on device cuda:… (…/… GiB) on startup is less than desired GPU memory utilization",
        "torch.OutOfMemoryError: CUDA out of memory",
    ),
    needs=("G-09",),
    repair=Repair.RESTART,
)
def gpu_memory_free(ctx: CheckContext) -> CheckResult:
    """Another job, or a process of an earlier run that was orphaned, still holds memory. NVML gives the pids of the
    host; from a container they may not be found, which means that the owner is outside of it."""
    used = ctx.used_gpus
    if not used or ctx.running:
        return skip(PART_IS_RUNNING if used else NO_GPU)
    for gpu in used:
        taken = gpu.memory_total - gpu.memory_free
        if taken <= MIN_FOREIGN_BYTES:
            continue
        owners = (
            ", ".join(_owner(ctx, p.pid) + f" ({format_bytes(p.memory)})" for p in gpu.processes) or "nobody we can see"
        )
        text = f"{gpu.label}: {format_bytes(taken)} of {format_bytes(gpu.memory_total)} held by {owners}"
        fix = Fix(
            host=f"stop the owner (fuser -v /dev/nvidia{gpu.index}), or choose other GPUs with CUDA_VISIBLE_DEVICES",
            docker=f"on the host: fuser -v /dev/nvidia{gpu.index}, docker ps; stop the owner",
            kubernetes="find the pod that shares this GPU, or a process that outlived its own",
        )
        if gpu.memory_free < gpu.memory_total // 2:
            return error(text, "at least half of it free", fix)
        return warn(text, "all of it free", fix)
    return ok(f"{format_bytes(min(gpu.memory_free for gpu in used))} free on each")


def _owner(ctx: CheckContext, pid: int) -> str:
    command = redacted_command((ctx.host.read(f"/proc/{pid}/cmdline") or "").split("\0"))
    return f"pid {pid} ({command})" if command else f"host pid {pid}, outside of this pid namespace"
