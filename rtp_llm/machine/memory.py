"""Memory of the machine, or of the container if that has less."""

import ctypes
from pathlib import Path

import psutil

from rtp_llm.machine.cgroup import Cgroup

_libc = ctypes.CDLL(None)


def available_memory() -> int:
    """Returns the bytes that can be allocated without swapping.

    Counts page cache (filled by reading the checkpoint) as available, because the kernel reclaims it on demand.
    """
    return min(int(psutil.virtual_memory().available), Cgroup.read(read_text).available_memory)


def return_free_heap() -> None:
    """Gives the heap memory that this process has freed back to the kernel, in a few milliseconds (`malloc_trim`).

    glibc keeps most of it otherwise. Does nothing with a C library without `malloc_trim`.
    """
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(ctypes.c_size_t(0))


def read_text(path: str) -> str | None:
    """Returns the text of a file of /proc or /sys, None if it cannot be read."""
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError):
        return None
