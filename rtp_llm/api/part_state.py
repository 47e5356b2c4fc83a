"""What this part knows of itself and the gang: the one truth behind /health, /metrics and /worker_status."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rtp_llm.api.client import EngineClient
from rtp_llm.machine.cgroup import Cgroup
from rtp_llm.machine.gpu_monitor import GpuMonitor
from rtp_llm.parallel import segment
from rtp_llm.parallel.part_spec import PartSpec

STATUS_STALE_SECONDS = 3.0  # the board is posted twice a second
PHASES = ("rendezvous", "loading", "warmup", "serving")
IDLE_LIMIT_SECONDS = 60.0  # a rank that got nowhere for so long is not healthy, whatever its heartbeat says


@dataclass(frozen=True)
class Health:
    """`ready` is what /health says; `detail` is for people, `phase` and `progress` (0 … 1) for probes."""

    ready: bool
    phase: str
    progress: float
    detail: str


class PartState:
    """Reads the gang board that the part's first rank posts, and the processes of the part."""

    def __init__(self, part_spec: PartSpec, client: EngineClient | None):
        """`client`: the connection to rank 0 on part 0, None on the other parts."""
        self.part_spec, self.client = part_spec, client
        self.draining = False  # asked to stop
        self.gpus = GpuMonitor(os.environ.get("CUDA_VISIBLE_DEVICES"))
        self._processes: dict[int, psutil.Process] = {}

    def gang_status(self) -> dict[str, Any]:
        """The gang's last known state, with `age`, seconds since it was posted; no ranks where it is stale or
        absent.
        """
        path = self.part_spec.gang_status_path
        try:
            age = time.time() - path.stat().st_mtime
            state: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return {"epoch": 0, "ranks": {}, "message": "the ranks are starting", "age": 0.0}
        if age > STATUS_STALE_SECONDS:
            state |= {"ranks": {}, "message": f"the ranks of this part have been silent for {age:.0f} s"}
        return state | {"age": age}

    def health(self) -> Health:
        """200 or 503, and why. Every rank of every part must be serving and have got somewhere lately."""
        if self.draining:
            return Health(False, "draining", 1.0, "the server is stopping: open requests end, new ones are refused")
        gang_status = self.gang_status()
        ranks: Mapping[str, Mapping[str, Any]] = gang_status["ranks"]
        expected = self.part_spec.plan.world_size
        if not ranks:
            return Health(False, "rendezvous", 0.0, gang_status.get("message") or "waiting for the ranks")
        phase = min((p["phase"] for p in ranks.values()), key=PHASES.index)
        if len(ranks) < expected:
            missing = [r for r in range(expected) if str(r) not in ranks]
            return Health(False, phase, 0.0, f"no heartbeat yet from ranks {missing}")
        if phase != "serving":
            progress = sum(p["progress"] if p["phase"] == phase else 1.0 for p in ranks.values()) / expected
            return Health(False, phase, progress, f"{phase}: {progress:.0%}")
        for rank, rank_status in ranks.items():
            if rank_status["silent_s"] > self.part_spec.config.heartbeat_timeout:
                return Health(
                    False, "failed", 1.0, f"no heartbeat from rank {rank} for {rank_status['silent_s']:.0f} s"
                )
            if rank_status["idle_s"] > IDLE_LIMIT_SECONDS:
                return Health(False, "failed", 1.0, f"rank {rank} got nowhere for {rank_status['idle_s']:.0f} s")
        if self.client is not None and not self.client.connected:
            return Health(False, "warmup", 1.0, "the API is connecting to rank 0")
        return Health(True, "serving", 1.0, "ok")

    def metrics_snapshot(self) -> dict[str, Any]:
        """What part_metrics.PartCollector reads."""
        health, gang_status = self.health(), self.gang_status()
        shm = os.statvfs(segment.DIRECTORY)
        seen = time.time() - gang_status["age"]
        return {
            "part": self.part_spec.plan.part,
            "ready": health.ready,
            "state": health.phase,
            "expected": self.part_spec.plan.world_size,
            "ranks": {r: p | {"seen": seen - p["silent_s"]} for r, p in gang_status["ranks"].items()},
            "processes": self._all_process_stats(gang_status["ranks"]),
            "guard": self._guard(),
            "doctor": self.doctor(),
            "cgroup": Cgroup.read(_read),
            "shm": {
                "size": shm.f_frsize * shm.f_blocks,
                "free": shm.f_frsize * shm.f_bavail,
                "orphan": segment.orphan_bytes(),
            },
            "gpus": self.gpus.snapshot,
        }

    def doctor(self) -> dict[str, Any] | None:
        """The doctor's last report (its schema: docs/doctor-schema.json); None where it has not run."""
        path = self.part_spec.doctor_report_path
        report: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return report

    @property
    def open_requests(self) -> int:
        """What the gang still computes, as rank 0 last said."""
        rank_status = self.gang_status()["ranks"].get("0")
        return int(rank_status["open"]) if rank_status else 0

    def _guard(self) -> dict[str, dict[str, int]]:
        """What the guard has recorded: restarts by "program reason", last exit codes by program."""
        path = self.part_spec.guard_record_path
        record: dict[str, dict[str, int]] = json.loads(path.read_text()) if path.exists() else {}
        return {"restarts": record.get("restarts", {}), "last_exit": record.get("last_exit", {})}

    def _all_process_stats(self, ranks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
        part = self.part_spec.plan.part
        pids = {f"rank{r}": int(p["pid"]) for r, p in ranks.items() if p["part"] == part} | self._helper_pids()
        gone: dict[str, dict[str, float]] = {f"rank{r}": {"up": 0.0} for r in self.part_spec.plan.ranks}
        return gone | {name: self._process_stats(pid) for name, pid in pids.items()}

    def _helper_pids(self) -> dict[str, int]:
        """Pids of what is not a rank. The guard's own is looked for, since nobody is told it."""
        pid = _read(str(self.part_spec.run_dir / "supervisord.pid"))
        if pid is None:
            return {"api": os.getpid()}
        found = {"api": os.getpid(), "supervisord": int(pid)}
        with suppress(psutil.Error):
            for child in psutil.Process(int(pid)).children():
                if "rtp_llm.supervise.guard" in child.cmdline():
                    found["guard"] = child.pid
        return found

    def _process_stats(self, pid: int) -> dict[str, float]:
        try:
            process = self._processes.setdefault(pid, psutil.Process(pid))
            with process.oneshot():
                times = process.cpu_times()
                return {
                    "up": 1.0,
                    "start_time": process.create_time(),
                    "rss": float(process.memory_info().rss),
                    "fds": float(process.num_fds()),
                    "max_fds": float(process.rlimit(psutil.RLIMIT_NOFILE)[0]),
                    "threads": float(process.num_threads()),
                    "cpu": times.user + times.system,
                }
        except psutil.Error:
            self._processes.pop(pid, None)
            return {"up": 0.0}


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None
