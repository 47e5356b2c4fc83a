"""Collectives between CPU ranks on one machine through a shared-memory segment.

A gloo collective takes about 0.5 ms, which would dominate the duration of a step.

Each rank has a slot in each of two alternating buffers, and a counter. One operation: write the local slot, increment
the local counter, wait until all counters have the same value, read the slots. A slot is overwritten two operations
later. Every rank has incremented its counter for the operation in between by then, so it has read the slot.
"""

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rtp_llm.errors import CommunicationError
from rtp_llm.native.library import library
from rtp_llm.parallel.abort import AbortFlag
from rtp_llm.parallel.native_exchange import NativeExchange
from rtp_llm.parallel.segment import COUNTER_BYTES, SLOT_BYTES, segment_bytes

SPIN_ITERATIONS, YIELD_ITERATIONS = 200, 2000
SLEEP_SECONDS = 50e-6


class Exchange(Protocol):
    """One rank's collectives over the shared-memory segment through which the ranks of a machine exchange tensors.
    Tensors must be contiguous, and of the same size on all ranks.

    A collective returns True on success, False if another rank does not join within the timeout, or after `abort`.
    """

    @property
    def wait_seconds(self) -> float:
        """Returns how many seconds this rank has waited for other ranks so far."""
        ...

    @property
    def sequence(self) -> int:
        """Returns this rank's counter: the number of operations that it has started."""
        ...

    def abort(self) -> None:
        """Ends the pending collective and all later ones. Any thread may call it."""
        ...

    def all_reduce(self, tensor: Tensor) -> bool:
        """Sums over ranks in place, in float32 and in rank order, so that the result is bitwise equal on all ranks.

        Returns False at the timeout or after `abort`.
        """
        ...

    def gather(self, tensor: Tensor, gathered: Tensor | None) -> bool:
        """Copies the tensors of all ranks into `gathered`. It is a tensor [number of ranks, elements] on rank 0; the
        other ranks pass None.

        Returns False at the timeout or after `abort`.
        """
        ...

    def broadcast(self, tensor: Tensor) -> bool:
        """Copies rank 0's tensor into those of the others, in place.

        Returns False at the timeout or after `abort`.
        """
        ...


class SharedMemoryGroup:
    """The communicator of CPU ranks on one machine: one rank's view of the segment."""

    def __init__(self, path: Path, rank: int, size: int, timeout: float):
        self.rank, self.size, self.timeout = rank, size, timeout
        with path.open("r+b") as file:
            memory = torch.frombuffer(mmap.mmap(file.fileno(), segment_bytes(size)), dtype=torch.uint8)
        self._counters = _counters(memory, size)
        kernels = library()
        self._exchange: Exchange = (
            NativeExchange(kernels, memory, rank, size, timeout)
            if kernels
            else TorchExchange(memory, rank, size, timeout)
        )
        self._abort_flag = AbortFlag()
        self.is_waiting = False

    @property
    def wait_seconds(self) -> float:
        return self._exchange.wait_seconds

    def all_reduce(self, tensor: Tensor) -> Tensor:
        assert tensor.is_contiguous()
        self.is_waiting = True
        self._finish(self._exchange.all_reduce(tensor))
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        tensor = tensor.contiguous()
        gathered = torch.empty(self.size, *tensor.shape, dtype=tensor.dtype) if self.rank == 0 else None
        self.is_waiting = True
        self._finish(self._exchange.gather(tensor, gathered))
        return None if gathered is None else list(gathered)

    def broadcast(self, tensor: Tensor) -> Tensor:
        assert tensor.is_contiguous()
        self.is_waiting = True
        self._finish(self._exchange.broadcast(tensor))
        return tensor

    def min(self, value: int) -> int:
        values = self.gather(torch.tensor(value))
        return int(self.broadcast(torch.stack(values).min() if values else torch.tensor(value)))

    def check_aborted(self) -> None:
        self._abort_flag.check()

    def abort(self, reason: str) -> None:
        self._abort_flag.set(reason)
        self._exchange.abort()

    def close(self) -> None:
        self.abort("the group is closed")

    def _finish(self, is_complete: bool) -> None:
        """Ends a collective. Raises CommunicationError if other ranks did not join it or the group is aborted."""
        if not is_complete:
            self._abort_flag.check()
            late_ranks = (self._counters < self._exchange.sequence).nonzero()[0].tolist()
            raise CommunicationError(
                f"ranks {late_ranks} did not join a collective within {self.timeout:.0f} s (DIST_COMM_TIMEOUT)"
            )
        self.is_waiting = False


class TorchExchange:
    """Implements `Exchange`, collectives of CPU ranks through shared memory, with torch instead of native kernels.
    Needs a CPU that does not reorder stores: `segment.is_supported`.
    """

    def __init__(self, memory: Tensor, rank: int, size: int, timeout: float):
        """`memory`: the segment, uint8."""
        self.rank, self.timeout, self.sequence, self.wait_seconds = rank, timeout, 0, 0.0
        self._counters = _counters(memory, size)
        self._slots = memory[size * COUNTER_BYTES :].view(2, size, SLOT_BYTES)
        self._is_aborted = False

    def abort(self) -> None:
        self._is_aborted = True

    def all_reduce(self, tensor: Tensor) -> bool:
        return self._exchange(tensor, lambda chunk, chunks: chunk.copy_(chunks.sum(0, dtype=torch.float32)))

    def gather(self, tensor: Tensor, gathered: Tensor | None) -> bool:
        if gathered is None:
            return self._exchange(tensor, lambda chunk, chunks: None)
        targets = iter(_split(gathered.view(len(gathered), -1)))
        return self._exchange(tensor, lambda chunk, chunks: next(targets).copy_(chunks))

    def broadcast(self, tensor: Tensor) -> bool:
        return self._exchange(tensor, lambda chunk, chunks: chunk.copy_(chunks[0]))

    def _exchange(self, tensor: Tensor, use: Callable[[Tensor, Tensor], object]) -> bool:
        """Calls `use` with each piece of the tensor that fits a slot, and with the same pieces of all ranks, [size,
        elements]. Returns False if a rank's piece is missing.
        """
        for chunk in _split(tensor.view(-1)):
            chunks = self._share(chunk)
            if chunks is None:
                return False
            use(chunk, chunks)
        return True

    def _share(self, chunk: Tensor) -> Tensor | None:
        """Returns the chunks of all ranks as [size, len(chunk)], valid until the next call; None if one is missing."""
        self.sequence += 1
        chunks = self._slots[self.sequence & 1, :, : chunk.nbytes].view(chunk.dtype)
        chunks[self.rank] = chunk
        self._counters[self.rank] = self.sequence
        start = time.perf_counter()
        if not self._wait_for_all():
            return None
        self.wait_seconds += time.perf_counter() - start
        return chunks

    def _wait_for_all(self) -> bool:
        """Waits until all counters reach the local sequence number.

        Spins first, since the other ranks usually follow within microseconds, then yields the core, then sleeps.
        Returns False after the timeout, or once the group is aborted.
        """
        counters, sequence = self._counters, self.sequence
        deadline = time.monotonic() + self.timeout
        for spin in range(SPIN_ITERATIONS + YIELD_ITERATIONS):
            if self._is_aborted:
                return False
            if counters.min() >= sequence:
                return True
            if spin >= SPIN_ITERATIONS:
                os.sched_yield()
        while counters.min() < sequence:
            if self._is_aborted or time.monotonic() > deadline:
                return False
            time.sleep(SLEEP_SECONDS)
        return True


def _counters(memory: Tensor, size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Returns the counter of each rank, [size] int64."""
    counters: np.ndarray[tuple[int], np.dtype[np.int64]] = (
        memory[: size * COUNTER_BYTES].numpy().view(np.int64).reshape(size, -1)[:, 0]
    )
    return counters


def _split(tensor: Tensor) -> tuple[Tensor, ...]:
    """Returns the parts of a tensor along its last dimension; the elements of a part, of one rank, fit a slot."""
    return tensor.split(SLOT_BYTES // tensor.element_size(), -1)  # type: ignore[no-any-return, no-untyped-call]
