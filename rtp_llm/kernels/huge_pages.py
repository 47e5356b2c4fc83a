"""Allocates memory for weights in huge pages, so that reading them causes few TLB misses."""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
CHUNK_BYTES = 64 << 20
ALIGNMENT = 4096
PREFETCH_TAIL = 8192  # kernels prefetch so far beyond the end of a weight


class HugePageArena:
    """Allocates tensors from large mappings, because a mapping of only a few MiB gets no huge page.

    A mapping is unmapped when all its tensors are freed. Its pages take memory from the first write on. If the system
    has no huge pages, normal pages are used.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)  # what is left of the newest mapping

    def allocate(self, num_bytes: int) -> Tensor:
        """Returns zeroed memory, [num_bytes] uint8, aligned to 4096 bytes."""
        size = -(-(num_bytes + PREFETCH_TAIL) // ALIGNMENT) * ALIGNMENT
        if size > len(self._chunk):
            chunk = _map(max(size, CHUNK_BYTES))
            if size >= CHUNK_BYTES:  # the rest of the newest mapping still serves smaller ones
                return chunk[:num_bytes]
            self._chunk = chunk
        memory, self._chunk = self._chunk[:num_bytes], self._chunk[size:]
        return memory


def _map(num_bytes: int) -> Tensor:
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # not Linux, or its kernel has none
        memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping
    start = -tensor.data_ptr() % HUGE_PAGE
    return tensor[start : start + num_bytes]


WEIGHTS = HugePageArena()
