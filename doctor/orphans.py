"""Finds orphaned shared memory files in /dev/shm, and removes those that are provably this server's.

A file is orphaned if no process uses it any more, for example because its ranks were killed. It is also provably this
server's if it has the name of a segment (the file through which CPU ranks run collectives), belongs to this user, is
older than MIN_AGE_SECONDS, and no process holds its lock. The lock shows users in other namespaces too (see
rtp_llm/parallel/segment.py).
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from stat import S_ISREG

from doctor.host import Host
from rtp_llm.parallel import segment

SHM = "/dev/shm"
# Prefixes of the files that NCCL, torch, Python, CUDA and LLM servers create.
KNOWN = re.compile(r"(nccl-|psm_|torch_|sem\.|sglang|vllm|cuda\.shm\.|rtp-llm-)")
MIN_AGE_SECONDS = 10.0  # a rank may be interrupted between creating a file and locking it


@dataclass(frozen=True)
class Orphan:
    """A file in /dev/shm that no process uses. `name`: without the folder. `ours`: this server provably created the
    file, so the doctor may delete it.
    """

    name: str
    bytes: int
    ours: bool


@dataclass(frozen=True)
class OrphanScan:
    """The result of a search for orphaned files in /dev/shm. `files`: the orphaned ones. `candidates`: number of files
    whose name shows that NCCL, torch, CUDA or an LLM server created them. `unreadable`: number of processes that this
    user cannot inspect, so that files that they use cannot be told from orphaned ones."""

    files: tuple[Orphan, ...]
    candidates: int
    unreadable: int

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def find_orphans(host: Host) -> OrphanScan:
    """Returns the files in /dev/shm that no process uses, among those whose name shows that NCCL, torch, CUDA or an LLM
    server created them. Omits files that were written within the last MIN_AGE_SECONDS.

    If this user cannot inspect some processes, only files that are provably this server's count as orphaned.
    """
    names = [name for name in host.list_dir(SHM) if KNOWN.match(name)]
    if not names:
        return OrphanScan((), 0, 0)
    used, unreadable = _in_use(host, names)
    orphans = []
    for name in names:
        path = host.path(f"{SHM}/{name}")
        try:
            stat = path.lstat()
        except FileNotFoundError:
            continue
        if name in used or not S_ISREG(stat.st_mode) or time.time() - stat.st_mtime < MIN_AGE_SECONDS:
            continue
        ours = bool(segment.NAME.match(name)) and stat.st_uid == host.uid and segment.is_orphaned(path)
        if ours or not unreadable:
            orphans.append(Orphan(name, stat.st_blocks * 512, ours))
    return OrphanScan(tuple(orphans), len(names), unreadable)


def remove_orphans(host: Host) -> list[Orphan]:
    """Deletes the orphaned files in /dev/shm that this server provably created, and returns them."""
    removed = []
    for orphan in find_orphans(host).files:
        path = host.path(f"{SHM}/{orphan.name}")
        if orphan.ours and segment.is_orphaned(path):
            path.unlink(missing_ok=True)
            removed.append(orphan)
    return removed


def _in_use(host: Host, names: Sequence[str]) -> tuple[set[str], int]:
    """Returns the names of the files that processes have mapped or open, and how many cannot be inspected."""
    used: set[str] = set()
    unreadable = 0
    for pid in (n for n in host.list_dir("/proc") if n.isdigit()):
        maps = host.read(f"/proc/{pid}/maps")
        if maps is None:
            unreadable += host.exists(f"/proc/{pid}")
            continue
        text = maps + "\n".join(_links(host, f"/proc/{pid}/fd"))
        used |= {name for name in names if f"{SHM}/{name}" in text}
    return used, unreadable


def _links(host: Host, folder: str) -> list[str]:
    targets = []
    for name in host.list_dir(folder):
        try:
            targets.append(str(host.path(f"{folder}/{name}").readlink()))
        except OSError:  # closed in the meantime
            continue
    return targets
