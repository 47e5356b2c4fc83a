"""The shared-memory segment through which CPU ranks on one machine run collectives: a file in /dev/shm.

Rank 0 holds a lock (flock) on the file until all ranks have mapped it and it is deleted. A file without a lock is
orphaned: rank 0 was killed in between.

This module does not import torch, because the doctor uses it before a start, to check free space and to find orphaned
segments.
"""

import fcntl
import os
import platform
import re
from pathlib import Path

from rtp_llm.errors import CommunicationError
from rtp_llm.native.library import library

DIRECTORY = Path("/dev/shm")
SLOT_BYTES = 1 << 20
COUNTER_BYTES = 128  # two cache lines, which processors fetch together: ranks share none
NAME = re.compile(r"rtp-llm-[0-9a-f]{12}-[0-9a-f]{8}\Z")  # PartSpec.shm_prefix and a random suffix


def is_supported() -> bool:
    """Returns whether the CPU ranks of one machine can exchange tensors through a shared memory segment: with the
    native kernels, or on x86, which does not reorder stores.
    """
    return platform.machine() in ("x86_64", "AMD64") or library() is not None


def segment_bytes(size: int) -> int:
    """Returns the size of the shared-memory segment for `size` ranks, in bytes."""
    return size * (COUNTER_BYTES + 2 * SLOT_BYTES)


def create_segment(prefix: str, name: str, size: int) -> tuple[Path, int]:
    """Creates the file in /dev/shm through which the ranks of a machine exchange tensors, and allocates its memory, so
    that a full /dev/shm is an error here instead of SIGBUS later.

    First removes all files with this prefix, which only this part uses: killed ranks may have left them. Returns the
    path and a file descriptor that holds a shared lock on the file; `is_orphaned` tests for this lock. Raises
    CommunicationError.
    """
    for stale in DIRECTORY.glob(f"{prefix}*"):
        stale.unlink(missing_ok=True)
    path = DIRECTORY / f"{prefix}{name}"
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        try:
            os.posix_fallocate(fd, 0, segment_bytes(size))
        except OSError:
            os.close(fd)
            raise
    except OSError as error:
        path.unlink(missing_ok=True)
        mib = segment_bytes(size) >> 20
        raise CommunicationError(f"{path}: cannot reserve {mib} MiB: {error.strerror}; enlarge /dev/shm") from None
    return path, fd


def is_orphaned(path: Path) -> bool:
    """Returns True if no process in any namespace holds a lock on this file; False if it cannot be opened."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def orphan_bytes() -> int:
    """Returns the bytes of memory that segments of killed servers, of any part, still use in /dev/shm."""
    orphans = [path for path in DIRECTORY.glob("rtp-llm-*") if NAME.match(path.name) and is_orphaned(path)]
    return sum(path.stat().st_blocks * 512 for path in orphans if path.exists())
