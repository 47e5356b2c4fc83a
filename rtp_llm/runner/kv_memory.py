"""The memory of the KV cache of one rank: one buffer of equally large blocks, reserved at start and populated while
serving.

On CPU the buffer is a private anonymous mapping, whose pages exist from the first write on. So a start does not wait
for the kernel to zero them (0.7 s/GiB). But pages that do not exist yet do not count as used memory: another server
that starts in the meantime would use them, and Linux does not fail an allocation later, but kills a process at the
first write for which it has no page. Therefore a thread populates the pages soon after the start.
"""

import ctypes
import errno
import logging
import mmap
import resource
import threading
import time
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from rtp_llm.errors import ConfigError
from rtp_llm.machine.memory import available_memory, return_free_heap

log = logging.getLogger(__name__)

MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap has no name for it
# Populated per call, in 0.2 ms. (With MADV_HUGEPAGE the kernel took 3 to 6 times as long per byte; Linux 6.18, VM.)
PIECE_BYTES = 512 << 10
# Of one core, for the thread. It gets no lower priority: a thread that is preempted in the kernel while it holds the
# lock of the address space would delay the allocations of the other threads.
POPULATE_SHARE = 0.025
MIN_AVAILABLE_BYTES = 512 << 20  # the thread stops below this, and leaves the rest to what the steps allocate
CHECK_INTERVAL_BYTES = 64 << 20  # between two measurements of the available memory

_libc = ctypes.CDLL(None, use_errno=True)


class KVMemory:
    """The memory of one rank's KV cache. `blocks`: uint8 [num_blocks, block_bytes] on `device`; zero until written. On
    CPU, a block occupies memory only once its pages are written or pre-faulted.
    """

    def __init__(self, num_blocks: int, block_bytes: int, device: torch.device):
        """Raises ConfigError if the system cannot provide the memory or address space."""
        self._is_paged = device.type == "cpu"
        num_bytes = num_blocks * block_bytes
        try:
            if self._is_paged:
                mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                flat = torch.frombuffer(mapping, dtype=torch.uint8)  # keeps the mapping alive
            else:
                flat = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        except (OSError, torch.OutOfMemoryError) as error:
            raise ConfigError(
                f"the KV cache of {num_bytes >> 20} MiB cannot be allocated: {error}; lower KV_CACHE_MEM_MB"
            ) from None
        self.blocks = flat.view(num_blocks, block_bytes)
        self._retired = np.zeros(num_blocks, dtype=bool)
        self._lock = threading.Lock()  # held while pages are populated or returned
        self._stopping = threading.Event()
        self.num_populated = 0 if self._is_paged else num_blocks  # of the first blocks, whose pages exist
        self._thread: threading.Thread | None = None

    def populate_in_background(self) -> None:
        """Starts a thread that pre-faults all blocks: makes the kernel allocate their pages before a step writes them.

        Steps may write to the same pages meanwhile. The thread stops with a warning if memory is short.
        """
        if self._is_paged and self._thread is None:
            self._thread = threading.Thread(target=self._populate_all, name="kv-memory", daemon=True)
            self._thread.start()

    def begin_epoch(self) -> None:
        """Prepares the memory for a new communicator of the ranks, whose steps do not read the old content: starts to
        pre-fault the pages.

        Unless all blocks are pre-faulted and none is retired, first returns the pages of all blocks to the kernel. The
        new epoch's scheduler takes blocks that are not pre-faulted for unused, but steps may have written them.
        """
        if self._is_paged and (self.num_populated < len(self.blocks) or self._retired.any()):
            self.close()
            self.num_populated, self._thread = 0, None
            self._stopping.clear()
            self._retired[:] = False
            _advise(self.blocks.data_ptr(), self.blocks.nbytes, mmap.MADV_DONTNEED)
        self.populate_in_background()

    def close(self) -> None:
        """Stops the thread that pre-faults. The memory is freed with the last tensor that refers to it."""
        self._stopping.set()
        if self._thread:
            self._thread.join()

    def retire(self, blocks: NDArray[np.integer]) -> None:
        """Returns the memory pages of these blocks to the kernel, on CPU (retires them). Call `reuse` before the blocks
        are written again.

        A page that a retired block shares with another block is kept.
        """
        if not self._is_paged or not len(blocks):
            return
        with self._lock:
            self._retired[blocks] = True
            is_new = np.zeros_like(self._retired)
            is_new[blocks] = True
            # Otherwise the kernel would fill the holes again, to make a huge page of the blocks around them.
            _advise(self.blocks.data_ptr(), self.blocks.nbytes, mmap.MADV_NOHUGEPAGE)
            for start, stop in _runs(self._retired):
                if not is_new[start:stop].any():
                    continue
                first_page = -(-self._address(start) // mmap.PAGESIZE) * mmap.PAGESIZE
                num_bytes = self._address(stop) // mmap.PAGESIZE * mmap.PAGESIZE - first_page
                if num_bytes > 0:
                    _advise(first_page, num_bytes, mmap.MADV_DONTNEED)
        return_free_heap()

    def reuse(self, blocks: NDArray[np.integer]) -> None:
        """Marks these blocks as in use again; the kernel allocates their pages at the first write."""
        if self._is_paged and len(blocks):
            with self._lock:
                self._retired[blocks] = False

    def _address(self, block: int) -> int:
        return self.blocks.data_ptr() + block * self.blocks.shape[1]

    def _populate_all(self) -> None:
        blocks_per_piece = max(1, PIECE_BYTES // self.blocks.shape[1])
        unchecked_bytes = CHECK_INTERVAL_BYTES
        for start in range(0, len(self.blocks), blocks_per_piece):
            if unchecked_bytes >= CHECK_INTERVAL_BYTES:
                unchecked_bytes = 0
                if available_memory() < MIN_AVAILABLE_BYTES:
                    megabytes = start * self.blocks.shape[1] >> 20, self.blocks.nbytes >> 20
                    text = "memory is short: pre-faulted only %d of %d MiB of this rank's KV cache; %s"
                    log.warning(text, *megabytes, "the rest takes memory when steps write it")
                    return
            started = time.perf_counter()
            if not self._populate(start, start + blocks_per_piece):
                log.warning(
                    "this kernel cannot populate (pre-fault) the KV cache: its blocks take memory as they are written"
                )
                return
            self.num_populated = min(start + blocks_per_piece, len(self.blocks))
            unchecked_bytes += blocks_per_piece * self.blocks.shape[1]
            if self._stopping.wait((time.perf_counter() - started) * (1 / POPULATE_SHARE - 1)):
                return
        log.info("KV cache: pre-faulted all %.1f MiB of this rank", self.blocks.nbytes / 2**20)

    def _populate(self, start: int, stop: int) -> bool:
        """Populates the blocks start … stop - 1 that are not retired. Returns False if the kernel cannot."""
        with self._lock:
            for first, last in _runs(~self._retired[start:stop]):
                address = self._address(start + first) // mmap.PAGESIZE * mmap.PAGESIZE
                if not _populate_pages(address, self._address(start + last) - address):
                    return False
        return True


def _runs(flags: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of each run of True."""
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _populate_pages(address: int, num_bytes: int) -> bool:
    """Makes the kernel allocate these pages as a write would, without writing. Returns False if it cannot."""
    error = _advise(address, num_bytes, MADV_POPULATE_WRITE)
    if error != errno.EINVAL:
        return error == 0
    # Before Linux 5.14: locking pages allocates them too. The limit of locked memory may be small.
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    step = num_bytes if limit == resource.RLIM_INFINITY else limit // 2 // mmap.PAGESIZE * mmap.PAGESIZE
    for offset in range(0, num_bytes if step else 0, step or 1):
        arguments = ctypes.c_void_p(address + offset), ctypes.c_size_t(min(step, num_bytes - offset))
        if _libc.mlock(*arguments):
            return False
        _libc.munlock(*arguments)
    return step > 0


def _advise(address: int, num_bytes: int, advice: int) -> int:
    """Calls madvise without the GIL. Returns the error number, 0 for success."""
    failed = _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_int(advice))
    return ctypes.get_errno() if failed else 0
