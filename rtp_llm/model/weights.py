"""Loads safetensors weights. Each rank reads only the slices that its parameters need."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from rtp_llm.errors import CheckpointError
from rtp_llm.layers.linear import ParallelLinear
from rtp_llm.layers.parameter import Box, ShardedParameter, WeightSlice
from rtp_llm.model.checkpoint import Checkpoint
from rtp_llm.model.spec import ModelSpec
from rtp_llm.model.tensor_names import BASE_MODEL_NAMES, LLAMA_NAMES, TENSOR_NAMES, TensorNames

log = logging.getLogger(__name__)

ProgressCallback = Callable[[float], None]  # gets the fraction loaded, 0 … 1
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LoadStats:
    """How many bytes one rank has read from the checkpoint, and how many seconds it took to read, repack and quantize
    the weights.
    """

    bytes: int
    seconds: float


def load_weights(model: nn.Module, checkpoint: Checkpoint, spec: ModelSpec, on_progress: ProgressCallback) -> LoadStats:
    """Loads all parameters of the model. Repacks or quantizes each linear layer's weight matrix as soon as it is read.

    The peak memory is therefore the final size of the model plus one weight matrix in the checkpoint's format.
    on_progress: called with the loaded fraction, 0 to 1. Raises CheckpointError, before it reads any weights, if
    tensors are missing or have unexpected shapes.
    """
    started = time.monotonic()
    layout = _CheckpointLayout(model, spec, _tensor_names(checkpoint, spec))
    _check_tensors(layout.shapes, checkpoint, spec)
    total = sum(s.num_elements for p in _parameters(model) for s in p.slices) or 1
    with ExitStack() as stack:
        reader = _Reader(checkpoint, layout, stack)
        for module in model.modules():
            for name, parameter in _own_parameters(module):
                setattr(module, name, reader.read(parameter))
                on_progress(reader.num_elements / total)
            if isinstance(module, ParallelLinear):
                module.process_weights_after_loading()
    _log_batch_invariance(model)
    return LoadStats(reader.num_bytes, time.monotonic() - started)


def _own_parameters(module: nn.Module) -> list[tuple[str, ShardedParameter]]:
    parameters = list(module.named_parameters(recurse=False))
    return [(name, parameter) for name, parameter in parameters if isinstance(parameter, ShardedParameter)]


def _parameters(model: nn.Module) -> Iterator[ShardedParameter]:
    return (parameter for module in model.modules() for _, parameter in _own_parameters(module))


class _Reader:
    """Reads parameters from the memory-mapped files of a checkpoint, so that only their slices are read from disk."""

    def __init__(self, checkpoint: Checkpoint, layout: "_CheckpointLayout", stack: ExitStack):
        self.num_elements = self.num_bytes = 0
        self._checkpoint, self._layout, self._stack = checkpoint, layout, stack
        self._files: dict[Path, Any] = {}

    def read(self, parameter: ShardedParameter) -> ShardedParameter:
        """Returns the parameter in memory, filled with its slices of the checkpoint."""
        parameter = parameter.materialize()
        for weight_slice in (part for whole in parameter.slices for part in self._layout.locate(whole)):
            source = self._open(weight_slice.name).get_slice(weight_slice.name)[_index(weight_slice.source)]
            target = parameter.data[_index(weight_slice.target)]
            target.copy_(source.reshape(target.shape))
            self.num_elements += target.numel()
            self.num_bytes += source.numel() * source.element_size()
        return parameter

    def _open(self, tensor: str) -> Any:
        file = self._checkpoint.tensors[tensor].file
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(file, framework="pt"))
        return self._files[file]


def _index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(r.start, r.stop, r.step) for r in box)


class _CheckpointLayout:
    """Translates slices with Llama's names to the tensors of a family's checkpoint. `shapes`: of these tensors."""

    def __init__(self, model: nn.Module, spec: ModelSpec, names: TensorNames):
        self._names = names
        self._num_kv_heads = spec.num_kv_heads
        self._parts = {name: shape for p in _parameters(model) for name, shape in p.full_shapes.items()}
        self.shapes = self._checkpoint_shapes()

    def _checkpoint_shapes(self) -> Shapes:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in self._parts.items():
            fused = self._names.find_fused(name)
            if fused:
                rows = sum(self._parts[part][0] for part in fused[1])
                shapes[fused[0]] = (rows, *shape[1:])
            else:
                shapes[self._names.rename(name)] = shape
        return shapes

    def locate(self, weight_slice: WeightSlice) -> Iterator[WeightSlice]:
        """Yields the slices of the checkpoint that make up a slice with Llama's tensor name: several if its rows are
        not adjacent in a fused tensor.
        """
        fused = self._names.find_fused(weight_slice.name)
        if not fused:
            yield replace(weight_slice, name=self._names.rename(weight_slice.name))
            return
        name, parts, per_kv_head = fused
        repeats = self._num_kv_heads if per_kv_head else 1
        sizes = {part: self._parts[part][0] // repeats for part in parts}  # rows of each part in one repeat
        size, stride = sizes[weight_slice.name], sum(sizes.values())
        offset = sum(sizes[part] for part in parts[: parts.index(weight_slice.name)])
        rows, target = weight_slice.source[0], weight_slice.target[0]
        assert rows.step == 1, "a fused tensor is cut at contiguous rows only"
        for start in [rows.start, *range(rows.start // size * size + size, rows.stop, size)]:
            stop = min(rows.stop, start // size * size + size)
            row = start // size * stride + offset + start % size
            pieces = range(row, row + stop - start), target[start - rows.start : stop - rows.start]
            boxes = [
                (piece, *box[1:]) for piece, box in zip(pieces, (weight_slice.source, weight_slice.target), strict=True)
            ]
            yield WeightSlice(name, *boxes)


def _tensor_names(checkpoint: Checkpoint, spec: ModelSpec) -> TensorNames:
    if spec.family in TENSOR_NAMES:
        return TENSOR_NAMES[spec.family]
    return BASE_MODEL_NAMES if "embed_tokens.weight" in checkpoint.tensors else LLAMA_NAMES


def _check_tensors(shapes: Shapes, checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Raises CheckpointError if tensors are missing or have unexpected shapes. Logs unused ones."""
    tensors = checkpoint.tensors
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
        log.warning(
            "ignoring %d tensors of the checkpoint that this model does not use, such as %s", len(unused), min(unused)
        )


def _is_expected_extra(name: str, spec: ModelSpec) -> bool:
    """Returns whether an unused tensor needs no warning: tied head, rope table, or layer beyond HACK_LAYER_NUM."""
    if name.endswith("rotary_emb.inv_freq") or (spec.tie_embeddings and name == "lm_head.weight"):
        return True
    path = name.removeprefix("model.").split(".")
    return len(path) > 1 and path[0] == "layers" and path[1].isdigit() and int(path[1]) >= spec.num_layers


def _log_batch_invariance(model: nn.Module) -> None:
    """Logs whether a row of a linear layer's output can depend on the other rows of the step, as measured."""
    methods = {m.method for m in model.modules() if isinstance(m, ParallelLinear)}
    varying = sorted(f"{m.name} {m.out_size} x {m.in_size}" for m in methods if not m.batch_invariant)
    if varying:
        log.info(
            "linear layers that are not batch-invariant (results depend on the other rows of a step): %s",
            ", ".join(varying),
        )
    else:
        log.info("all linear layers are batch-invariant (results do not depend on the other rows of a step)")
