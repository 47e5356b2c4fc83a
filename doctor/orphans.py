"""Files in /dev/shm that nobody uses any more, and the removal of those that are provably this server's.

Provably: the name is one that this server makes, the file belongs to this user, it is not new, no process here has it
mapped or open, and its lock can be had, which no living rank in any namespace would let go (see parallel/segment.py).
"""

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from stat import S_ISREG

from doctor.host import Host
from rtp_llm.parallel import segment

SHM = "/dev/shm"
KNOWN = re.compile(r"(nccl-|psm_|torch_|sem\.|sglang|vllm|cuda\.shm\.|rtp-llm-)")
MIN_AGE_SECONDS = 10.0  # between making a file and locking it a rank may be interrupted


@dataclass(frozen=True)
class Orphan:
    """`ours`: provably this server's, and so removable."""

    name: str
    bytes: int
    ours: bool


@dataclass(frozen=True)
class OrphanScan:
    """`candidates`: files of a kind that gets left behind; `unreadable`: processes that may not be looked into."""

    files: tuple[Orphan, ...]
    candidates: int
    unreadable: int

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def find_orphans(host: Host) -> OrphanScan:
    """What lies in /dev/shm and is in nobody's hands. Where processes cannot be looked into, only what is ours by its
    lock is called an orphan."""
    names = [name for name in host.list_dir(SHM) if KNOWN.match(name)]
    if not names:
        return OrphanScan((), 0, 0)
    used, unreadable = _in_use(host, names)
    found = []
    for name in names:
        path = host.path(f"{SHM}/{name}")
        try:
            seen = path.lstat()
        except FileNotFoundError:
            continue
        if name in used or not S_ISREG(seen.st_mode) or time.time() - seen.st_mtime < MIN_AGE_SECONDS:
            continue
        ours = bool(segment.NAME.match(name)) and seen.st_uid == host.uid and segment.is_orphaned(path)
        if ours or not unreadable:
            found.append(Orphan(name, seen.st_blocks * 512, ours))
    return OrphanScan(tuple(found), len(names), unreadable)


def remove_orphans(host: Host) -> list[Orphan]:
    """Unlinks those that are provably ours; returns them."""
    removed = []
    for orphan in find_orphans(host).files:
        path = host.path(f"{SHM}/{orphan.name}")
        if orphan.ours and segment.is_orphaned(path):
            path.unlink(missing_ok=True)
            removed.append(orphan)
    return removed


def _in_use(host: Host, names: Iterable[str]) -> tuple[set[str], int]:
    """Those of the names that a process has mapped or open, and how many processes could not be asked."""
    wanted = set(names)
    used: set[str] = set()
    unreadable = 0
    for pid in (n for n in host.list_dir("/proc") if n.isdigit()):
        maps = host.read(f"/proc/{pid}/maps")
        if maps is None:
            unreadable += host.exists(f"/proc/{pid}")
            continue
        text = maps + "\n".join(_links(host, f"/proc/{pid}/fd"))
        used |= {name for name in wanted if f"{SHM}/{name}" in text}
    return used, unreadable


def _links(host: Host, folder: str) -> list[str]:
    found = []
    for name in host.list_dir(folder):
        try:
            found.append(str(host.path(f"{folder}/{name}").readlink()))
        except OSError:  # closed meanwhile
            continue
    return found
