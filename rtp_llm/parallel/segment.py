"""The file in /dev/shm through which the ranks of one machine reduce on CPU: its size, its making, its lock.

Imports no torch, so that the doctor can tell before a start whether there is room for it, and afterwards whether a
file that lies there still belongs to anybody.
"""

import fcntl
import os
import platform
import re
from pathlib import Path

from rtp_llm.errors import CommunicationError

DIRECTORY = Path("/dev/shm")
SLOT_BYTES = 1 << 20
COUNTER_BYTES = 64  # one cache line each, so that a spinning reader does not slow a writer
NAME = re.compile(r"rtp-llm-[0-9a-f]{12}-[0-9a-f]{8}\Z")  # prefix of the part (Handover.shm_prefix), then random


def is_supported() -> bool:
    """Whether this processor keeps the order of stores that the counters rely on."""
    return platform.machine() in ("x86_64", "AMD64")


def segment_bytes(size: int) -> int:
    """Of the segment of `size` ranks."""
    return size * (COUNTER_BYTES + 2 * SLOT_BYTES)


def create_segment(prefix: str, name: str, size: int) -> tuple[Path, int]:
    """Makes the file, all of its pages reserved: a full /dev/shm is an error here and not a bus error later.

    Removes what an earlier epoch that was killed may have left under the same prefix. Returns its path and a
    descriptor that holds a lock: while anybody holds one, the file has an owner (see `abandoned`).
    Raises CommunicationError.
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
        need = segment_bytes(size) >> 20
        raise CommunicationError(f"{path}: cannot reserve {need} MiB: {error.strerror}; enlarge /dev/shm") from None
    return path, fd


def is_orphaned(path: Path) -> bool:
    """Whether no living process, in whatever namespace, holds this segment of ours. False where it cannot be known."""
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
    """Bytes of abandoned segments of ours, whichever part made them."""
    found = [path for path in DIRECTORY.glob("rtp-llm-*") if NAME.match(path.name) and is_orphaned(path)]
    return sum(path.stat().st_blocks * 512 for path in found if path.exists())
