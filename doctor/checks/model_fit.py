"""Whether the model is supported, and fits this plan and this memory."""

from doctor.check import CheckResult, check, error, ok, skip, unknown, warn
from doctor.context import CheckContext
from doctor.host import format_bytes
from rtp_llm.model.footprint import ITEM_BYTES, kv_bytes_per_token, weight_bytes
from rtp_llm.model.spec import ModelSpec

CATEGORY = "model"
NO_MODEL = "CHECKPOINT_PATH is not set"


@check(
    "M-12",
    CATEGORY,
    "the model is of a kind that is served here",
    symptoms=(
        "Bfloat16 is only supported on GPUs with compute capability of at least 8.0",
        "architectures=… is none this server knows",
    ),
    needs=("M-04", "M-05", "M-06", "M-08", "M-11", "M-16"),
)
def architecture(ctx: CheckContext) -> CheckResult:
    """Family, rope variant, activation and quantization stand in config.json; the compute type must also be one that
    the GPU has: bf16 needs compute capability 8.0."""
    if ctx.spec_error and ctx.spec_error.check in ("", "M-12"):
        return error(str(ctx.spec_error), "a family that the README lists, not quantized", "choose another checkpoint")
    spec = ctx.spec
    if spec is None:
        return skip(NO_MODEL)
    old = next((g for g in ctx.gpus.visible if ctx.on_gpu and g.capability and g.capability < (8, 0)), None)
    if old and spec.dtype == "bf16":
        version = ".".join(map(str, old.capability or ()))
        return error(
            f"bf16 on {old.name} (compute capability {version})", "compute capability 8.0 or more", "ACT_TYPE=fp16"
        )
    return ok(f"{spec.family}, {spec.num_layers} layers, {spec.dtype}")


@check(
    "M-01",
    CATEGORY,
    "the model can be split into TP_SIZE",
    symptoms=("Total number of attention heads (…) must be divisible by tensor parallel size (…)",),
    needs=("M-12", "M-14"),
)
def tensor_parallel_size(ctx: CheckContext) -> CheckResult:
    """Any TP_SIZE up to the number of query heads works here: KV heads are replicated, heads, MLP and vocabulary are
    padded. Sizes that divide the heads waste nothing."""
    spec, plan = ctx.spec, ctx.plan
    if spec is None or plan is None:
        return skip(NO_MODEL if spec is None else "there is no plan")
    fitting = spec.valid_tp_sizes()
    even = ", ".join(str(n) for n in fitting if spec.num_heads % n == 0)
    if plan.tp_size not in fitting:
        return error(
            f"TP_SIZE={plan.tp_size}, the model has {spec.num_heads} query heads",
            f"1 to {fitting[-1]}; without padding {even}",
            f"TP_SIZE={max(n for n in fitting if spec.num_heads % n == 0)}",
        )
    padded = f"; {spec.num_heads} heads are padded, {even} would need none" if spec.num_heads % plan.tp_size else ""
    return ok(f"TP {plan.tp_size} of up to {fitting[-1]}{padded}")


@check(
    "M-03",
    CATEGORY,
    "the model fits into memory",
    symptoms=(
        "No available memory for the cache blocks",
        "CUDA out of memory",
        "Not enough memory. Please try to increase --mem-fraction-static",
    ),
    needs=("M-01", "G-14"),
)
def weights_fit_memory(ctx: CheckContext) -> CheckResult:
    """Weights per rank follow from the checkpoint and TP_SIZE; what is left of the free memory, less
    RESERVER_RUNTIME_MEM_MB, holds the KV cache, and so bounds the longest sequence."""
    spec, plan = ctx.spec, ctx.plan
    if spec is None or plan is None or ctx.running:
        return skip(NO_MODEL if spec is None else "this part is running" if ctx.running else "there is no plan")
    free = _free_per_rank(ctx)
    if free is None:
        return unknown("the GPUs' free memory cannot be read")
    weights = weight_bytes(spec, plan.tp_size)
    room = free - weights
    longest = max(0, room // kv_bytes_per_token(spec, plan.tp_size))
    asked = ctx.config.max_seq_len or spec.max_positions
    sums = f"{format_bytes(weights)} of weights per rank, {format_bytes(free)} free"
    if room < 0:
        return error(
            sums, f"{format_bytes(weights)} per rank", _fix_memory(ctx, spec, free), free=free, weights=weights
        )
    if longest < asked:
        return warn(
            f"{sums}: sequences of up to {longest} tokens fit",
            f"MAX_SEQ_LEN of {asked}",
            f"MAX_SEQ_LEN={longest // 16 * 16}, or a larger TP_SIZE",
            longest=longest,
        )
    return ok(f"{sums}; longest context that fits: {longest} tokens", longest=longest, free=free, weights=weights)


def _free_per_rank(ctx: CheckContext) -> int | None:
    reserve = ctx.config.reserver_runtime_mem_mb << 20
    if ctx.on_gpu:
        free = [gpu.memory_free for gpu in ctx.used_gpus]
        return max(0, min(free) - reserve) if free else None
    # As runner/memory.py shares a machine's memory between ranks, before half of the rest goes to the KV cache.
    return ctx.host.memory_available() // ctx.local_ranks


def _fix_memory(ctx: CheckContext, spec: ModelSpec, free: int) -> str:
    if not ctx.on_gpu:  # all ranks of this machine share its memory, however many they are
        return "free some memory, or spread the ranks over more parts" + _half_precision_bytes(spec)
    fits = [n for n in spec.valid_tp_sizes() if weight_bytes(spec, n) < free]
    larger = f"TP_SIZE={fits[0]}" if fits else "no TP_SIZE is large enough: choose a smaller model"
    return larger + _half_precision_bytes(spec)


def _half_precision_bytes(spec: ModelSpec) -> str:
    return ", or ACT_TYPE=bf16" if ITEM_BYTES[spec.dtype] == 4 else ""
