"""Limits of the container, from cgroup v2 if it is mounted, otherwise v1 (kernel documentation,
admin-guide/cgroup-v2)."""

import re
from collections.abc import Callable
from dataclasses import dataclass

ROOT = "/sys/fs/cgroup"
UNLIMITED = 1 << 62
_NUMBER = re.compile(r"0*[1-9][0-9]*")
V1_UNLIMITED = 1 << 60  # v1 reports "no limit" as 2^63 rounded down to a page


@dataclass(frozen=True)
class Cgroup:
    """Limits and usage, in bytes and counts. None if the kernel has no such file, UNLIMITED if no limit is set."""

    version: int  # 1 or 2; 0: no cgroup file system is visible
    memory_max: int | None = None
    memory_current: int | None = None
    reclaimable: int = 0  # page cache within memory_current
    oom_kills: int | None = None
    pids_max: int | None = None
    pids_current: int | None = None
    cpus: float | None = None  # quota, in cores; None: no quota
    throttled: int = 0  # periods in which the quota was used up

    @property
    def available_memory(self) -> int:
        """Returns the bytes that the container may still use. Page cache counts as free: the kernel reclaims it."""
        if self.memory_max is None or self.memory_max >= UNLIMITED:
            return UNLIMITED
        return min(UNLIMITED, max(0, self.memory_max - (self.memory_current or 0) + self.reclaimable))

    @property
    def available_pids(self) -> int:
        if self.pids_max is None or self.pids_max >= UNLIMITED:
            return UNLIMITED
        return max(0, self.pids_max - (self.pids_current or 0))

    @classmethod
    def read(cls, read_text: Callable[[str], str | None]) -> "Cgroup":
        """Returns the limits of this process. `read_text` returns the text of a file, None if it cannot be read.

        Outside containers, the files are in the directory that /proc/self/cgroup names. In a container that directory
        may not exist; the files are then in the root of the cgroup mount.
        """
        paths = parse_proc_cgroup(read_text("/proc/self/cgroup") or "")
        if read_text(f"{ROOT}/cgroup.controllers") is not None:
            return _read_v2(lambda name: _read_first(read_text, ROOT, paths.get("", "/"), name))
        if any(read_text(f"{ROOT}/{c}") is not None for c in ("memory/memory.limit_in_bytes", "pids/cgroup.procs")):
            return _read_v1(
                lambda controller, name: _read_first(
                    read_text, f"{ROOT}/{controller}", paths.get(controller, "/"), name
                )
            )
        return cls(0)


def parse_proc_cgroup(text: str) -> dict[str, str]:
    """Parses /proc/<pid>/cgroup. Returns paths by controller; the unified hierarchy (v2) has the key ""."""
    paths: dict[str, str] = {}
    for line in text.splitlines():
        fields = line.split(":", 2)
        if len(fields) == 3:
            paths |= dict.fromkeys(fields[1].split(","), fields[2])
    return paths


def _read_first(read_text: Callable[[str], str | None], mount: str, path: str, name: str) -> str | None:
    """Returns the text of file `name` in cgroup directory `path` of `mount`, or else in the root of `mount`.

    Returns None if neither file can be read.
    """
    text = read_text(f"{mount}/{path.strip('/')}/{name}") if path.strip("/") else None
    return text if text is not None else read_text(f"{mount}/{name}")


def _read_v2(read: Callable[[str], str | None]) -> Cgroup:
    quota = (read("cpu.max") or "").split()
    cpus = int(quota[0]) / int(quota[1]) if len(quota) == 2 and all(map(_NUMBER.fullmatch, quota)) else None
    stat = _parse_table(read("memory.stat"))
    return Cgroup(
        version=2,
        memory_max=_parse_limit(read("memory.max")),
        memory_current=_parse_limit(read("memory.current")),
        reclaimable=stat.get("inactive_file", 0) + stat.get("active_file", 0),
        oom_kills=_parse_table(read("memory.events")).get("oom_kill"),
        pids_max=_parse_limit(read("pids.max")),
        pids_current=_parse_limit(read("pids.current")),
        cpus=cpus,
        throttled=_parse_table(read("cpu.stat")).get("nr_throttled", 0),
    )


def _read_v1(read: Callable[[str, str], str | None]) -> Cgroup:
    quota, period = _parse_limit(read("cpu", "cpu.cfs_quota_us")), _parse_limit(read("cpu", "cpu.cfs_period_us"))
    stat = _parse_table(read("memory", "memory.stat"))
    limit = _parse_limit(read("memory", "memory.limit_in_bytes"))
    return Cgroup(
        version=1,
        memory_max=UNLIMITED if limit is not None and limit >= V1_UNLIMITED else limit,
        memory_current=_parse_limit(read("memory", "memory.usage_in_bytes")),
        reclaimable=stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0),
        oom_kills=_parse_table(read("memory", "memory.oom_control")).get("oom_kill"),
        pids_max=_parse_limit(read("pids", "pids.max")),
        pids_current=_parse_limit(read("pids", "pids.current")),
        cpus=quota / period if quota and period and quota > 0 else None,
        throttled=_parse_table(read("cpu", "cpu.stat")).get("nr_throttled", 0),
    )


def _parse_limit(text: str | None) -> int | None:
    text = (text or "").strip()
    if text == "max":
        return UNLIMITED
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else None


def _parse_table(text: str | None) -> dict[str, int]:
    pairs = (line.split() for line in (text or "").splitlines())
    return {p[0]: int(p[1]) for p in pairs if len(p) == 2 and re.fullmatch(r"[0-9]+", p[1])}
