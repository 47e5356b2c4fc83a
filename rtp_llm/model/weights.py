"""Fills a decoder from safetensors: each parameter pulls its own rectangles, and no rank reads more than that."""

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

ProgressCallback = Callable[[float], None]  # share loaded, 0 … 1


@dataclass(frozen=True)
class LoadStats:
    """What one rank read."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class _SliceRead:
    """A piece translated to the checkpoint's own names."""

    parameter: ShardedParameter
    name: str
    dim: int
    source: range
    target: range


def load_weights(model: nn.Module, checkpoint: Checkpoint, spec: ModelSpec, progress: ProgressCallback) -> LoadStats:
    """Raises CheckpointError naming every tensor that is missing or has another shape; nothing is read then."""
    started = time.monotonic()
    reads = _plan_reads(model, spec)
    _check(model, checkpoint, spec)
    total = sum(len(r.target) for r in reads) or 1
    done, count = 0, 0
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for read in reads:
            file = checkpoint.tensors[read.name].file
            if file not in files:
                files[file] = stack.enter_context(safe_open(file, framework="pt"))
            count += _copy_slice(read, files[file])
            done += len(read.target)
            progress(done / total)
    return LoadStats(count, time.monotonic() - started)


def _copy_slice(read: _SliceRead, file: Any) -> int:
    """Copies one rectangle; returns the bytes read. safetensors maps the file, so only the slice's pages are
    touched.
    """
    view = file.get_slice(read.name)
    start, stop = read.source.start, read.source.stop
    part = view[start:stop] if read.dim == 0 else view[:, start:stop]
    target = slice(read.target.start, read.target.stop)
    (read.parameter.data[target] if read.dim == 0 else read.parameter.data[:, target]).copy_(part)
    return int(part.numel() * part.element_size())


def _parameters(model: nn.Module) -> Iterator[ShardedParameter]:
    for parameter in model.parameters():
        assert isinstance(parameter, ShardedParameter)
        yield parameter


def _plan_reads(model: nn.Module, spec: ModelSpec) -> list[_SliceRead]:
    translate = _internlm2_slice if spec.fused_qkv else _identity_slice
    return [
        _SliceRead(parameter, *translate(piece, spec), piece.target)
        for parameter in _parameters(model)
        for piece in parameter.slices
        if len(piece.source)
    ]


def _identity_slice(piece: WeightSlice, spec: ModelSpec) -> tuple[str, int, range]:
    return piece.name, piece.dim, piece.source


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


def _internlm2_slice(piece: WeightSlice, spec: ModelSpec) -> tuple[str, int, range]:
    """InternLM2 stores per KV head: its query heads, its key, its value, in one tensor `wqkv`."""
    name = _internlm2_name(piece.name)
    for kind, part in enumerate((".q_proj", ".k_proj", ".v_proj")):
        if part in piece.name:
            head = piece.source.start // spec.head_dim
            row = _wqkv_row(kind, head, spec.num_heads // spec.num_kv_heads) * spec.head_dim
            return name, 0, range(row, row + len(piece.source))
    return name, piece.dim, piece.source


def _internlm2_name(name: str) -> str:
    for ours, theirs in _INTERNLM2_NAMES:
        name = name.replace(ours, theirs)
    return name


def _wqkv_row(kind: int, head: int, group: int) -> int:
    """Position of a query (0), key (1) or value (2) head in wqkv, in heads."""
    if kind == 0:
        return head // group * (group + 2) + head % group
    return head * (group + 2) + group + kind - 1


def _check(model: nn.Module, checkpoint: Checkpoint, spec: ModelSpec) -> None:
    have, wanted = checkpoint.tensors, _shapes(model, spec)
    missing = sorted(wanted.keys() - have.keys())
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CheckpointError(f"{checkpoint.path}: tensors missing for a {spec.family} model: {shown}")
    for name, shape in wanted.items():
        if have[name].shape != shape:
            raise CheckpointError(f"{checkpoint.path}: {name} has shape {have[name].shape}, config.json says {shape}")
    extra = [n for n in have.keys() - wanted.keys() if not _expected_extra(n, spec)]
    if extra:
        log.warning("%d tensors of the checkpoint are not used by this model, such as %s", len(extra), min(extra))


def _shapes(model: nn.Module, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """What the checkpoint must hold, in its own names; those that are one tensor there add up their rows."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in _parameters(model):
        for name, shape in parameter.full_shapes.items():
            name = _internlm2_name(name) if spec.fused_qkv else name
            rows = shapes[name][0] if "wqkv" in name and name in shapes else 0
            shapes[name] = (rows + shape[0], *shape[1:])
    return shapes


def _expected_extra(name: str, spec: ModelSpec) -> bool:
    """Tensors that are rightly left alone: tied heads, stored rope tables, layers cut off by HACK_LAYER_NUM."""
    if name.endswith("rotary_emb.inv_freq") or (spec.tie_embeddings and name == "lm_head.weight"):
        return True
    parts = name.split(".")
    return len(parts) > 2 and parts[1] == "layers" and parts[2].isdigit() and int(parts[2]) >= spec.num_layers
