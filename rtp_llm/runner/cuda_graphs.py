"""Captures steps of decodes in CUDA graphs and replays them, so that the GPU does not wait for Python."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rtp_llm.contract.kv_cache import NULL_BLOCK, KVCacheGroup
from rtp_llm.kernels.batch import ForwardBatch

log = logging.getLogger(__name__)

MAX_DECODES = 256  # with more, the work of a step outweighs its launches
MIN_CONTEXT = 1024  # tokens
MAX_FAILURES = 3  # of captures, then no more are tried


class Graph(Protocol):
    """A recording of work on the device, such as `CudaGraph`."""

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        """Records the work of `function`. Returns its result, which gets its value by `replay`."""

    def replay(self) -> None:
        """Does the recorded work again, on the same tensors."""

    def reset(self) -> None:
        """Forgets the recording, also one that has failed."""


class CudaGraph:
    """A CUDA graph. What it computes lies in the same memory as that of `other`, as only one of them runs at a time."""

    def __init__(self, other: "CudaGraph | None" = None):
        self._graph = torch.cuda.CUDAGraph()
        self._pool: Any = other._pool if other else torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        # thread_local: calls that other threads make meanwhile, such as NCCL's watchdog, do not end the capture.
        capture = torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), capture:
                return function()
        except BaseException:
            self._end_allocations()
            raise

    def _end_allocations(self) -> None:
        """Ends what torch leaves as it is if CUDA says that a capture was invalid: later allocations would go to the
        pool, and no memory could be freed. The stream is restored by its own context.
        """
        device = torch.cuda.current_device()
        with suppress(RuntimeError):  # torch has ended them itself
            torch._C._cuda_endAllocateToPool(device, self._pool)
            torch._C._cuda_releasePool(device, self._pool)

    def replay(self) -> None:
        self._graph.replay()

    def reset(self) -> None:
        self._graph.reset()


@dataclass(frozen=True)
class CapturedStep:
    """The captured step of a number of decodes. inputs: the tensors that it reads. hidden: [decodes, hidden_size], what
    it writes.
    """

    graph: Graph
    inputs: ForwardBatch
    hidden: Tensor

    def replay(self, batch: ForwardBatch) -> Tensor:
        """Returns the hidden states [T, hidden_size] of a step with at most as many decodes. The next call overwrites
        them.
        """
        copy_decodes(batch, self.inputs)
        self.graph.replay()
        return self.hidden[: batch.num_decodes]


class CudaGraphs:
    """Captures a step of decodes when its size first occurs, and replays it for later steps of this size.

    A size is a number of decodes and a length of their contexts, both rounded up, so that few graphs are needed. A
    graph refers to the KV cache and to the communicator of the ranks, and must not outlive them. All ranks capture a
    step, or none does: a collective may work otherwise in a graph.
    """

    def __init__(
        self,
        forward: Callable[[ForwardBatch], Tensor],
        groups: Sequence[KVCacheGroup],
        max_sequences: int,
        max_seq_len: int,
        device: torch.device,
        agree: Callable[[int], int],
        make_graph: Callable[[Any], Graph] = CudaGraph,
    ):
        """`forward` computes a step. For decodes, what it launches must depend only on their number and on the longest
        of `host_seq_lens`.

        max_sequences: of a step. max_seq_len: tokens of a sequence. agree: returns the smallest number of all ranks.
        make_graph: called with another graph, or None.
        """
        self._forward, self._make_graph, self._agree = forward, make_graph, agree
        self._groups, self._max_seq_len = groups, max_seq_len
        self._inputs = make_inputs(groups, min(max_sequences, MAX_DECODES), max_seq_len, device)
        self._steps: dict[tuple[int, int], CapturedStep] = {}
        self._num_failures = 0

    @property
    def _is_possible(self) -> bool:
        """Returns whether captures have not failed too often."""
        return self._num_failures < MAX_FAILURES

    def begin_epoch(self, captures: bool) -> None:
        """Continues with the most failures that a rank had. If all ranks want it (`captures`), captures the steps of
        all numbers of decodes with short contexts: otherwise clients would wait for it later. Collective.
        """
        self._num_failures = -self._agree(-self._num_failures)
        num_decodes = self._inputs.num_decodes if self._agree(int(captures)) else 0
        while num_decodes and self._is_possible:  # the largest first: the others use its memory again
            self.run(self._take_inputs(num_decodes, min(MIN_CONTEXT, self._max_seq_len)))
            num_decodes = 1 << (num_decodes - 1).bit_length() >> 1

    def covers(self, batch: ForwardBatch) -> bool:
        """Returns whether this step may be captured or replayed: all its sequences are decodes, and not too many."""
        num_sequences = len(batch.host_seq_lens)
        if not 0 < num_sequences == batch.num_decodes <= self._inputs.num_decodes:
            return False
        return self._is_possible or self._size(batch) in self._steps

    def run(self, batch: ForwardBatch) -> Tensor:
        """Returns the hidden states [T, hidden_size] of a step for which `covers` is true. The next call may overwrite
        them.
        """
        size = self._size(batch)
        if size in self._steps:
            return self._steps[size].replay(batch)
        inputs = self._take_inputs(*size)
        copy_decodes(batch, inputs)
        # Computed once before the capture: compiling a kernel or starting a library cannot be captured.
        hidden = self._forward(inputs)[: batch.num_decodes]
        self._capture(size, inputs)
        return hidden

    def clear(self) -> None:
        """Drops all graphs, because the ranks will have another communicator."""
        for step in self._steps.values():
            step.graph.reset()
        self._steps.clear()

    def _size(self, batch: ForwardBatch) -> tuple[int, int]:
        """Returns the number of decodes and of tokens of the longest, rounded up to powers of 2 and 4."""
        num_decodes, context, longest = 1, MIN_CONTEXT, int(batch.host_seq_lens.max())
        while num_decodes < batch.num_decodes:
            num_decodes *= 2
        while context < longest:
            context *= 4
        return min(num_decodes, self._inputs.num_decodes), min(context, self._max_seq_len)

    def _take_inputs(self, num_decodes: int, context: int) -> ForwardBatch:
        """Returns the first `num_decodes` rows of the inputs, with block tables for contexts of this many tokens."""
        whole, rows = self._inputs, slice(num_decodes)
        return replace(
            whole,
            **{name: getattr(whole, name)[rows] for name in ("token_ids", "positions", "rope_lens", "seq_lens")},
            query_start_loc=whole.query_start_loc[: num_decodes + 1],
            slot_mapping=[slots[rows] for slots in whole.slot_mapping],
            block_tables=[
                table[rows, : group.num_blocks(context)]
                for table, group in zip(whole.block_tables, self._groups, strict=True)
            ],
            host_query_start_loc=whole.host_query_start_loc[: num_decodes + 1],
            host_seq_lens=np.full(num_decodes, context),
            num_decodes=num_decodes,
        )

    def _capture(self, size: tuple[int, int], inputs: ForwardBatch) -> None:
        """Captures the step that computes these inputs, if that succeeds on all ranks. Collective."""
        graph = self._make_graph(next((step.graph for step in self._steps.values()), None))
        hidden, reason = None, "another rank could not capture one"
        try:
            try:
                hidden = graph.capture(lambda: self._forward(inputs))
            except RuntimeError as error:
                reason = str(error.__context__ or error)  # the end of the capture fails as well
            is_captured = self._agree(int(hidden is not None)) == 1
        except BaseException:
            self._num_failures += 1  # perhaps NCCL cannot be captured: then the next epoch would fail as well
            graph.reset()  # otherwise the traceback would keep it, and so the communicator
            raise
        if hidden is not None and is_captured:
            self._steps[size] = CapturedStep(graph, inputs, hidden)
            return
        self._num_failures += 1
        graph.reset()
        log.warning(
            "decodes are computed without CUDA graphs, and so more slowly: %s; ENABLE_CUDA_GRAPH=0 tries none", reason
        )


def make_inputs(
    groups: Sequence[KVCacheGroup], num_decodes: int, max_seq_len: int, device: torch.device
) -> ForwardBatch:
    """Returns the inputs of decodes of one token each, which are written to the null block."""

    def full(value: int, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=torch.int64, device=device)

    return ForwardBatch(
        token_ids=full(0, num_decodes),
        positions=full(0, num_decodes),
        rope_lens=full(1, num_decodes),
        query_start_loc=torch.arange(num_decodes + 1, device=device),
        seq_lens=full(1, num_decodes),
        slot_mapping=[full(NULL_BLOCK, num_decodes) for _ in groups],
        block_tables=[full(NULL_BLOCK, num_decodes, group.num_blocks(max_seq_len)) for group in groups],
        host_query_start_loc=np.arange(num_decodes + 1),
        host_seq_lens=np.full(num_decodes, max_seq_len),
        num_decodes=num_decodes,
    )


def copy_decodes(batch: ForwardBatch, inputs: ForwardBatch) -> None:
    """Copies the decodes of `batch` to the first rows of `inputs`. The other rows become decodes of one token, which is
    written to the null block.
    """
    num_decodes = batch.num_decodes
    for name, padding in (("token_ids", 0), ("positions", 0), ("rope_lens", 1), ("seq_lens", 1)):
        _copy_rows(getattr(batch, name), getattr(inputs, name), padding)
    for slots, target in zip(batch.slot_mapping, inputs.slot_mapping, strict=True):
        _copy_rows(slots, target, NULL_BLOCK)
    for table, target in zip(batch.block_tables, inputs.block_tables, strict=True):
        target[:num_decodes, : table.shape[1]].copy_(table)


def _copy_rows(source: Tensor, target: Tensor, padding: int) -> None:
    target[: len(source)].copy_(source)
    target[len(source) :].fill_(padding)
