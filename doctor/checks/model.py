"""The checkpoint, from its headers alone, and whether it fits: into this plan, into this memory, onto this disk."""

import json
import os
import time
from pathlib import Path

from doctor.check import CheckResult, Fix, Repair, Status, check, error, ok, skip, unknown, warn
from doctor.context import CheckContext
from doctor.host import format_bytes
from rtp_llm.model.checkpoint import Checkpoint
from rtp_llm.model.footprint import ITEM_BYTES, kv_bytes_per_token, weight_bytes
from rtp_llm.model.spec import ModelSpec

CATEGORY = "model"
NO_MODEL = "CHECKPOINT_PATH is not set"
MIN_DISK_BYTES, DISK_OK_BYTES = 1 << 30, 5 << 30
READ_BYTES = 64 << 20
SLOW_LOAD_SECONDS = 600.0
NETWORK_DISKS = ("nfs", "nfs4", "cifs", "ceph", "lustre", "glusterfs", "9p", "virtiofs")


def _errors_of_check(ctx: CheckContext, id: str) -> str:
    """What the checkpoint's own reader says under this id, a line each."""
    own = [*ctx.checkpoint_errors, *([ctx.spec_error] if ctx.spec_error else [])]
    return "; ".join(str(f) for f in own if (f.check or "M-12") == id)


def _folder(ctx: CheckContext) -> Path | None:
    path = ctx.checkpoint_path
    return path if path and path.is_dir() else None


@check(
    "M-08",
    CATEGORY,
    "CHECKPOINT_PATH is a folder here",
    symptoms=(
        "LocalEntryNotFoundError: Cannot find the requested files in the disk cache",
        "CHECKPOINT_PATH=…: does not exist",
    ),
    repair=Repair.DOWNLOAD,
)
def checkpoint_folder_exists(ctx: CheckContext) -> CheckResult:
    """The server reads a local folder and downloads nothing, so a hub name such as org/model is not a place it knows,
    and a path of the host is not one of the container unless it is mounted."""
    path = ctx.checkpoint_path
    if path is None:
        return skip(NO_MODEL)
    hung = _errors_of_check(ctx, "M-08")
    if hung:
        return error(hung, "an answer", "mount it anew, or copy the checkpoint to a local disk")
    if path.is_dir():
        return ok(f"{path} is a folder")
    hub = not path.is_absolute() and str(path).count("/") == 1 and not path.exists()
    local = f"/models/{path.name}"
    actual = f"CHECKPOINT_PATH={path} " + ("is a name on a hub, not a folder" if hub else "is no folder here")
    download = f"hf download {path} --local-dir {local}, then " if hub else ""
    return error(
        actual,
        "a local folder with config.json and *.safetensors",
        Fix(
            host=f"{download}CHECKPOINT_PATH={local}",
            docker=f"{download}docker run -v {local}:{local}:ro -e CHECKPOINT_PATH={local} …",
            compose=f'{download}volumes: ["{local}:{local}:ro"] and CHECKPOINT_PATH: {local}',
            kubernetes=f"mount the volume that holds the model, and set CHECKPOINT_PATH={local}",
        ),
    )


@check(
    "M-11",
    CATEGORY,
    "the checkpoint's files may be read",
    symptoms=("PermissionError: [Errno 13] Permission denied: '…safetensors'", "…: cannot be read: Permission denied"),
    needs=("M-08",),
)
def permissions(ctx: CheckContext) -> CheckResult:
    """A container runs as a user of its own, often not the one who downloaded the model."""
    path = _folder(ctx)
    if path is None:
        return skip(NO_MODEL)
    files = [*path.glob("*.json"), *path.glob("*.safetensors")]
    closed = sorted(f.name for f in files if f.exists() and not os.access(f, os.R_OK))  # else M-06
    fault = _errors_of_check(ctx, "M-11")
    if closed or fault:
        owner = path.stat()
        return error(
            f"uid {ctx.host.uid} may not read {', '.join(closed[:3])}" if closed else fault,
            "every file readable",
            Fix(
                host=f"chmod -R a+rX {path}",
                docker=f"docker run --user {owner.st_uid}:{owner.st_gid} …, or on the host: chmod -R a+rX {path}",
                compose=f'user: "{owner.st_uid}:{owner.st_gid}", or on the host: chmod -R a+rX {path}',
                kubernetes=f"securityContext: {{fsGroup: {owner.st_gid}}}",
            ),
        )
    return ok(f"{len(files)} files can be read")


@check(
    "M-05",
    CATEGORY,
    "the files are the weights, not pointers to them",
    symptoms=("Error while deserializing header: HeaderTooLarge", "is a git-lfs pointer, not the file itself"),
    needs=("M-08", "M-11"),
    repair=Repair.DOWNLOAD,
)
def lfs_pointers(ctx: CheckContext) -> CheckResult:
    """`git clone` without git-lfs leaves text files of some 130 bytes in place of the weights."""
    return _files_result(ctx, "M-05", "no git-lfs pointer among the files", "git lfs install && git lfs pull")


@check(
    "M-06",
    CATEGORY,
    "no shard is missing",
    symptoms=("FileNotFoundError: … model-…-of-…safetensors", "names … shards, missing:"),
    needs=("M-08", "M-11"),
    repair=Repair.DOWNLOAD,
)
def missing_shards(ctx: CheckContext) -> CheckResult:
    """model.safetensors.index.json names the files that hold the tensors; a download that was broken off leaves some
    out, or leaves *.incomplete files."""
    path = _folder(ctx)
    partial = sorted(p.name for p in path.rglob("*.incomplete")) if path else []
    actual = "every shard of the index is there" + (f"; left over: {partial[0]}" if partial else "")
    return _files_result(ctx, "M-06", actual, "download the named files again")


@check(
    "M-04",
    CATEGORY,
    "no file is cut off or damaged",
    symptoms=(
        "Error while deserializing header: MetadataIncompleteBuffer",
        "Error while deserializing header: InvalidHeaderDeserialization",
        "cut off: … bytes, its header says …",
    ),
    needs=("M-08", "M-11"),
    repair=Repair.DOWNLOAD,
)
def damaged_files(ctx: CheckContext) -> CheckResult:
    """A safetensors file begins with the table of its tensors, which says how long the file must be. Only these
    headers are read, so a terabyte takes no longer than a megabyte."""
    return _files_result(
        ctx, "M-04", "every file is as long as its header says", "copy or download the named files again"
    )


def _files_result(ctx: CheckContext, id: str, good: str, fix: str) -> CheckResult:
    path = _folder(ctx)
    if path is None:
        return skip(NO_MODEL)
    fault, beside = _errors_of_check(ctx, id), ctx.tokenizer_error
    if fault:
        place = ctx.tokenizer_path if beside and fault == str(beside) else path
        return error(fault, "whole files", f"{fix} in {place}")
    count = len({t.file for t in ctx.checkpoint.tensors.values()}) if ctx.checkpoint else 0
    return ok(f"{good} ({count} files)" if count else good)


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
        free = [gpu.memory_free for gpu in ctx.gpus.visible[: ctx.local_ranks]]
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


@check(
    "M-07",
    CATEGORY,
    "the tokenizer is there and fits the model",
    symptoms=("Can't load tokenizer for '…'", "…: no tokenizer.json"),
    needs=("M-08", "M-11"),
    repair=Repair.DOWNLOAD,
)
def tokenizer(ctx: CheckContext) -> CheckResult:
    """Part 0 needs tokenizer.json in TOKENIZER_PATH, with no more tokens than the embedding has rows; the chat API
    needs a chat template: the checkpoint's own, or, by the model's family, one that is built in."""
    folder = ctx.tokenizer_path
    if folder is None:
        return skip("only part 0 reads the tokenizer" if ctx.plan and ctx.plan.part else NO_MODEL)
    fix = "set TOKENIZER_PATH to the folder that has tokenizer.json"
    fault = ctx.tokenizer_error
    if fault and fault.check == "M-07":
        return error(str(fault), "a whole tokenizer.json", f"{fix}, or download it again")
    if fault:
        return CheckResult(Status.SKIP, f"because {fault.check}", evidence={"because": fault.check})
    tokens = _largest_token(folder / "tokenizer.json")
    if tokens and ctx.spec and tokens > ctx.spec.vocab_size:
        actual = f"the tokenizer has ids up to {tokens - 1}, the embedding {ctx.spec.vocab_size} rows"
        return error(actual, "a tokenizer of this model", fix)
    if ctx.config.model_template_type or _has_template(folder):
        return ok(f"tokenizer.json, {tokens} tokens")
    return warn(
        f"{folder} has no chat template",
        "one, for /v1/chat/completions",
        "set MODEL_TEMPLATE_TYPE to a built-in template or a .jinja file",
    )


def _largest_token(file: Path) -> int:
    """1 + the largest id of a file that has a vocabulary."""
    table = json.loads(file.read_bytes())
    vocabulary, added = table["model"]["vocab"], table.get("added_tokens") or []
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else range(len(vocabulary))
    return max([*ids, *(t["id"] for t in added)], default=-1) + 1


def _has_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    inline = json.loads(config.read_bytes()).get("chat_template") if config.exists() else None
    return bool(inline) or (folder / "chat_template.jinja").exists()


@check(
    "M-16",
    CATEGORY,
    "the model needs no code of its own",
    symptoms=("contains custom code which must be executed to correctly load the model",),
    needs=("M-08",),
)
def remote_code(ctx: CheckContext) -> CheckResult:
    """Some checkpoints bring Python files that transformers would run. This server never runs code of a checkpoint:
    the families it knows are built in, so such a file is not used."""
    if ctx.checkpoint is None:
        return skip(NO_MODEL)
    if ctx.checkpoint.config.get("auto_map") and ctx.spec is None:
        return error(
            "config.json asks for code of its own (auto_map)", "a built-in family", "choose another checkpoint"
        )
    return ok("nothing of the checkpoint is executed")


@check(
    "M-09",
    CATEGORY,
    "there is room on the disks that are written",
    symptoms=("[Errno 28] No space left on device: '/tmp…'",),
    severity=Status.ERROR,
)
def disk(ctx: CheckContext) -> CheckResult:
    """The run directory and temporary files of torch and Triton lie in RTP_RUN_DIR and TMPDIR. Without room for a few
    kilobytes there not even sockets can be made."""
    folders = {ctx.config.rtp_run_dir or "", ctx.host.environ.get("TMPDIR", "/tmp")} - {""}
    low, text = DISK_OK_BYTES, []
    for name in sorted(folders):
        existing = next(p for p in (Path(name), *Path(name).parents) if ctx.host.exists(str(p)))
        space = ctx.host.space(str(existing))
        low = min(low, space.free if space.inodes != 0 else 0)
        text.append(f"{name} has {format_bytes(space.free)} free" + (", no inode" if space.inodes == 0 else ""))
    fix = Fix(
        host="free some space, or set TMPDIR and RTP_RUN_DIR to another disk",
        docker="docker run --tmpfs /tmp:size=2g …",
        compose="tmpfs: [/tmp:size=2g]",
        kubernetes="mount an emptyDir {sizeLimit: 2Gi} at /tmp",
    )
    if low < 16 << 20:
        return error(", ".join(text), format_bytes(MIN_DISK_BYTES), fix)
    return warn(", ".join(text), format_bytes(MIN_DISK_BYTES), fix) if low < MIN_DISK_BYTES / 8 else ok(", ".join(text))


@check(
    "M-10", CATEGORY, "the weights can be read in good time", severity=Status.WARN, needs=("M-06", "M-08"), timeout=12
)
def read_speed(ctx: CheckContext) -> CheckResult:
    """64 MiB of the checkpoint are read past the page cache (tier 1), and the time for all of it predicted. A disk that
    gives no answer at all shows as a check that was killed."""
    checkpoint = ctx.checkpoint
    if checkpoint is None:
        return skip(NO_MODEL)
    mount = ctx.host.mount(str(checkpoint.path.resolve()))
    kind = mount.fstype if mount else "?"
    if ctx.tier < 1:
        far = kind in NETWORK_DISKS or kind.startswith("fuse")
        return skip(f"on {kind}" + (", over the network; --tier 1 measures it" if far else "; --tier 1 measures it"))
    seconds, count = _read_cold(checkpoint)
    total = sum(f.stat().st_size for f in {t.file for t in checkpoint.tensors.values()})
    speed = count / max(seconds, 1e-6)
    text = f"{format_bytes(speed)}/s from {kind}: {format_bytes(total)} in {total / speed:.1f} s"
    if total / speed > SLOW_LOAD_SECONDS:
        fix = "copy the checkpoint to a local disk, and raise the start-up probe's budget"
        return warn(text, f"at most {SLOW_LOAD_SECONDS:.0f} s", fix, bytes_per_second=round(speed))
    return ok(text, bytes_per_second=round(speed))


def _read_cold(checkpoint: Checkpoint) -> tuple[float, int]:
    """Seconds and bytes of reading the beginning of the largest shard, its pages dropped from the cache before."""
    file = max({t.file for t in checkpoint.tensors.values()}, key=lambda f: f.stat().st_size)
    with file.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, READ_BYTES, os.POSIX_FADV_DONTNEED)
        started, count = time.monotonic(), 0
        while count < READ_BYTES and (piece := stream.read(4 << 20)):
            count += len(piece)
    return time.monotonic() - started, count
