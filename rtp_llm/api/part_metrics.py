"""Metrics of one part (gang, processes, container, GPUs, doctor), collected at each scrape.

To add a metric, add a line to the function of its subject, such as `_gpu_metrics`.
"""

from collections import defaultdict
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

PART_STATES = ("rendezvous", "loading", "warmup", "serving", "recovering", "out_of_memory", "draining", "failed")
RESTART_REASONS = ("signal", "rank_crashed", "communication", "hang")  # see supervise/guard.py
# The value of the metric doctor_check_status by the check's status.
DOCTOR_STATUS = {"skip": -1, "ok": 0, "warn": 1, "error": 2, "unknown": 3, "crash": 3}

Samples = list[tuple[dict[str, str], float | None]]
JsonObject = Mapping[str, Any]


def register(metrics: Metrics, state: PartState, config: Config) -> None:
    """Registers the collectors of this part's metrics in `metrics.registry`: `PartCollector` and, if the setting
    METRICS_VLLM_ALIASES is on, `VllmMetricAliases`.
    """
    metrics.registry.register(PartCollector(state.metrics_snapshot))
    if config.metrics_vllm_aliases:
        metrics.registry.register(VllmMetricAliases(metrics.registry))


class PartCollector(Collector):
    """Prometheus collector of the metrics of one part. `read`: the bound method `PartState.metrics_snapshot`, which it
    calls at each scrape.
    """

    def __init__(self, read: Callable[[], dict[str, Any]]):
        self._read = read
        self._cpu_totals: dict[str, _CpuTotal] = defaultdict(_CpuTotal)

    def collect(self) -> Iterable[Metric]:
        state = self._read()
        part = {"part": str(state["part"])}
        yield _gauge("ready", "1 while the part serves requests, as /health reports", [({}, float(state["ready"]))])
        yield _gauge("live", "1 while the API process responds", [({}, 1.0)])
        states: Samples = [({"state": s}, float(s == state["state"])) for s in PART_STATES]
        yield _gauge("state", "1 for the current state", states)
        yield _gauge("gang_members_expected", "Number of ranks of all parts", [({}, float(state["expected"]))])
        yield from _rank_metrics(state["ranks"], state["expected"])
        yield from _process_metrics(state["processes"])
        yield self._cpu_seconds(state["processes"])
        yield from _guard_metrics(state["guard"], state["processes"])
        yield from _shm_metrics(state["shm"], part)
        yield from _cgroup_metrics(state["cgroup"], part)
        yield from _gpu_metrics(state["gpus"], part, state["ranks"])
        if state["doctor"]:
            yield from _doctor_metrics(state["doctor"], part)

    def _cpu_seconds(self, processes: Mapping[str, JsonObject]) -> Metric:
        totals: Samples = [
            (_program_labels(name), self._cpu_totals[name].update(stats)) for name, stats in sorted(processes.items())
        ]
        return _counter("process_cpu_seconds", "CPU time of the program, restarts included", totals)


class _CpuTotal:
    """CPU time of a program over all processes that ran it: a counter must not fall when the program restarts."""

    def __init__(self) -> None:
        self._of_ended_processes = self._of_process = 0.0
        self._start_time: float | None = None

    def update(self, stats: JsonObject) -> float:
        """Returns the CPU time in seconds, summed over restarts. `stats` lacks "cpu" while the program does not run."""
        if "cpu" in stats:
            if stats["start_time"] != self._start_time:
                self._of_ended_processes += self._of_process
            self._of_process, self._start_time = stats["cpu"], stats["start_time"]
        return self._of_ended_processes + self._of_process


def _program_labels(name: str) -> dict[str, str]:
    return {"program": name, "rank": name.removeprefix("rank") if name.startswith("rank") else ""}


def _rank_metrics(ranks: Mapping[str, JsonObject], expected: int) -> Iterable[Metric]:
    def per_rank(value: Callable[[JsonObject], float | None]) -> Samples:
        return [
            ({"rank": rank, "part": str(rank_status["part"])}, value(rank_status))
            for rank, rank_status in sorted(ranks.items())
        ]

    up: Samples = [({"world_rank": str(r)}, float(str(r) in ranks)) for r in range(expected)]
    yield _gauge("gang_member_up", "1 while the rank sends heartbeats", up)
    yield _gauge(
        "gang_heartbeat_age_seconds", "Time since the rank's last heartbeat", per_rank(lambda r: r["silent_s"])
    )
    yield _gauge(
        "rank_idle_seconds", "Time since the rank's main thread last made progress", per_rank(lambda r: r["idle_s"])
    )
    yield _gauge(
        "rank_steps",
        "Steps that the rank has computed since the last start of the gang",
        per_rank(lambda r: r["steps"]),
    )
    yield _gauge(
        "last_step_timestamp_seconds",
        "When the rank last made progress",
        per_rank(lambda r: r["last_seen"] - r["idle_s"]),
    )
    # The rank that waits longest in the all-reduces entered them first.
    max_wait = max((r["wait_s"] for r in ranks.values() if r["wait_s"] is not None), default=0.0)
    yield _gauge(
        "rank_lag_seconds",
        "How much later than the first rank this rank enters the all-reduces of a step; not measured over NCCL",
        per_rank(lambda r: None if r["wait_s"] is None else max_wait - r["wait_s"]),
    )
    yield _gauge("weight_memory_bytes", "Weights loaded by the rank", per_rank(lambda r: r["weight_bytes"]))
    yield _gauge("kv_cache_memory_bytes", "Size of the rank's KV cache", per_rank(lambda r: r["kv_bytes"]))
    startup: Samples = [
        ({"rank": rank, "phase": phase}, seconds)
        for rank, rank_status in sorted(ranks.items())
        for phase, seconds in rank_status["startup_seconds"].items()
    ]
    yield _gauge("startup_seconds", "Duration of each startup phase", startup)


def _process_metrics(processes: Mapping[str, JsonObject]) -> Iterable[Metric]:
    def per_process(key: str) -> Samples:
        return [(_program_labels(name), stats.get(key)) for name, stats in sorted(processes.items())]

    yield _gauge("process_up", "1 while the process runs", per_process("up"))
    yield _gauge("process_start_time_seconds", "When the process started", per_process("start_time"))
    yield _gauge("process_resident_memory_bytes", "Resident memory", per_process("rss"))
    yield _gauge("process_open_fds", "Open files", per_process("fds"))
    yield _gauge("process_max_fds", "Limit of open files", per_process("max_fds"))
    yield _gauge("process_threads", "Threads", per_process("threads"))


def _guard_metrics(guard: Mapping[str, Mapping[str, int]], programs: Iterable[str]) -> Iterable[Metric]:
    """Yields the metrics of restarts by the guard, the process that restarts failed processes of the part.

    The series of common reasons start at 0, because Prometheus' increase() misses the first restart of a series that
    starts at 1.
    """
    counts = {(name, reason): 0 for name in programs for reason in RESTART_REASONS}
    counts |= {(key.split(" ")[0], key.split(" ")[1]): count for key, count in guard["restarts"].items()}
    restarts: Samples = [
        ({"program": name, "reason": reason}, count) for (name, reason), count in sorted(counts.items())
    ]
    yield _counter("process_restarts", "Restarts by the guard, by the reason of the exit", restarts)
    exits: Samples = [({"program": program}, float(code)) for program, code in sorted(guard["last_exit"].items())]
    yield _gauge("process_last_exit_code", "Last exit code of the process; -1: killed by a signal", exits)


def _shm_metrics(shm: Mapping[str, float], part: dict[str, str]) -> Iterable[Metric]:
    yield _gauge("shm_size_bytes", "Size of /dev/shm", [(part, shm["size"])])
    yield _gauge("shm_free_bytes", "Free bytes of /dev/shm", [(part, shm["free"])])
    yield _gauge("shm_orphan_bytes", "Orphaned segments of this server in /dev/shm", [(part, shm["orphan"])])


def _cgroup_metrics(cgroup: Cgroup, part: dict[str, str]) -> Iterable[Metric]:
    """Yields the metrics of the container's cgroup. A limit that is not set has no sample."""

    def sample(value: int | None) -> Samples:
        return [(part, None if value is None or value >= UNLIMITED else float(value))]

    yield _gauge("cgroup_memory_usage_bytes", "Memory in use, page cache included", sample(cgroup.memory_current))
    yield _gauge("cgroup_memory_limit_bytes", "Memory limit of the container", sample(cgroup.memory_max))
    yield _gauge("cgroup_pids_current", "Processes and threads of the container", sample(cgroup.pids_current))
    yield _gauge("cgroup_pids_max", "Limit of processes and threads of the container", sample(cgroup.pids_max))
    yield _counter("cgroup_oom_kills", "Processes killed by the kernel's OOM killer", sample(cgroup.oom_kills))
    yield _counter(
        "cgroup_cpu_throttled_periods", "Periods in which the CPU quota was exhausted", sample(cgroup.throttled)
    )


def _gpu_metrics(snapshot: GpuSnapshot, part: dict[str, str], ranks: Mapping[str, JsonObject]) -> Iterable[Metric]:
    """Yields NVML's readings; omits those that a GPU does not support. Help texts name dcgm-exporter's equivalents.
    The n-th rank of a part uses the n-th visible GPU.
    """
    local_ranks = sorted((int(r) for r, rank_status in ranks.items() if str(rank_status["part"]) == part["part"]))
    rank_by_gpu = {gpu.index: str(rank) for rank, gpu in zip(local_ranks, snapshot.gpus.visible, strict=False)}

    def per_gpu(value: Callable[[Any], float | None]) -> Samples:
        return [(_gpu_labels(gpu, rank_by_gpu, part), value(gpu)) for gpu in snapshot.gpus.all]

    def per_gpu_and(label: str, values: Callable[[Any], Mapping[str, float | None]]) -> Samples:
        return [
            (_gpu_labels(gpu, rank_by_gpu, part) | {label: key}, value)
            for gpu in snapshot.gpus.all
            for key, value in values(gpu).items()
        ]

    up: Samples = [({"gpu": str(gpu.index)} | part, 1.0) for gpu in snapshot.gpus.all]
    up += [({"gpu": str(index)} | part, 0.0) for index, _ in snapshot.gpus.failed]
    yield _gauge("gpu_up", "1 while NVML can read the GPU", up)
    yield _gauge("gpu_read_timestamp_seconds", "When NVML was last read", [(part, snapshot.read_at or None)])
    yield _gauge("gpu_utilization_ratio", "DCGM_FI_DEV_GPU_UTIL", per_gpu(lambda g: g.utilization))
    yield _gauge(
        "gpu_memory_used_bytes",
        "DCGM_FI_DEV_FB_USED plus reserved memory",
        per_gpu(lambda g: g.memory_total - g.memory_free),
    )
    yield _gauge("gpu_memory_free_bytes", "DCGM_FI_DEV_FB_FREE", per_gpu(lambda g: g.memory_free))
    yield _gauge("gpu_memory_total_bytes", "Total memory of the GPU", per_gpu(lambda g: g.memory_total))
    yield _gauge("gpu_temperature_celsius", "DCGM_FI_DEV_GPU_TEMP", per_gpu(lambda g: g.temperature))
    yield _gauge("gpu_memory_temperature_celsius", "DCGM_FI_DEV_MEMORY_TEMP", per_gpu(lambda g: g.memory_temperature))
    yield _gauge("gpu_power_watts", "DCGM_FI_DEV_POWER_USAGE", per_gpu(lambda g: g.power))
    yield _counter("gpu_energy_joules", "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", per_gpu(lambda g: g.energy))
    yield _gauge(
        "gpu_clock_hertz", "DCGM_FI_DEV_SM_CLOCK, DCGM_FI_DEV_MEM_CLOCK", per_gpu_and("domain", lambda g: g.clocks)
    )
    yield _gauge(
        "gpu_clock_event", "1 while the reason throttles the GPU", per_gpu_and("reason", lambda g: g.throttle_reasons)
    )
    yield _counter("gpu_ecc_uncorrected", "DCGM_FI_DEV_ECC_DBE_VOL_TOTAL", per_gpu(lambda g: g.ecc_uncorrected))
    yield _counter(
        "gpu_remapped_rows",
        "DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS and …CORRECTABLE…",
        per_gpu_and("kind", lambda g: g.remapped_rows),
    )
    yield _gauge("gpu_remap_failure", "DCGM_FI_DEV_ROW_REMAP_FAILURE", per_gpu(lambda g: float(g.remap_failure)))
    yield _gauge(
        "gpu_remap_pending", "1: a row is remapped at the next reset", per_gpu(lambda g: float(g.remap_pending))
    )
    yield _counter(
        "gpu_nvlink_bytes", "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL", per_gpu_and("direction", lambda g: g.nvlink_bytes)
    )
    yield _counter(
        "gpu_nvlink_errors", "NVLink errors of all links of the GPU", per_gpu_and("kind", lambda g: g.nvlink_errors)
    )
    yield _counter("gpu_pcie_replays", "DCGM_FI_DEV_PCIE_REPLAY_COUNTER", per_gpu(lambda g: g.pcie_replays))
    xids: Samples = [
        ({"gpu": str(index), "xid": str(xid)} | part, float(count))
        for (index, xid), count in sorted(snapshot.xids.items())
    ]
    yield _counter(
        "gpu_xid_errors", "Xid errors since the part started; DCGM_FI_DEV_XID_ERRORS has only the last", xids
    )


def _gpu_labels(gpu: Any, rank_by_gpu: Mapping[int, str], part: dict[str, str]) -> dict[str, str]:
    return {"gpu": str(gpu.index), "uuid": gpu.uuid, "rank": rank_by_gpu.get(gpu.index, "")} | part


def _doctor_metrics(report: JsonObject, part: dict[str, str]) -> Iterable[Metric]:
    """Yields the metrics of the doctor's last report, in the format of docs/doctor-schema.json."""
    statuses: Samples = [({"check": c["id"]} | part, float(DOCTOR_STATUS[c["status"]])) for c in report["checks"]]
    yield _gauge("doctor_check_status", "0 ok, 1 warning, 2 error, 3 unknown or crashed, -1 skipped", statuses)
    yield _gauge("doctor_last_run_timestamp_seconds", "When the doctor last ran", [(part, report["started"])])
    yield _gauge("doctor_duration_seconds", "Duration of the doctor's last run", [(part, report["duration_s"])])


def _gauge(name: str, description: str, samples: Samples) -> Metric:
    family = GaugeMetricFamily(f"rtp_llm_{name}", description, labels=_label_names(samples))
    return _add_samples(family, samples)


def _counter(name: str, description: str, samples: Samples) -> Metric:
    family = CounterMetricFamily(f"rtp_llm_{name}", description, labels=_label_names(samples))
    return _add_samples(family, samples)


def _label_names(samples: Samples) -> list[str]:
    return list(samples[0][0]) if samples else []


def _add_samples(family: GaugeMetricFamily | CounterMetricFamily, samples: Samples) -> Metric:
    """Adds to `family` the samples that have a value, and returns `family`."""
    for labels, value in samples:
        if value is not None:
            family.add_metric(list(labels.values()), value)
    return family
