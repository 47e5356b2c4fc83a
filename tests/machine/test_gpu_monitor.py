"""The GPU monitor: current readings, Xids counted per GPU, and no failure without a driver."""

import time
from collections.abc import Callable

import pynvml
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from rtp_llm.api.part_metrics import PartCollector
from rtp_llm.machine.cgroup import Cgroup
from rtp_llm.machine.gpu_monitor import GpuMonitor, GpuSnapshot
from rtp_llm.machine.gpus import read_gpus
from tests.machine.fake_nvml import GIB, FakeNvml

RANK_STATUS = {
    **{"part": 1, "silent_s": 0.0, "idle_s": 0.0, "steps": 1, "last_seen": 0.0, "wait_s": None},
    **{"weight_bytes": 0, "kv_bytes": 0, "startup_seconds": {}},
}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_xids_are_counted_by_gpu_and_nvml_is_shut_down() -> None:
    nvml = FakeNvml(2)
    monitor = GpuMonitor(None, nvml, period=0.05)
    monitor.start()
    for xid in ((1, 79), (1, 79), (0, 48)):
        nvml.xids.put(xid)
    until(lambda: monitor.snapshot.xids == {(1, 79): 2, (0, 48): 1})
    assert [gpu.index for gpu in monitor.snapshot.gpus.all] == [0, 1]
    assert {types for _, types in nvml.registered} == {pynvml.nvmlEventTypeXidCriticalError}
    monitor.stop()
    until(lambda: nvml.open == 0)


def test_readings_are_refreshed_and_show_a_lost_gpu() -> None:
    nvml = FakeNvml(2)
    monitor = GpuMonitor(None, nvml, period=0.05)
    monitor.start()
    until(lambda: monitor.snapshot.read_at > 0)
    nvml.failed[1] = pynvml.NVML_ERROR_GPU_IS_LOST
    until(lambda: [index for index, _ in monitor.snapshot.gpus.failed] == [1])
    monitor.stop()


def test_xid_of_a_lost_gpu_is_counted_and_the_others_are_still_read() -> None:
    class LostGpuNvml(FakeNvml):
        def nvmlDeviceGetUUID(self, handle: int) -> str:
            if handle in self.failed:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
            return super().nvmlDeviceGetUUID(handle)

    nvml = LostGpuNvml(2)
    monitor = GpuMonitor(None, nvml, period=0.05)
    monitor.start()
    until(lambda: monitor.snapshot.read_at > 0)
    nvml.failed[1] = pynvml.NVML_ERROR_GPU_IS_LOST
    nvml.xids.put((1, 79))
    until(lambda: monitor.snapshot.xids == {(-1, 79): 1})
    read_at = monitor.snapshot.read_at
    until(lambda: monitor.snapshot.read_at > read_at)
    assert [gpu.index for gpu in monitor.snapshot.gpus.all] == [0]
    monitor.stop()


def test_readings_continue_with_a_driver_without_events() -> None:
    class NoEventsNvml(FakeNvml):
        def nvmlEventSetCreate(self) -> str:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monitor = GpuMonitor(None, NoEventsNvml(1), period=0.05)
    monitor.start()
    until(lambda: monitor.snapshot.read_at > 0)
    read_at = monitor.snapshot.read_at
    until(lambda: monitor.snapshot.read_at > read_at)
    assert len(monitor.snapshot.gpus.all) == 1
    monitor.stop()


def test_snapshot_is_empty_without_a_driver() -> None:
    monitor = GpuMonitor(None, FakeNvml(failure=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND), period=0.05)
    monitor.start()
    time.sleep(0.1)
    assert monitor.snapshot == GpuSnapshot()


@pytest.fixture
def scraped() -> dict[tuple[str, ...], float]:
    """Metrics of part 1 by (name, GPU, one more label).

    Ranks 2 and 3 use GPUs 3 and 0; GPU 2 is lost, and GPU 1 has reported Xid errors.
    """
    nvml = FakeNvml(4)
    nvml.failed[2] = pynvml.NVML_ERROR_GPU_IS_LOST
    nvml.changed[0] = {"nvmlDeviceGetCurrentClocksEventReasons": 0x40, "nvmlDeviceGetRemappedRows": (1, 2, 0, 1)}
    snapshot = GpuSnapshot(read_gpus(nvml, "3,0"), 1000.0, {(1, 79): 2})
    state = {
        **{"part": 1, "ready": True, "state": "serving", "expected": 4, "processes": {}, "doctor": None},
        **{"guard": {"restarts": {}, "last_exit": {}}, "cgroup": Cgroup(0), "gpus": snapshot},
        **{"shm": {"size": 1, "free": 1, "orphan": 0}, "ranks": {"2": RANK_STATUS, "3": RANK_STATUS}},
    }
    registry = CollectorRegistry()
    registry.register(PartCollector(lambda: state))
    samples = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            if family.name.startswith("rtp_llm_gpu_"):
                labels = sample.labels
                other_labels = [labels[k] for k in ("reason", "kind", "domain", "direction", "xid") if k in labels]
                samples[sample.name.removeprefix("rtp_llm_gpu_"), labels.get("gpu", ""), *other_labels] = sample.value
                assert labels["part"] == "1"
                ranks = {"0": "3", "3": "2"}
                assert labels.get("rank", ranks.get(labels.get("gpu", ""), "")) == ranks.get(labels.get("gpu", ""), "")
    return samples


def test_scraped_metrics_have_the_readings_in_base_units(scraped: dict[tuple[str, ...], float]) -> None:
    assert [scraped["up", str(gpu)] for gpu in range(4)] == [1, 1, 0, 1]
    assert scraped["memory_used_bytes", "0"] == GIB
    assert scraped["memory_total_bytes", "0"] == 80 * GIB
    assert scraped["utilization_ratio", "3"] == 0.87
    assert scraped["power_watts", "3"] == 412.5
    assert scraped["energy_joules_total", "3"] == 7200
    assert scraped["clock_hertz", "0", "sm"] == 1980e6
    assert scraped["clock_event", "0", "thermal slowdown (hardware)"] == 1
    assert scraped["clock_event", "3", "thermal slowdown (hardware)"] == 0
    assert scraped["remapped_rows_total", "0", "uncorrectable"] == 2
    assert scraped["remap_failure", "0"] == 1
    assert scraped["nvlink_bytes_total", "1", "received"] == 5120
    assert scraped["xid_errors_total", "1", "79"] == 2
    assert scraped["read_timestamp_seconds", ""] == 1000
    assert ("temperature_celsius", "2") not in scraped
