"""Checks that the server supports the model, and that it fits TP_SIZE and the free memory."""

from doctor.check import CheckResult, error, ok, skip, symptoms, unknown, warn
from doctor.checks.categories import model_check
from doctor.checks.checkpoint_files import NO_MODEL
from doctor.context import CheckContext
from doctor.host import format_bytes
from rtp_llm.model.footprint import ITEM_BYTES, kv_bytes_per_token, weight_bytes
from rtp_llm.model.spec import ModelSpec

NO_PLAN = "the settings give no valid plan of ranks and addresses"


@model_check("M-12", "the model architecture is supported", needs=("M-04", "M-05", "M-06", "M-08", "M-11", "M-16"))
@symptoms(
    "Bfloat16 is only supported on GPUs with compute capability of at least 8.0",
    "architectures=… is not supported",
)
def architecture_is_supported(ctx: CheckContext) -> CheckResult:
    """config.json gives the model family, the RoPE type, the activation function and the quantization. All of
    them must be supported by rtp-llm, and the data type by the GPU: bf16 needs compute capability 8.0. Of an embedding
    model, sentence-transformers' files must say that an embedding is the state of the last token."""
    spec, spec_error = ctx.spec, ctx.spec_error
    if spec_error and spec_error.check in ("", "M-12"):
        return error(
            str(spec_error), "an unquantized model of a family in rtp-llm's README", "choose another checkpoint"
        )
    if spec is None:
        return skip(NO_MODEL)
    if ctx.embedding_error:
        fix = "choose another checkpoint, or TASK_TYPE=LANGUAGE_MODEL to use it for text"
        return error(
            str(ctx.embedding_error), "embeddings that are the last token's hidden state, normalized or not", fix
        )
    too_old = next((g for g in ctx.gpus.visible if ctx.on_gpu and g.capability and g.capability < (8, 0)), None)
    if too_old and spec.dtype == "bf16":
        capability = ".".join(map(str, too_old.capability or ()))
        actual = f"bf16 on {too_old.name} (compute capability {capability})"
        return error(actual, "compute capability 8.0 or more", "ACT_TYPE=fp16")
    task = "" if ctx.task == "LANGUAGE_MODEL" else f", served as {ctx.task}"
    return ok(f"{spec.family}, {spec.num_layers} layers, {spec.dtype}{task}")


@model_check("M-01", "the model can be split into TP_SIZE shards", needs=("M-12", "M-14"))
@symptoms("Total number of attention heads (…) must be divisible by tensor parallel size (…)")
def tp_size_is_valid(ctx: CheckContext) -> CheckResult:
    """Every TP_SIZE up to the number of query heads works: KV heads are replicated; query heads, MLP and vocabulary are
    padded. A TP_SIZE that divides the number of heads needs no padding."""
    spec, plan = ctx.spec, ctx.plan
    if spec is None or plan is None:
        return skip(NO_MODEL if spec is None else NO_PLAN)
    valid_sizes = spec.valid_tp_sizes()
    even_sizes = [n for n in valid_sizes if spec.num_heads % n == 0]
    even = ", ".join(map(str, even_sizes))
    if plan.tp_size not in valid_sizes:
        actual = f"TP_SIZE={plan.tp_size}, the model has {spec.num_heads} query heads"
        return error(
            actual,
            f"TP_SIZE from 1 to {valid_sizes[-1]}; heads need no padding with {even}",
            f"TP_SIZE={max(even_sizes)}",
        )
    padded = f"; {spec.num_heads} heads need padding, TP {even} none" if spec.num_heads % plan.tp_size else ""
    return ok(f"TP {plan.tp_size}; the maximum is {valid_sizes[-1]}{padded}")


@model_check("M-03", "the model fits into memory", needs=("M-01", "G-14"))
@symptoms(
    "No available memory for the cache blocks",
    "CUDA out of memory",
    "Not enough memory. Please try to increase --mem-fraction-static",
)
def weights_fit_memory(ctx: CheckContext) -> CheckResult:
    """The size of the weights per rank follows from the checkpoint and TP_SIZE. The rest of the free memory, less
    RESERVER_RUNTIME_MEM_MB, holds the KV cache, and so limits the longest sequence."""
    spec, plan = ctx.spec, ctx.plan
    if spec is None or plan is None or ctx.running:
        return skip(NO_MODEL if spec is None else "this part's server is running" if ctx.running else NO_PLAN)
    free = _free_bytes_per_rank(ctx)
    if free is None:
        return unknown("the GPUs' free memory cannot be read")
    weights = weight_bytes(spec, plan.tp_size)
    longest = max(0, (free - weights) // kv_bytes_per_token(spec, plan.tp_size))
    max_seq_len = ctx.config.max_seq_len or spec.max_positions
    sizes = f"{format_bytes(weights)} of weights per rank, {format_bytes(free)} free"
    if free < weights:
        fix = _fix_memory(ctx, spec, free)
        return error(sizes, f"{format_bytes(weights)} free per rank", fix, free=free, weights=weights)
    if longest < max_seq_len:
        actual, fix = f"{sizes}: sequences of up to {longest} tokens fit", f"MAX_SEQ_LEN={longest // 16 * 16}"
        return warn(actual, f"memory for {max_seq_len} tokens", f"{fix}, or a larger TP_SIZE", longest=longest)
    return ok(f"{sizes}; longest sequence that fits: {longest} tokens", longest=longest, free=free, weights=weights)


def _free_bytes_per_rank(ctx: CheckContext) -> int | None:
    if ctx.on_gpu:
        free = [gpu.memory_free for gpu in ctx.used_gpus]
        return max(0, min(free) - (ctx.config.reserver_runtime_mem_mb << 20)) if free else None
    # runner/kv_cache_size.py divides the machine's memory between the ranks in the same way.
    return ctx.host.memory_available() // ctx.local_ranks


def _fix_memory(ctx: CheckContext, spec: ModelSpec, free: int) -> str:
    half_precision = ", or ACT_TYPE=bf16" if ITEM_BYTES[spec.dtype] == 4 else ""
    if not ctx.on_gpu:  # a larger TP_SIZE does not help: all ranks share the machine's memory
        return f"free some memory, or spread the ranks over more parts{half_precision}"
    large_enough = [n for n in spec.valid_tp_sizes() if weight_bytes(spec, n) < free]
    tp_size = f"TP_SIZE={large_enough[0]}" if large_enough else "no TP_SIZE is large enough: choose a smaller model"
    return f"{tp_size}{half_precision}"
