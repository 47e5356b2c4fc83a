"""Loads safetensors weights. Each rank reads only the slices that its parameters need."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from rtp_llm.errors import CheckpointError
from rtp_llm.layers.parameter import ShardedParameter, WeightSlice
from rtp_llm.model.checkpoint import Checkpoint
from rtp_llm.model.spec import ModelSpec

log = logging.getLogger(__name__)

ProgressCallback = Callable[[float], None]  # gets the fraction loaded, 0 … 1


@dataclass(frozen=True)
class LoadStats:
    """Bytes that one rank has read from the checkpoint, and the seconds that this took."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class _SliceRead:
    """One read: the slice `source` of checkpoint tensor `name` is copied to the slice `target` of `parameter`.

    Both slices are along dimension `dim`.
    """

    parameter: ShardedParameter
    name: str
    dim: int
    source: range
    target: range


def load_weights(model: nn.Module, checkpoint: Checkpoint, spec: ModelSpec, on_progress: ProgressCallback) -> LoadStats:
    """Loads all parameters of the model from the checkpoint. Returns the bytes read and the time.

    Raises CheckpointError, before it reads any data, if tensors are missing or have unexpected shapes.
    """
    started = time.monotonic()
    reads = _plan_reads(model, spec)
    _check_tensors(model, checkpoint, spec)
    total = sum(len(r.target) for r in reads) or 1
    done, num_bytes = 0, 0
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for read in reads:
            file = checkpoint.tensors[read.name].file
            if file not in files:
                files[file] = stack.enter_context(safe_open(file, framework="pt"))
            num_bytes += _copy_slice(read, files[file])
            done += len(read.target)
            on_progress(done / total)
    return LoadStats(num_bytes, time.monotonic() - started)


def _copy_slice(read: _SliceRead, file: Any) -> int:
    """Copies one slice into its parameter. Returns its size in bytes.

    `file` is memory-mapped, so no other data is read.
    """
    view = file.get_slice(read.name)
    start, stop = read.source.start, read.source.stop
    tensor = view[start:stop] if read.dim == 0 else view[:, start:stop]
    target = slice(read.target.start, read.target.stop)
    (read.parameter.data[target] if read.dim == 0 else read.parameter.data[:, target]).copy_(tensor)
    return int(tensor.numel() * tensor.element_size())


def _parameters(model: nn.Module) -> Iterator[ShardedParameter]:
    for parameter in model.parameters():
        assert isinstance(parameter, ShardedParameter)
        yield parameter


def _plan_reads(model: nn.Module, spec: ModelSpec) -> list[_SliceRead]:
    translate = _internlm2_slice if spec.fused_qkv else _identity_slice
    return [
        _SliceRead(parameter, *translate(weight_slice, spec), weight_slice.target)
        for parameter in _parameters(model)
        for weight_slice in parameter.slices
        if len(weight_slice.source)
    ]


def _identity_slice(weight_slice: WeightSlice, spec: ModelSpec) -> tuple[str, int, range]:
    return weight_slice.name, weight_slice.dim, weight_slice.source


_INTERNLM2_NAMES = (
    ("model.embed_tokens", "model.tok_embeddings"),
    ("lm_head", "output"),
    (".self_attn.q_proj", ".attention.wqkv"),
    (".self_attn.k_proj", ".attention.wqkv"),
    (".self_attn.v_proj", ".attention.wqkv"),
    (".self_attn.o_proj", ".attention.wo"),
    (".mlp.gate_proj", ".feed_forward.w1"),
    (".mlp.up_proj", ".feed_forward.w3"),
    (".mlp.down_proj", ".feed_forward.w2"),
    (".input_layernorm", ".attention_norm"),
    (".post_attention_layernorm", ".ffn_norm"),
)


def _internlm2_slice(weight_slice: WeightSlice, spec: ModelSpec) -> tuple[str, int, range]:
    """Returns where an InternLM2 checkpoint has this slice: (tensor name, dimension, indices).

    In such a checkpoint the tensor `wqkv` stacks, for each KV head, the query heads, the key head and the value head.
    """
    name = _internlm2_name(weight_slice.name)
    for kind, infix in enumerate((".q_proj", ".k_proj", ".v_proj")):
        if infix in weight_slice.name:
            head = weight_slice.source.start // spec.head_dim
            row = _wqkv_row(kind, head, spec.num_heads // spec.num_kv_heads) * spec.head_dim
            return name, 0, range(row, row + len(weight_slice.source))
    return name, weight_slice.dim, weight_slice.source


def _internlm2_name(name: str) -> str:
    for llama_name, internlm2_name in _INTERNLM2_NAMES:
        name = name.replace(llama_name, internlm2_name)
    return name


def _wqkv_row(kind: int, head: int, group_size: int) -> int:
    """Returns how many heads precede a query (`kind` 0), key (1) or value (2) head in the tensor wqkv of InternLM2.

    `group_size`: query heads per KV head.
    """
    if kind == 0:
        return head // group_size * (group_size + 2) + head % group_size
    return head * (group_size + 2) + group_size + kind - 1


def _check_tensors(model: nn.Module, checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Raises CheckpointError if tensors are missing or have unexpected shapes. Logs how many tensors are unused."""
    tensors, shapes = checkpoint.tensors, _expected_shapes(model, spec)
    missing = sorted(shapes.keys() - tensors.keys())
    if missing:
        names = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CheckpointError(f"{checkpoint.path}: tensors missing for a {spec.family} model: {names}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{checkpoint.path}: {name} has shape {tensors[name].shape}, config.json requires {shape}"
            )
    unused = [name for name in tensors.keys() - shapes.keys() if not _is_expected_extra(name, spec)]
    if unused:
        log.warning("%d tensors of the checkpoint are not used by this model, such as %s", len(unused), min(unused))


def _expected_shapes(model: nn.Module, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Returns the expected shapes of the checkpoint's tensors, by name. InternLM2's wqkv has all rows of q, k and v."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in _parameters(model):
        for name, shape in parameter.full_shapes.items():
            name = _internlm2_name(name) if spec.fused_qkv else name
            rows = shapes[name][0] if "wqkv" in name and name in shapes else 0
            shapes[name] = (rows + shape[0], *shape[1:])
    return shapes


def _is_expected_extra(name: str, spec: ModelSpec) -> bool:
    """Returns whether it is normal that a tensor is unused: tied head, rope table, or layer beyond HACK_LAYER_NUM."""
    if name.endswith("rotary_emb.inv_freq") or (spec.tie_embeddings and name == "lm_head.weight"):
        return True
    path = name.split(".")
    return len(path) > 2 and path[1] == "layers" and path[2].isdigit() and int(path[2]) >= spec.num_layers
