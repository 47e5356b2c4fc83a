"""Metrics read at scrape time from what the part knows of the gang, its processes, its container, its GPUs, its doctor.

A new one is a line in the function of its subject.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rtp_llm.api.part_state import PartState
from rtp_llm.api.vllm_aliases import VllmMetricAliases
from rtp_llm.config import Config
from rtp_llm.machine.cgroup import UNLIMITED, Cgroup
from rtp_llm.machine.gpu_monitor import GpuSnapshot
from rtp_llm.metrics import Metrics

STATES = ("rendezvous", "loading", "warmup", "serving", "draining", "failed")
USUAL_REASONS = ("signal", "rank_crashed", "communication", "hang")  # see supervise/guard.py
# How the doctor's findings are written as numbers.
DOCTOR_STATUS = {"skip": -1, "ok": 0, "warn": 1, "error": 2, "unknown": 3, "crash": 3}

Samples = list[tuple[dict[str, str], float | None]]
JsonObject = Mapping[str, Any]


def register(metrics: Metrics, state: PartState, config: Config) -> None:
    """Adds what is read at scrape time to the registry of the part."""
    metrics.registry.register(PartCollector(state.metrics_snapshot))
    if config.metrics_vllm_aliases:
        metrics.registry.register(VllmMetricAliases(metrics.registry))


class PartCollector(Collector):
    """`read` returns {"part", "ready", "state", "expected": ranks, "ranks": {rank: pulse}, "processes": {program:
    numbers}, "guard", "cgroup", "shm": {size, free, orphan}, "gpus", "doctor"}; see `PartState.for_metrics`.
    """

    def __init__(self, read: Callable[[], dict[str, Any]]):
        self._read = read

    def collect(self) -> Iterable[Metric]:
        state = self._read()
        part = {"part": str(state["part"])}
        yield _gauge("ready", "1 while requests are served; the same truth as /health", [({}, float(state["ready"]))])
        yield _gauge("live", "1: this process answers", [({}, 1.0)])
        phases: Samples = [({"state": s}, float(s == state["state"])) for s in STATES]
        yield _gauge("state", "1 on the current state", phases)
        yield _gauge("gang_members_expected", "Ranks of all parts", [({}, float(state["expected"]))])
        yield from _rank_metrics(state["ranks"], state["expected"])
        yield from _process_metrics(state["processes"])
        yield from _guard_metrics(state["guard"], state["processes"])
        yield from _shm_metrics(state["shm"], part)
        yield from _cgroup_metrics(state["cgroup"], part)
        yield from _gpu_metrics(state["gpus"], part, state["ranks"])
        if state["doctor"]:
            yield from _doctor_metrics(state["doctor"], part)


def _rank_metrics(ranks: Mapping[str, JsonObject], expected: int) -> Iterable[Metric]:
    def each(value: Callable[[JsonObject], float | None]) -> Samples:
        return [
            ({"rank": rank, "part": str(rank_status["part"])}, value(rank_status))
            for rank, rank_status in sorted(ranks.items())
        ]

    up: Samples = [({"world_rank": str(r)}, float(str(r) in ranks)) for r in range(expected)]
    yield _gauge("gang_member_up", "1 while the rank sends heartbeats", up)
    yield _gauge("gang_heartbeat_age_seconds", "Since the rank's last heartbeat", each(lambda p: p["silent_s"]))
    yield _gauge("rank_idle_seconds", "Since the rank's main thread last got anywhere", each(lambda p: p["idle_s"]))
    yield _gauge("rank_steps", "Steps the rank has computed in this epoch", each(lambda p: p["steps"]))
    yield _gauge(
        "last_step_timestamp_seconds", "When the rank last got anywhere", each(lambda p: p["seen"] - p["idle_s"])
    )
    longest = max((p["wait_s"] for p in ranks.values() if p["wait_s"] is not None), default=0.0)
    yield _gauge(
        "rank_lag_seconds",
        "How much later than the first rank it comes to the sums of a step; not measured over NCCL",
        each(lambda p: None if p["wait_s"] is None else longest - p["wait_s"]),
    )
    yield _gauge("weight_memory_bytes", "Weights read by the rank", each(lambda p: p["weight_bytes"]))
    yield _gauge("kv_cache_memory_bytes", "KV cache of the rank", each(lambda p: p["kv_bytes"]))
    startup: Samples = [
        ({"rank": rank, "phase": phase}, seconds)
        for rank, rank_status in sorted(ranks.items())
        for phase, seconds in rank_status["startup_seconds"].items()
    ]
    yield _gauge("startup_seconds", "Duration of each phase of the start", startup)


def _process_metrics(processes: Mapping[str, JsonObject]) -> Iterable[Metric]:
    def each(key: str) -> Samples:
        return [
            ({"program": name, "rank": name.removeprefix("rank") if name.startswith("rank") else ""}, numbers.get(key))
            for name, numbers in sorted(processes.items())
        ]

    yield _gauge("process_up", "1 while the process runs", each("up"))
    yield _gauge("process_start_time_seconds", "When the process started", each("start_time"))
    yield _gauge("process_resident_memory_bytes", "Resident memory", each("rss"))
    yield _gauge("process_open_fds", "Open files", each("fds"))
    yield _gauge("process_max_fds", "Files that may be open", each("max_fds"))
    yield _gauge("process_threads", "Threads", each("threads"))
    yield _counter("process_cpu_seconds", "CPU time", each("cpu"))


def _guard_metrics(guard: Mapping[str, Mapping[str, int]], programs: Iterable[str]) -> Iterable[Metric]:
    """A series that begins at 1 has no increase for Prometheus: those of the usual reasons begin at 0."""
    counts = {(name, reason): 0 for name in programs for reason in USUAL_REASONS}
    counts |= {(key.split(" ")[0], key.split(" ")[1]): count for key, count in guard["restarts"].items()}
    restarts: Samples = [({"program": name, "reason": why}, count) for (name, why), count in sorted(counts.items())]
    yield _counter("process_restarts", "Restarts by the guard, by what the process had ended with", restarts)
    exits: Samples = [({"program": program}, float(code)) for program, code in sorted(guard["last_exit"].items())]
    yield _gauge("process_last_exit_code", "What the process last ended with; -1: a signal", exits)


def _shm_metrics(shm: Mapping[str, float], part: dict[str, str]) -> Iterable[Metric]:
    yield _gauge("shm_size_bytes", "Size of /dev/shm", [(part, shm["size"])])
    yield _gauge("shm_free_bytes", "Free bytes of /dev/shm", [(part, shm["free"])])
    yield _gauge("shm_orphan_bytes", "This server's segments there that nobody holds any more", [(part, shm["orphan"])])


def _cgroup_metrics(cgroup: Cgroup, part: dict[str, str]) -> Iterable[Metric]:
    """A limit that there is not has no sample."""

    def limit(value: int | None) -> Samples:
        return [(part, None if value is None or value >= UNLIMITED else float(value))]

    yield _gauge("cgroup_memory_usage_bytes", "Memory in use, page cache included", limit(cgroup.memory_current))
    yield _gauge("cgroup_memory_limit_bytes", "Memory that the container may use", limit(cgroup.memory_max))
    yield _gauge("cgroup_pids_current", "Processes and threads of the container", limit(cgroup.pids_current))
    yield _gauge("cgroup_pids_max", "Processes and threads that it may have", limit(cgroup.pids_max))
    yield _counter("cgroup_oom_kills", "Processes that the kernel killed for memory", limit(cgroup.oom_kills))
    yield _counter("cgroup_cpu_throttled_periods", "Periods in which the CPU quota was spent", limit(cgroup.throttled))


def _gpu_metrics(seen: GpuSnapshot, part: dict[str, str], ranks: Mapping[str, JsonObject]) -> Iterable[Metric]:
    """NVML's readings, those that the GPU has; in the help, what dcgm-exporter calls them. Ranks take the visible GPUs
    in order."""
    own = sorted((int(r) for r, rank_status in ranks.items() if str(rank_status["part"]) == part["part"]))
    places = {gpu.index: str(rank) for rank, gpu in zip(own, seen.gpus.visible, strict=False)}

    def each(value: Callable[[Any], float | None]) -> Samples:
        return [(_names(gpu, places, part), value(gpu)) for gpu in seen.gpus.all]

    def labelled(name: str, values: Callable[[Any], Mapping[str, float | None]]) -> Samples:
        return [
            (_names(gpu, places, part) | {name: key}, value)
            for gpu in seen.gpus.all
            for key, value in values(gpu).items()
        ]

    up: Samples = [({"gpu": str(gpu.index)} | part, 1.0) for gpu in seen.gpus.all]
    up += [({"gpu": str(index)} | part, 0.0) for index, _ in seen.gpus.failed]
    yield _gauge("gpu_up", "1 while the GPU answers", up)
    yield _gauge("gpu_read_timestamp_seconds", "When NVML last answered", [(part, seen.read_at or None)])
    yield _gauge("gpu_utilization_ratio", "DCGM_FI_DEV_GPU_UTIL", each(lambda g: g.utilization))
    yield _gauge(
        "gpu_memory_used_bytes",
        "DCGM_FI_DEV_FB_USED and reserved",
        each(lambda g: g.memory_total - g.memory_free),
    )
    yield _gauge("gpu_memory_free_bytes", "DCGM_FI_DEV_FB_FREE", each(lambda g: g.memory_free))
    yield _gauge("gpu_memory_total_bytes", "All of the GPU's memory", each(lambda g: g.memory_total))
    yield _gauge("gpu_temperature_celsius", "DCGM_FI_DEV_GPU_TEMP", each(lambda g: g.temperature))
    yield _gauge("gpu_memory_temperature_celsius", "DCGM_FI_DEV_MEMORY_TEMP", each(lambda g: g.memory_temperature))
    yield _gauge("gpu_power_watts", "DCGM_FI_DEV_POWER_USAGE", each(lambda g: g.power))
    yield _counter("gpu_energy_joules", "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", each(lambda g: g.energy))
    yield _gauge(
        "gpu_clock_hertz", "DCGM_FI_DEV_SM_CLOCK, DCGM_FI_DEV_MEM_CLOCK", labelled("domain", lambda g: g.clocks)
    )
    yield _gauge(
        "gpu_clock_event", "1 while the reason slows the GPU down", labelled("reason", lambda g: g.throttle_reasons)
    )
    yield _counter("gpu_ecc_uncorrected", "DCGM_FI_DEV_ECC_DBE_VOL_TOTAL", each(lambda g: g.ecc_uncorrected))
    yield _counter(
        "gpu_remapped_rows",
        "DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS and …CORRECTABLE…",
        labelled("kind", lambda g: g.remapped_rows),
    )
    yield _gauge("gpu_remap_failure", "DCGM_FI_DEV_ROW_REMAP_FAILURE", each(lambda g: float(g.remap_failure)))
    yield _gauge("gpu_remap_pending", "1: a row is remapped at the next reset", each(lambda g: float(g.remap_pending)))
    yield _counter(
        "gpu_nvlink_bytes", "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL", labelled("direction", lambda g: g.nvlink_bytes)
    )
    yield _counter("gpu_nvlink_errors", "Of all links of the GPU", labelled("kind", lambda g: g.nvlink_errors))
    yield _counter("gpu_pcie_replays", "DCGM_FI_DEV_PCIE_REPLAY_COUNTER", each(lambda g: g.pcie_replays))
    xids: Samples = [
        ({"gpu": str(index), "xid": str(xid)} | part, float(count)) for (index, xid), count in sorted(seen.xids.items())
    ]
    yield _counter("gpu_xid_errors", "Xids since this part started; DCGM_FI_DEV_XID_ERRORS has only the last", xids)


def _names(gpu: Any, places: Mapping[int, str], part: dict[str, str]) -> dict[str, str]:
    return {"gpu": str(gpu.index), "uuid": gpu.uuid, "rank": places.get(gpu.index, "")} | part


def _doctor_metrics(report: JsonObject, part: dict[str, str]) -> Iterable[Metric]:
    """`report`: the doctor's, as its JSON form has it."""
    statuses: Samples = [({"check": c["id"]} | part, float(DOCTOR_STATUS[c["status"]])) for c in report["checks"]]
    yield _gauge("doctor_check_status", "0 ok, 1 warning, 2 error, 3 unknown or crashed, -1 skipped", statuses)
    yield _gauge("doctor_last_run_timestamp_seconds", "When the doctor last ran", [(part, report["started"])])
    yield _gauge("doctor_duration_seconds", "How long that took", [(part, report["duration_s"])])


def _gauge(name: str, text: str, samples: Samples) -> Metric:
    return _add_samples(GaugeMetricFamily(f"rtp_llm_{name}", text, labels=_labels(samples)), samples)


def _counter(name: str, text: str, samples: Samples) -> Metric:
    return _add_samples(CounterMetricFamily(f"rtp_llm_{name}", text, labels=_labels(samples)), samples)


def _labels(samples: Samples) -> list[str]:
    return list(samples[0][0]) if samples else []


def _add_samples(family: Any, samples: Samples) -> Metric:
    for labels, value in samples:
        if value is not None:
            family.add_metric(list(labels.values()), value)
    made: Metric = family
    return made
