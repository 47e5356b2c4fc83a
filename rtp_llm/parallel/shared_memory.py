"""Collectives between CPU ranks on one machine through a shared-memory segment.

A gloo collective takes about 0.5 ms, which would dominate the duration of a step.

Each rank has a slot in each of two alternating buffers, and a counter. One operation: write the local slot, increment
the local counter, wait until all counters have the same value, read all slots. A slot is overwritten two operations
later. Every rank has incremented its counter for the operation in between by then, so it has read the slot. This needs
stores in order, as on x86; `segment.is_supported` is False elsewhere, and gloo is used.
"""

import mmap
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rtp_llm.errors import CommunicationError
from rtp_llm.parallel.abort import AbortFlag
from rtp_llm.parallel.segment import COUNTER_BYTES, SLOT_BYTES, segment_bytes

SPIN_ITERATIONS, YIELD_ITERATIONS = 200, 2000
SLEEP_SECONDS = 50e-6


class SharedMemoryGroup:
    """The communicator of CPU ranks on one machine: one rank's view of the segment."""

    def __init__(self, path: Path, rank: int, size: int, timeout: float):
        self.rank, self.size, self.timeout = rank, size, timeout
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), segment_bytes(size))
        counters_bytes = size * COUNTER_BYTES
        self._counters = np.frombuffer(memory, np.int64, counters_bytes // 8).reshape(size, -1)[:, 0]
        self._slots = torch.frombuffer(memory, dtype=torch.uint8, offset=counters_bytes).view(2, size, SLOT_BYTES)
        self._sequence = 0
        self._abort_flag = AbortFlag()
        self.wait_seconds = 0.0  # total time spent waiting for other ranks
        self.is_waiting = False

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums over ranks in place, in float32 and in rank order, so that the result is bitwise equal on all ranks."""
        flat = tensor.view(-1)
        for chunk in torch.split(flat, SLOT_BYTES // flat.element_size()):
            chunks = self._exchange(chunk)
            chunk.copy_(chunks.sum(0, dtype=torch.float32 if chunk.is_floating_point() else None))
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """Returns the tensors of all ranks in rank order on rank 0, None on the others. All shapes must be equal."""
        flat = tensor.contiguous().view(-1)
        gathered = [torch.empty_like(flat) for _ in range(self.size)] if self.rank == 0 else []
        chunk_size = SLOT_BYTES // flat.element_size()
        for start in range(0, len(flat), chunk_size):
            chunks = self._exchange(flat[start : start + chunk_size])
            for target, chunk in zip(gathered, chunks, strict=False):
                target[start : start + chunk_size] = chunk
        return [target.view(tensor.shape) for target in gathered] if gathered else None

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Copies rank 0's tensor into those of the others, in place."""
        flat = tensor.view(-1)
        for chunk in torch.split(flat, SLOT_BYTES // flat.element_size()):
            chunk.copy_(self._exchange(chunk)[0])
        return tensor

    def min(self, value: int) -> int:
        return int(self._exchange(torch.tensor([value])).min())

    def check_aborted(self) -> None:
        self._abort_flag.check()

    def abort(self, reason: str) -> None:
        self._abort_flag.set(reason)

    def close(self) -> None:
        self.abort("the group is closed")

    def _exchange(self, chunk: Tensor) -> Tensor:
        """Returns the chunks of all ranks as [size, len(chunk)], valid until the next call."""
        self._sequence += 1
        num_bytes = len(chunk) * chunk.element_size()
        chunks = self._slots[self._sequence & 1, :, :num_bytes].view(chunk.dtype)
        chunks[self.rank] = chunk
        self._counters[self.rank] = self._sequence
        self._wait()
        return chunks

    def _wait(self) -> None:
        start = time.perf_counter()
        self.is_waiting = True
        self._wait_for_all()
        self.is_waiting = False
        self.wait_seconds += time.perf_counter() - start

    def _wait_for_all(self) -> None:
        """Blocks until all counters reach the local sequence number.

        Spins first, since the other ranks usually follow within microseconds, then yields the core, then sleeps.
        Raises CommunicationError after the timeout, or once the group is aborted.
        """
        counters, sequence = self._counters, self._sequence
        for spin in range(SPIN_ITERATIONS + YIELD_ITERATIONS):
            self._abort_flag.check()
            if counters.min() >= sequence:
                return
            if spin >= SPIN_ITERATIONS:
                os.sched_yield()
        deadline = time.monotonic() + self.timeout
        while counters.min() < sequence:
            self._abort_flag.check()
            if time.monotonic() > deadline:
                late_ranks = [rank for rank, value in enumerate(counters) if value < sequence]
                raise CommunicationError(f"ranks {late_ranks} did not join a collective within {self.timeout:.0f} s")
            time.sleep(SLEEP_SECONDS)
