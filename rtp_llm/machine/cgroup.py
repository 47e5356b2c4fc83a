"""Limits of the container, from cgroup v2 or, if it is not mounted, v1 (kernel's admin-guide/cgroup-v2)."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

ROOT = "/sys/fs/cgroup"
UNLIMITED = 1 << 62
_NUMBER = re.compile(r"0*[1-9][0-9]*")
V1_UNLIMITED = 1 << 60  # v1 reports "no limit" as 2^63 rounded down to a page


@dataclass(frozen=True)
class Cgroup:
    """A container's limits of memory (bytes), pids (number of processes and threads) and CPU, and what it uses of them.

    A value is None if the kernel has no such file; a limit is UNLIMITED if none is set.
    """

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
        """Returns the bytes that the container may still use, UNLIMITED without a limit. Page cache counts as free,
        because the kernel reclaims it.
        """
        return max(0, _Usage(self.memory_max, self.memory_current, self.reclaimable).room)

    @property
    def available_pids(self) -> int:
        return max(0, _Usage(self.pids_max, self.pids_current).room)

    @classmethod
    def read(cls, read_text: Callable[[str], str | None]) -> "Cgroup":
        """Returns the limits of this process. `read_text` returns the text of a file, None if it cannot be read.

        The limits of all parent cgroups apply too. So for memory and pids, returns limit and usage of the cgroup that
        has the least left. The innermost cgroup is the directory that /proc/self/cgroup names. In a container, that
        directory may not exist; the container's limits are then in the root of the cgroup mount.
        """
        paths = parse_proc_cgroup(read_text("/proc/self/cgroup") or "")
        if read_text(f"{ROOT}/cgroup.controllers") is not None:
            return _read(2, *[_Levels(read_text, ROOT, paths.get("", "/"))] * 3)
        if any(read_text(f"{ROOT}/{c}") is not None for c in ("memory/memory.limit_in_bytes", "pids/cgroup.procs")):
            return _read(1, *(_Levels(read_text, f"{ROOT}/{c}", paths.get(c, "/")) for c in ("memory", "pids", "cpu")))
        return cls(0)


class _Levels:
    """The directories of a cgroup and its ancestors, innermost first. Those that this process cannot see are empty."""

    def __init__(self, read_text: Callable[[str], str | None], mount: str, path: str):
        parts = [part for part in path.split("/") if part]
        if ".." in parts:  # the cgroup is outside the namespace of this mount
            parts = []
        self._read_text = read_text
        self._directories = ["/".join((mount, *parts[:depth])) for depth in range(len(parts), -1, -1)]

    def texts(self, *names: str) -> list[list[str | None]]:
        """Returns the contents of these cgroup files at each level, from the innermost cgroup to the root."""
        return [[self._read_text(f"{directory}/{name}") for name in names] for directory in self._directories]

    def first(self, name: str) -> str | None:
        """Returns the content of a cgroup file at the innermost level that has it."""
        return next((text for (text,) in self.texts(name) if text is not None), None)


@dataclass(frozen=True)
class _Usage:
    """A limit and its current usage, at one level."""

    limit: int | None
    current: int | None
    reclaimable: int = 0

    @property
    def room(self) -> int:
        if self.limit is None or self.limit >= UNLIMITED:
            return UNLIMITED
        return min(UNLIMITED, self.limit - (self.current or 0) + self.reclaimable)


def _tightest(usages: Iterable[_Usage]) -> _Usage:
    """Returns the usage at the level with the least left; if no level has a limit, at the innermost one."""
    limited = [usage for usage in usages if usage.limit is not None]
    return min(limited, key=lambda usage: usage.room, default=_Usage(None, None))


def parse_proc_cgroup(text: str) -> dict[str, str]:
    """Parses /proc/<pid>/cgroup. Returns paths by controller; the unified hierarchy (v2) has the key ""."""
    paths: dict[str, str] = {}
    for line in text.splitlines():
        fields = line.split(":", 2)
        if len(fields) == 3:
            paths |= dict.fromkeys(fields[1].split(","), fields[2])
    return paths


# By version: files with limit, usage and statistics of memory, the file with OOM kills, files with the CPU quota.
_MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
    2: ("memory.max", "memory.current", "memory.stat"),
}
_OOM_FILE = {1: "memory.oom_control", 2: "memory.events"}
_QUOTA_FILES = {1: ("cpu.cfs_quota_us", "cpu.cfs_period_us"), 2: ("cpu.max",)}


def _read(version: int, memory_levels: _Levels, pids_levels: _Levels, cpu_levels: _Levels) -> Cgroup:
    memory = _tightest(
        _Usage(_parse_limit(limit), _parse_limit(current), _file_bytes(stat, "total_" if version == 1 else ""))
        for limit, current, stat in memory_levels.texts(*_MEMORY_FILES[version])
    )
    pids = _tightest(
        _Usage(_parse_limit(limit), _parse_limit(current))
        for limit, current in pids_levels.texts("pids.max", "pids.current")
    )
    quotas = cpu_levels.texts(*_QUOTA_FILES[version])
    return Cgroup(
        version=version,
        memory_max=memory.limit,
        memory_current=memory.current,
        reclaimable=memory.reclaimable,
        oom_kills=_parse_table(memory_levels.first(_OOM_FILE[version])).get("oom_kill"),
        pids_max=pids.limit,
        pids_current=pids.current,
        cpus=_smallest_quota(" ".join(text or "" for text in texts).split() for texts in quotas),
        throttled=_parse_table(cpu_levels.first("cpu.stat")).get("nr_throttled", 0),
    )


def _smallest_quota(quotas: Iterable[Sequence[str]]) -> float | None:
    """Returns the cores of the smallest (quota, period) in microseconds; None if no level has a quota."""
    numbers = (quota for quota in quotas if len(quota) == 2 and all(map(_NUMBER.fullmatch, quota)))
    return min((int(quota) / int(period) for quota, period in numbers), default=None)


def _file_bytes(stat: str | None, prefix: str = "") -> int:
    """Returns the bytes of page cache in the text of memory.stat. Files in memory (tmpfs) are not among them."""
    table = _parse_table(stat)
    return table.get(f"{prefix}inactive_file", 0) + table.get(f"{prefix}active_file", 0)


def _parse_limit(text: str | None) -> int | None:
    text = (text or "").strip()
    limit = UNLIMITED if text == "max" else int(text) if re.fullmatch(r"-?[0-9]+", text) else None
    return UNLIMITED if limit is not None and limit >= V1_UNLIMITED else limit


def _parse_table(text: str | None) -> dict[str, int]:
    pairs = (line.split() for line in (text or "").splitlines())
    return {p[0]: int(p[1]) for p in pairs if len(p) == 2 and re.fullmatch(r"[0-9]+", p[1])}
