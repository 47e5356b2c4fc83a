"""The container's limits: cgroup v2 where it is mounted, else v1 (kernel documentation, admin-guide/cgroup-v2)."""

import re
from collections.abc import Callable
from dataclasses import dataclass

ROOT = "/sys/fs/cgroup"
UNLIMITED = 1 << 62
_NUMBER = re.compile(r"0*[1-9][0-9]*")
V1_UNLIMITED = 1 << 60  # v1 writes "no limit" as the largest multiple of a page


@dataclass(frozen=True)
class Cgroup:
    """Bytes and counts; None where the kernel does not say, UNLIMITED where there is no limit."""

    version: int  # 0: none can be seen
    memory_max: int | None = None
    memory_current: int | None = None
    reclaimable: int = 0  # page cache within memory_current
    oom_kills: int | None = None
    pids_max: int | None = None
    pids_current: int | None = None
    cpus: float | None = None  # cores that the quota leaves
    throttled: int = 0  # periods in which the quota was spent

    @property
    def available_memory(self) -> int:
        """Bytes of memory until the limit; the page cache counts as used, and is given up when asked for."""
        if self.memory_max is None or self.memory_max >= UNLIMITED:
            return UNLIMITED
        return min(UNLIMITED, max(0, self.memory_max - (self.memory_current or 0) + self.reclaimable))

    @property
    def available_pids(self) -> int:
        if self.pids_max is None or self.pids_max >= UNLIMITED:
            return UNLIMITED
        return max(0, self.pids_max - (self.pids_current or 0))

    @classmethod
    def read(cls, read: Callable[[str], str | None]) -> "Cgroup":
        """`read` gives the text of a file, None where it cannot. Inside a container the root shows its own limits;
        elsewhere they stand below the path that /proc/self/cgroup names."""
        own = parse_proc_cgroup(read("/proc/self/cgroup") or "")
        if read(f"{ROOT}/cgroup.controllers") is not None:
            return _v2(lambda name: _first(read, ROOT, own.get("", "/"), name))
        if any(read(f"{ROOT}/{c}") is not None for c in ("memory/memory.limit_in_bytes", "pids/cgroup.procs")):
            return _v1(lambda controller, name: _first(read, f"{ROOT}/{controller}", own.get(controller, "/"), name))
        return cls(0)


def parse_proc_cgroup(text: str) -> dict[str, str]:
    """Path by controller; the unified hierarchy (v2) is the controller ""."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            found |= dict.fromkeys(parts[1].split(","), parts[2])
    return found


def _first(read: Callable[[str], str | None], mount: str, path: str, name: str) -> str | None:
    own = read(f"{mount}/{path.strip('/')}/{name}") if path.strip("/") else None
    return own if own is not None else read(f"{mount}/{name}")


def _v2(read: Callable[[str], str | None]) -> Cgroup:
    quota = (read("cpu.max") or "").split()
    cpus = int(quota[0]) / int(quota[1]) if len(quota) == 2 and all(map(_NUMBER.fullmatch, quota)) else None
    stat = _table(read("memory.stat"))
    return Cgroup(
        version=2,
        memory_max=_limit(read("memory.max")),
        memory_current=_limit(read("memory.current")),
        reclaimable=stat.get("inactive_file", 0) + stat.get("active_file", 0),
        oom_kills=_table(read("memory.events")).get("oom_kill"),
        pids_max=_limit(read("pids.max")),
        pids_current=_limit(read("pids.current")),
        cpus=cpus,
        throttled=_table(read("cpu.stat")).get("nr_throttled", 0),
    )


def _v1(read: Callable[[str, str], str | None]) -> Cgroup:
    quota, period = _limit(read("cpu", "cpu.cfs_quota_us")), _limit(read("cpu", "cpu.cfs_period_us"))
    stat = _table(read("memory", "memory.stat"))
    limit = _limit(read("memory", "memory.limit_in_bytes"))
    return Cgroup(
        version=1,
        memory_max=UNLIMITED if limit is not None and limit >= V1_UNLIMITED else limit,
        memory_current=_limit(read("memory", "memory.usage_in_bytes")),
        reclaimable=stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0),
        oom_kills=_table(read("memory", "memory.oom_control")).get("oom_kill"),
        pids_max=_limit(read("pids", "pids.max")),
        pids_current=_limit(read("pids", "pids.current")),
        cpus=quota / period if quota and period and quota > 0 else None,
        throttled=_table(read("cpu", "cpu.stat")).get("nr_throttled", 0),
    )


def _limit(text: str | None) -> int | None:
    text = (text or "").strip()
    if text == "max":
        return UNLIMITED
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else None


def _table(text: str | None) -> dict[str, int]:
    pairs = (line.split() for line in (text or "").splitlines())
    return {p[0]: int(p[1]) for p in pairs if len(p) == 2 and re.fullmatch(r"[0-9]+", p[1])}
