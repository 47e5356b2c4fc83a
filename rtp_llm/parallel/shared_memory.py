"""All-reduce and gather between ranks of one machine through a shared segment: on CPU, gloo's 0.5 ms per call would
dominate a step.

Each rank owns a slot in two alternating buffers, and a counter. An operation is: write the own slot, raise the own
counter, wait until all counters are as high, read all slots. A slot is written again two operations later, by when
every rank has raised its counter for the operation between, so it has read the slot. x86 keeps stores in order;
elsewhere `segment.usable` says no and gloo does the work.
"""

import mmap
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rtp_llm.errors import CommunicationError
from rtp_llm.parallel.segment import COUNTER_BYTES, SLOT_BYTES, segment_bytes

SPIN_ITERATIONS, YIELD_ITERATIONS = 200, 2000
SLEEP_SECONDS = 50e-6


class ShmCommunicator:
    """One rank's view of the segment. All ranks make the same calls in the same order."""

    def __init__(self, path: Path, rank: int, size: int, timeout: float):
        self.rank, self.size, self.timeout = rank, size, timeout
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), segment_bytes(size))
        head = size * COUNTER_BYTES
        self._counters = np.frombuffer(memory, np.int64, head // 8).reshape(size, -1)[:, 0]
        body = torch.frombuffer(memory, dtype=torch.uint8, offset=head)
        self._slots = body.view(2, size, SLOT_BYTES)
        self._sequence = 0
        self.wait_seconds = 0.0  # seconds, for the other ranks, in all

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place, added up in float32 and in the order of ranks: the same bits on all of them."""
        flat = tensor.view(-1)
        for piece in torch.split(flat, SLOT_BYTES // flat.element_size()):
            shares = self._exchange(piece)
            piece.copy_(shares.sum(0, dtype=torch.float32 if piece.is_floating_point() else None))
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """Rank 0 gets everyone's tensor (equal shapes), the others None."""
        flat = tensor.contiguous().view(-1)
        parts = [torch.empty_like(flat) for _ in range(self.size)] if self.rank == 0 else []
        step = SLOT_BYTES // flat.element_size()
        for start in range(0, len(flat), step):
            shares = self._exchange(flat[start : start + step])
            for part, share in zip(parts, shares, strict=False):
                part[start : start + step] = share
        return [part.view(tensor.shape) for part in parts] if parts else None

    def _exchange(self, piece: Tensor) -> Tensor:
        """Everyone's piece as [size, len(piece)], valid until the next call."""
        self._sequence += 1
        count = len(piece) * piece.element_size()
        shares = self._slots[self._sequence & 1, :, :count].view(piece.dtype)
        shares[self.rank] = piece
        self._counters[self.rank] = self._sequence
        self._wait()
        return shares

    def _wait(self) -> None:
        began = time.perf_counter()
        self._wait_for_all()
        self.wait_seconds += time.perf_counter() - began

    def _wait_for_all(self) -> None:
        """Spins first, since the others are usually microseconds away, then gives the core to whoever needs it."""
        counters, turn = self._counters, self._sequence
        for spin in range(SPIN_ITERATIONS + YIELD_ITERATIONS):
            if counters.min() >= turn:
                return
            if spin >= SPIN_ITERATIONS:
                os.sched_yield()
        deadline = time.monotonic() + self.timeout
        while counters.min() < turn:
            if time.monotonic() > deadline:
                late = [rank for rank, value in enumerate(counters) if value < turn]
                raise CommunicationError(f"ranks {late} did not come to a collective within {self.timeout:.0f} s")
            time.sleep(SLEEP_SECONDS)
