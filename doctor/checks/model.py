"""The checkpoint, from its headers alone, and whether it fits: into this plan, into this memory, onto this disk."""

import json
import os
import time
from pathlib import Path

from doctor.check import Fix, Outcome, Repair, Status, check, error, ok, skip, unknown, warn
from doctor.host import size_text
from doctor.node import Node
from rtp_llm.model.checkpoint import Checkpoint
from rtp_llm.model.footprint import ITEM_BYTES, kv_bytes_per_token, weight_bytes
from rtp_llm.model.spec import ModelSpec

CATEGORY = "model"
NO_MODEL = "CHECKPOINT_PATH is not set"
DISK_LOW, DISK_FAIR = 1 << 30, 5 << 30
READ_BYTES = 64 << 20
SLOW_LOAD_SECONDS = 600.0
NETWORK_DISKS = ("nfs", "nfs4", "cifs", "ceph", "lustre", "glusterfs", "9p", "virtiofs")


def _faults(node: Node, id: str) -> str:
    """What the checkpoint's own reader says under this id, a line each."""
    own = [*node.checkpoint_faults, *([node.spec_fault] if node.spec_fault else [])]
    return "; ".join(str(f) for f in own if (f.check or "M-12") == id)


def _folder(node: Node) -> Path | None:
    path = node.checkpoint_path
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
def folder(node: Node) -> Outcome:
    """The server reads a local folder and downloads nothing, so a hub name such as org/model is not a place it knows,
    and a path of the host is not one of the container unless it is mounted."""
    path = node.checkpoint_path
    if path is None:
        return skip(NO_MODEL)
    hung = _faults(node, "M-08")
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
def permissions(node: Node) -> Outcome:
    """A container runs as a user of its own, often not the one who downloaded the model."""
    path = _folder(node)
    if path is None:
        return skip(NO_MODEL)
    files = [*path.glob("*.json"), *path.glob("*.safetensors")]
    closed = sorted(f.name for f in files if f.exists() and not os.access(f, os.R_OK))  # else M-06
    fault = _faults(node, "M-11")
    if closed or fault:
        owner = path.stat()
        return error(
            f"uid {node.host.uid} may not read {', '.join(closed[:3])}" if closed else fault,
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
def lfs_pointers(node: Node) -> Outcome:
    """`git clone` without git-lfs leaves text files of some 130 bytes in place of the weights."""
    return _judge_files(node, "M-05", "no git-lfs pointer among the files", "git lfs install && git lfs pull")


@check(
    "M-06",
    CATEGORY,
    "no shard is missing",
    symptoms=("FileNotFoundError: … model-…-of-…safetensors", "names … shards, missing:"),
    needs=("M-08", "M-11"),
    repair=Repair.DOWNLOAD,
)
def missing_shards(node: Node) -> Outcome:
    """model.safetensors.index.json names the files that hold the tensors; a download that was broken off leaves some
    out, or leaves *.incomplete files."""
    path = _folder(node)
    partial = sorted(p.name for p in path.rglob("*.incomplete")) if path else []
    actual = "every shard of the index is there" + (f"; left over: {partial[0]}" if partial else "")
    return _judge_files(node, "M-06", actual, "download the named files again")


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
def damaged_files(node: Node) -> Outcome:
    """A safetensors file begins with the table of its tensors, which says how long the file must be. Only these
    headers are read, so a terabyte takes no longer than a megabyte."""
    return _judge_files(
        node, "M-04", "every file is as long as its header says", "copy or download the named files again"
    )


def _judge_files(node: Node, id: str, good: str, fix: str) -> Outcome:
    path = _folder(node)
    if path is None:
        return skip(NO_MODEL)
    fault, beside = _faults(node, id), node.tokenizer_fault
    if fault:
        place = node.tokenizer_path if beside and fault == str(beside) else path
        return error(fault, "whole files", f"{fix} in {place}")
    count = len({t.file for t in node.checkpoint.tensors.values()}) if node.checkpoint else 0
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
def architecture(node: Node) -> Outcome:
    """Family, rope variant, activation and quantization stand in config.json; the compute type must also be one that
    the GPU has: bf16 needs compute capability 8.0."""
    if node.spec_fault and node.spec_fault.check in ("", "M-12"):
        return error(str(node.spec_fault), "a family that the README lists, not quantized", "choose another checkpoint")
    spec = node.spec
    if spec is None:
        return skip(NO_MODEL)
    old = next((g for g in node.gpus.visible if node.on_gpu and g.capability and g.capability < (8, 0)), None)
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
def tensor_parallel_size(node: Node) -> Outcome:
    """Any TP_SIZE up to the number of query heads works here: KV heads are replicated, heads, MLP and vocabulary are
    padded. Sizes that divide the heads waste nothing."""
    spec, plan = node.spec, node.plan
    if spec is None or plan is None:
        return skip(NO_MODEL if spec is None else "there is no plan")
    fitting = spec.fitting_tp_sizes()
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
def memory(node: Node) -> Outcome:
    """Weights per rank follow from the checkpoint and TP_SIZE; what is left of the free memory, less
    RESERVER_RUNTIME_MEM_MB, holds the KV cache, and so bounds the longest sequence."""
    spec, plan = node.spec, node.plan
    if spec is None or plan is None or node.running:
        return skip(NO_MODEL if spec is None else "this part is running" if node.running else "there is no plan")
    free = _free_per_rank(node)
    if free is None:
        return unknown("the GPUs' free memory cannot be read")
    weights = weight_bytes(spec, plan.tp_size)
    room = free - weights
    longest = max(0, room // kv_bytes_per_token(spec, plan.tp_size))
    asked = node.config.max_seq_len or spec.max_positions
    sums = f"{size_text(weights)} of weights per rank, {size_text(free)} free"
    if room < 0:
        return error(sums, f"{size_text(weights)} per rank", _fix_memory(node, spec, free), free=free, weights=weights)
    if longest < asked:
        return warn(
            f"{sums}: sequences of up to {longest} tokens fit",
            f"MAX_SEQ_LEN of {asked}",
            f"MAX_SEQ_LEN={longest // 16 * 16}, or a larger TP_SIZE",
            longest=longest,
        )
    return ok(f"{sums}; longest context that fits: {longest} tokens", longest=longest, free=free, weights=weights)


def _free_per_rank(node: Node) -> int | None:
    reserve = node.config.reserver_runtime_mem_mb << 20
    if node.on_gpu:
        free = [gpu.memory_free for gpu in node.gpus.visible[: node.local_ranks]]
        return max(0, min(free) - reserve) if free else None
    # As runner/memory.py shares a machine's memory between ranks, before half of the rest goes to the KV cache.
    return node.host.memory_available() // node.local_ranks


def _fix_memory(node: Node, spec: ModelSpec, free: int) -> str:
    if not node.on_gpu:  # all ranks of this machine share its memory, however many they are
        return "free some memory, or spread the ranks over more parts" + _half(spec)
    fits = [n for n in spec.fitting_tp_sizes() if weight_bytes(spec, n) < free]
    larger = f"TP_SIZE={fits[0]}" if fits else "no TP_SIZE is large enough: choose a smaller model"
    return larger + _half(spec)


def _half(spec: ModelSpec) -> str:
    return ", or ACT_TYPE=bf16" if ITEM_BYTES[spec.dtype] == 4 else ""


@check(
    "M-07",
    CATEGORY,
    "the tokenizer is there and fits the model",
    symptoms=("Can't load tokenizer for '…'", "…: no tokenizer.json"),
    needs=("M-08", "M-11"),
    repair=Repair.DOWNLOAD,
)
def tokenizer(node: Node) -> Outcome:
    """Part 0 needs tokenizer.json in TOKENIZER_PATH, with no more tokens than the embedding has rows; the chat API
    needs a chat template: the checkpoint's own, or, by the model's family, one that is built in."""
    folder = node.tokenizer_path
    if folder is None:
        return skip("only part 0 reads the tokenizer" if node.plan and node.plan.part else NO_MODEL)
    fix = "set TOKENIZER_PATH to the folder that has tokenizer.json"
    fault = node.tokenizer_fault
    if fault and fault.check == "M-07":
        return error(str(fault), "a whole tokenizer.json", f"{fix}, or download it again")
    if fault:
        return Outcome(Status.SKIP, f"because {fault.check}", evidence={"because": fault.check})
    tokens = _largest_token(folder / "tokenizer.json")
    if tokens and node.spec and tokens > node.spec.vocab_size:
        actual = f"the tokenizer has ids up to {tokens - 1}, the embedding {node.spec.vocab_size} rows"
        return error(actual, "a tokenizer of this model", fix)
    if node.config.model_template_type or _has_template(folder):
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
def remote_code(node: Node) -> Outcome:
    """Some checkpoints bring Python files that transformers would run. This server never runs code of a checkpoint:
    the families it knows are built in, so such a file is not used."""
    if node.checkpoint is None:
        return skip(NO_MODEL)
    if node.checkpoint.config.get("auto_map") and node.spec is None:
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
def disk(node: Node) -> Outcome:
    """The run directory and temporary files of torch and Triton lie in RTP_RUN_DIR and TMPDIR. Without room for a few
    kilobytes there not even sockets can be made."""
    folders = {node.config.rtp_run_dir or "", node.host.environ.get("TMPDIR", "/tmp")} - {""}
    low, text = DISK_FAIR, []
    for name in sorted(folders):
        existing = next(p for p in (Path(name), *Path(name).parents) if node.host.exists(str(p)))
        space = node.host.space(str(existing))
        low = min(low, space.free if space.inodes != 0 else 0)
        text.append(f"{name} has {size_text(space.free)} free" + (", no inode" if space.inodes == 0 else ""))
    fix = Fix(
        host="free some space, or set TMPDIR and RTP_RUN_DIR to another disk",
        docker="docker run --tmpfs /tmp:size=2g …",
        compose="tmpfs: [/tmp:size=2g]",
        kubernetes="mount an emptyDir {sizeLimit: 2Gi} at /tmp",
    )
    if low < 16 << 20:
        return error(", ".join(text), size_text(DISK_LOW), fix)
    return warn(", ".join(text), size_text(DISK_LOW), fix) if low < DISK_LOW / 8 else ok(", ".join(text))


@check(
    "M-10", CATEGORY, "the weights can be read in good time", severity=Status.WARN, needs=("M-06", "M-08"), timeout=12
)
def read_speed(node: Node) -> Outcome:
    """64 MiB of the checkpoint are read past the page cache (tier 1), and the time for all of it predicted. A disk that
    gives no answer at all shows as a check that was killed."""
    checkpoint = node.checkpoint
    if checkpoint is None:
        return skip(NO_MODEL)
    mount = node.host.mount(str(checkpoint.path.resolve()))
    kind = mount.fstype if mount else "?"
    if node.tier < 1:
        far = kind in NETWORK_DISKS or kind.startswith("fuse")
        return skip(f"on {kind}" + (", over the network; --tier 1 measures it" if far else "; --tier 1 measures it"))
    seconds, count = _read_cold(checkpoint)
    total = sum(f.stat().st_size for f in {t.file for t in checkpoint.tensors.values()})
    speed = count / max(seconds, 1e-6)
    text = f"{size_text(speed)}/s from {kind}: {size_text(total)} in {total / speed:.1f} s"
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
