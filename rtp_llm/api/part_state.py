"""State of this part and of the gang, for /health, /metrics and /worker_status."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from rtp_llm.api.client import EngineClient
from rtp_llm.machine.cgroup import Cgroup
from rtp_llm.machine.gpu_monitor import GpuMonitor
from rtp_llm.machine.memory import read_text
from rtp_llm.parallel import segment
from rtp_llm.parallel.part_spec import PartSpec

STATUS_STALE_SECONDS = 2.0  # the status file is written twice a second
HEARTBEAT_STALE_SECONDS = 2.0  # of a rank; after HEARTBEAT_TIMEOUT it is lost
PROGRAMS = {  # by module: processes besides ranks and API
    "rtp_llm.supervise.guard": "guard",
    "rtp_llm.parallel.coordinator": "coordinator",
    "rtp_llm.engine.main": "spare",
}
PHASES = ("rendezvous", "loading", "warmup", "serving")


@dataclass(frozen=True)
class Health:
    """The content of /health. `phase`: what the server does, such as "loading" or "serving"; `progress`: how much of
    this phase is done, 0 to 1; `detail`: the reason in words, for humans.
    """

    is_ready: bool
    phase: str
    progress: float
    detail: str


class PartState:
    """Reads the state of this part's processes, and the gang status (all ranks of all parts) from the guard's file."""

    def __init__(self, part_spec: PartSpec, client: EngineClient | None):
        """`client`: the connection to rank 0 on part 0, None on the other parts."""
        self.part_spec, self.client = part_spec, client
        self.is_draining = False
        self.gpus = GpuMonitor(os.environ.get("CUDA_VISIBLE_DEVICES"))
        self._processes: dict[int, psutil.Process] = {}
        self._status_written_at, self._status_seen_at = 0, 0.0

    def gang_status(self) -> dict[str, Any]:
        """Returns the gang status (state of all ranks) that the guard, the process that watches this part's others,
        wrote last, and its `age` in seconds. It has no ranks if the file is missing or stale.
        """
        path = self.part_spec.gang_status_path
        try:
            age = self._status_age(path.stat().st_mtime_ns)
            status: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return {"epoch": 0, "in_epoch": False, "ranks": {}, "message": "the ranks are starting", "age": 0.0}
        if age > STATUS_STALE_SECONDS:
            message = f"the guard of this part has written no status of the ranks for {age:.0f} s"
            status |= {"in_epoch": False, "ranks": {}, "message": message}
        return status | {"age": age}

    def _status_age(self, written_at: int) -> float:
        """Returns the seconds since this process first saw the status file's current mtime. The clock may change."""
        if written_at != self._status_written_at:
            self._status_written_at, self._status_seen_at = written_at, time.monotonic()
        return time.monotonic() - self._status_seen_at

    def health(self) -> Health:
        """Returns the health of the gang. It is ready if all ranks of all parts serve and made progress recently."""
        if self.is_draining:
            detail = "the server is stopping: open requests finish, new ones are rejected"
            return Health(False, "draining", 1.0, detail)
        gang_status = self.gang_status()
        ranks: Mapping[str, Mapping[str, Any]] = gang_status["ranks"]
        expected = self.part_spec.plan.world_size
        forming = "recovering" if gang_status["epoch"] > 0 else "rendezvous"
        if not ranks or not gang_status["in_epoch"]:
            waiting = [gang_status["message"] or "waiting for the ranks", *self._disagreements()]
            return Health(False, forming, 0.0, "; ".join(waiting))
        phase = min((r["phase"] for r in ranks.values()), key=PHASES.index)
        if len(ranks) < expected:
            missing = [r for r in range(expected) if str(r) not in ranks]
            return Health(False, phase, 0.0, f"no heartbeat yet from ranks {missing}")
        if phase != "serving":
            progress = sum(r["progress"] if r["phase"] == phase else 1.0 for r in ranks.values()) / expected
            return Health(False, phase, progress, f"{phase}: {progress:.0%}")
        for rank, rank_status in ranks.items():
            silent_seconds = rank_status["silent_s"]
            if silent_seconds > HEARTBEAT_STALE_SECONDS:
                return Health(False, "failed", 1.0, f"no heartbeat from rank {rank} for {silent_seconds:.0f} s")
            if rank_status["lacks_memory"]:
                megabytes = rank_status["available_bytes"] >> 20
                detail = f"rank {rank} waits for memory: its machine or container has {megabytes} MiB left"
                return Health(False, "out_of_memory", 1.0, detail)
            idle_seconds = rank_status["idle_s"]
            if rank_status["stands_still"] or idle_seconds > self.part_spec.config.hang_seconds:
                return Health(False, "failed", 1.0, f"rank {rank} made no progress for {idle_seconds:.0f} s")
        if self.client is not None and not self.client.is_connected:
            return Health(False, "warmup", 1.0, "the API is connecting to rank 0")
        return Health(True, "serving", 1.0, "ok")

    def metrics_snapshot(self) -> dict[str, Any]:
        """Returns the current values from which `part_metrics.PartCollector` makes the metrics: health, ranks,
        processes, restarts, the doctor's report, cgroup, /dev/shm and GPUs, each under a key of its own.
        """
        health, gang_status = self.health(), self.gang_status()
        shm = os.statvfs(segment.DIRECTORY)
        status_time = time.time() - gang_status["age"]
        return {
            "part": self.part_spec.plan.part,
            "ready": health.is_ready,
            "state": health.phase,
            "expected": self.part_spec.plan.world_size,
            "ranks": {
                rank: rank_status | {"last_seen": status_time - rank_status["silent_s"]}
                for rank, rank_status in gang_status["ranks"].items()
            },
            "processes": self._all_process_stats(gang_status["ranks"]),
            "guard": self._guard_record(),
            "doctor": self.doctor_report(),
            "cgroup": Cgroup.read(read_text),
            "shm": {
                "size": shm.f_frsize * shm.f_blocks,
                "free": shm.f_frsize * shm.f_bavail,
                "orphan": segment.orphan_bytes(),
            },
            "gpus": self.gpus.snapshot,
        }

    def doctor_report(self) -> dict[str, Any] | None:
        """Returns the last report of the doctor (docs/doctor-schema.json); None if it has not run."""
        path = self.part_spec.doctor_report_path
        report: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return report

    def _disagreements(self) -> list[str]:
        """Returns the differences that the doctors found between the parts, and why a part gave up."""
        checks = (self.doctor_report() or {}).get("checks", [])
        return [f"{c['id']} {c['actual']}" for c in checks if c["id"].startswith("C-") and c["status"] == "error"]

    @property
    def num_open_requests(self) -> int:
        """Returns the number of requests that rank 0 has not finished, from its last heartbeat."""
        rank_status = self.gang_status()["ranks"].get("0")
        return int(rank_status["open"]) if rank_status else 0

    def _guard_record(self) -> dict[str, dict[str, int]]:
        """Returns guard.json, in which the guard (the process that restarts failed processes) counts restarts.

        Its content is {"restarts": {"program reason": count}, "last_exit": {program: exit code}}.
        """
        path = self.part_spec.guard_record_path
        record: dict[str, dict[str, int]] = json.loads(path.read_text()) if path.exists() else {}
        return {"restarts": record.get("restarts", {}), "last_exit": record.get("last_exit", {})}

    def _all_process_stats(self, ranks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
        part = self.part_spec.plan.part
        rank_pids = {f"rank{rank}": int(status["pid"]) for rank, status in ranks.items() if status["part"] == part}
        pids = {name: pid for name, pid in self._helper_pids().items() if pid not in rank_pids.values()} | rank_pids
        missing: dict[str, dict[str, float]] = {f"rank{rank}": {"up": 0.0} for rank in self.part_spec.plan.ranks}
        return missing | {name: self._process_stats(pid) for name, pid in pids.items()}

    def _helper_pids(self) -> dict[str, int]:
        """Returns {program: pid} of the part's processes that are not ranks.

        Finds them by their command lines, since they write no pid files. A spare is a worker that is no rank.
        """
        pid = read_text(str(self.part_spec.run_dir / "supervisord.pid"))
        if pid is None:
            return {"api": os.getpid()}
        pids = {"api": os.getpid(), "supervisord": int(pid)}
        with suppress(psutil.Error):
            for child in psutil.Process(int(pid)).children():
                name = next((PROGRAMS[a] for a in child.cmdline() if a in PROGRAMS), "")
                if name:
                    pids[name] = child.pid
        return pids

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
