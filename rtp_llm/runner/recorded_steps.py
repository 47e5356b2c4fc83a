"""Records steps on CPU, once per number of tokens, and replays each with a few calls (like CUDA graphs)."""

import logging
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rtp_llm.kernels.batch import ForwardBatch
from rtp_llm.kernels.native_attention import NativeMetadata
from rtp_llm.layers.rope import RotaryEmbedding
from rtp_llm.model.decoder import Decoder
from rtp_llm.model.forward_context import ForwardContext
from rtp_llm.native.library import Library
from rtp_llm.native.tape import Tape, recording
from rtp_llm.parallel.mesh import MeshAxis

log = logging.getLogger(__name__)

MAX_TOKENS = 256  # with more, the work of a step outweighs its calls
CHUNK_BYTES = 4 << 20
ALIGNMENT = 64
# Functions that compute nothing if what they return is a part of an argument. `__get__`: properties.
_HARMLESS = {
    *(
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "split",
        "split_with_sizes",
        "chunk",
        "__getitem__",
        "unsqueeze",
        "squeeze",
        "contiguous",
    ),
    *("__get__", "__len__", "stride", "size", "dim", "numel", "data_ptr", "is_contiguous", "element_size", "to"),
}


@dataclass(frozen=True)
class RecordedStep:
    """The recorded kernel calls of steps with T tokens, and the tensors at fixed addresses that these calls read and
    write.

    x, residual: [T, hidden_size], input of the first layer. hidden: [T, hidden_size], output of the last layer.
    context: attention metadata and rotary embeddings.
    """

    tape: Tape
    x: Tensor
    residual: Tensor
    hidden: Tensor
    context: ForwardContext

    def replay(self, x: Tensor, residual: Tensor, context: ForwardContext) -> Tensor:
        """Copies the inputs to the fixed tensors and replays the calls. Returns the hidden states [T, hidden_size]."""
        self.x.copy_(x)
        self.residual.copy_(residual)
        self.context.update(context)
        self.tape.replay()
        return self.hidden


class RecordedSteps:
    """Records the kernel calls of a decoder's layers at the first step with each number of tokens, except the very
    first step, so that later steps replay them without Python. A step may mix decodes and chunks of prompts: only the
    contents of the attention metadata differ.

    Steps do not overlap, so all recordings use the same memory. Nothing is recorded if a layer calls anything other
    than replayable kernels and all-reduces. The very first step shows which rotary embeddings the layers use.
    """

    def __init__(self, decoder: Decoder, kernels: Library, ranks: MeshAxis):
        """`ranks`: the ranks whose partial results the layers sum."""
        self._decoder, self._kernels, self._ranks = decoder, kernels, ranks
        self._steps: dict[tuple[int, int], RecordedStep] = {}  # by number of tokens and of threads
        self._memory = _Memory()
        self._ropes: list[RotaryEmbedding] | None = None  # that layers use, once a step has been computed
        self._is_possible = True

    def covers(self, batch: ForwardBatch) -> bool:
        """Returns whether this step may be recorded or replayed: it has at most MAX_TOKENS tokens."""
        return self._is_possible and 0 < len(batch.token_ids) <= MAX_TOKENS

    def run(self, context: ForwardContext) -> Tensor:
        """Returns the hidden states [T, hidden_size] of a step for which `covers` is true: replays the recording for
        its number of tokens, or computes and records it. The next call overwrites the returned tensor.
        """
        x, residual = self._decoder.embed(context)
        key = len(residual), torch.get_num_threads()
        if key in self._steps:
            return self._steps[key].replay(x, residual, context)
        if self._ropes is None:  # the first step shows which rotations layers compute with torch
            hidden = self._decoder.run_layers(x, residual, context)
            self._ropes = context.ropes
            return hidden
        for rope in self._ropes:
            context.cos_sin(rope)
        return self._record(key, x, residual, context)

    def _record(self, key: tuple[int, int], x: Tensor, residual: Tensor, context: ForwardContext) -> Tensor:
        self._memory.rewind()
        fixed_x, fixed_residual = (self._memory.allocate(t.shape, t.dtype).copy_(t) for t in (x, residual))
        with recording(self._kernels) as tape, _on_host(self._ranks, tape), _Watch(self._memory, tape) as watch:
            context = replace(context, on_layer=partial(tape.call_on_host, context.on_layer))
            hidden = self._decoder.run_layers(fixed_x, fixed_residual, context)
        others = sorted(tape.unrecorded | watch.operations)
        if others or not all(isinstance(metadata, NativeMetadata) for metadata in context.metadata):
            log.debug("decode steps are not recorded: their layers call %s", ", ".join(others) or "other attention")
            self._is_possible = False
            self._steps.clear()
        else:
            self._steps[key] = RecordedStep(tape, fixed_x, fixed_residual, hidden, context)
        return hidden


@contextmanager
def _on_host(ranks: MeshAxis, tape: Tape) -> Iterator[None]:
    """Records all-reduces as calls from Python, which use the communicator that is current at the replay."""
    ranks.all_reduce = partial(tape.call_on_host, ranks.all_reduce)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del ranks.all_reduce


class _Watch(TorchFunctionMode):
    """A torch function mode that allocates tensors from a fixed memory, and collects the torch functions that compute.

    Not a TorchDispatchMode, which sees more calls but imports torch's compiler: that takes seconds.
    """

    def __init__(self, memory: "_Memory", tape: Tape):
        super().__init__()
        self.operations: set[str] = set()
        self._memory, self._tape = memory, tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._tape.is_on_host:
            return func(*args, **kwargs)
        if func is torch.empty:
            return self._memory.allocate(args if isinstance(args[0], int) else args[0], kwargs["dtype"])
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", repr(func))
        if name not in _HARMLESS or not _is_part(result, args):
            self.operations.add(name)
        return result


def _is_part(result: Any, arguments: Sequence[Any]) -> bool:
    """Returns whether the tensors that a function returned are parts of its arguments."""
    storages = {argument.untyped_storage().data_ptr() for argument in arguments if isinstance(argument, Tensor)}
    results = result if isinstance(result, (tuple, list)) else (result,)
    return all(part.untyped_storage().data_ptr() in storages for part in results if isinstance(part, Tensor))


class _Memory:
    """Memory for the tensors of a recording. What a tensor had is handed out again to the next one of the same size
    once nothing refers to it, so that a step touches little memory. `rewind` frees everything.
    """

    def __init__(self) -> None:
        self._chunks: list[NDArray[np.uint8]] = []
        self.rewind()

    def rewind(self) -> None:
        """Starts to hand out memory from the beginning, also that of tensors that still exist."""
        self._chunk = self._offset = 0  # of what has not been handed out
        self._free: dict[int, list[NDArray[np.uint8]]] = defaultdict(list)  # by size in bytes

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns uninitialized memory as a tensor."""
        num_bytes = prod(shape) * dtype.itemsize
        free = self._free[num_bytes]
        block = free.pop() if free else self._carve(num_bytes)
        memory = block[:]  # an object that lives as long as the tensors of this memory
        weakref.finalize(memory, free.append, block)
        return torch.from_numpy(memory).view(dtype).view(tuple(shape))

    def _carve(self, num_bytes: int) -> NDArray[np.uint8]:
        while self._chunk == len(self._chunks) or self._offset + num_bytes > len(self._chunks[self._chunk]):
            if self._chunk == len(self._chunks):
                self._chunks.append(torch.empty(max(num_bytes, CHUNK_BYTES), dtype=torch.uint8).numpy())
            else:
                self._chunk += 1
            self._offset = 0
        block = self._chunks[self._chunk][self._offset : self._offset + num_bytes]
        self._offset += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return block
