"""The reader of NVML against a played library: what it takes over, what it leaves out, what it does not survive."""

import inspect
from typing import Any

import pynvml
import pytest

from doctor.gpus import Gpus, read_gpus

GIB = 1 << 30
# Readings of one GPU, as an H100 SXM answers; the functions of pynvml that give them.
READINGS: dict[str, Any] = {
    "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
    "nvmlDeviceGetCudaComputeCapability": (9, 0),
    "nvmlDeviceGetComputeMode": 0,
    "nvmlDeviceGetMigMode": [0, 0],
    "nvmlDeviceGetTotalEccErrors": 0,
    "nvmlDeviceGetRemappedRows": (0, 0, 0, 0),
    "nvmlDeviceGetRetiredPagesPendingStatus": pynvml.NVML_ERROR_NOT_SUPPORTED,
    "nvmlDeviceGetCurrentClocksEventReasons": 1,  # idle
    "nvmlDeviceGetTemperature": 31,
    "nvmlDeviceGetTemperatureThreshold": 87,
    "nvmlDeviceGetPersistenceMode": 1,
    "nvmlDeviceGetCurrPcieLinkWidth": 16,
    "nvmlDeviceGetMaxPcieLinkWidth": 16,
    "nvmlDeviceGetPcieReplayCounter": 0,
    "nvmlDeviceGetNvLinkState": 1,
}


class Record:
    """A C structure's fields."""

    def __init__(self, **fields: Any):
        self.__dict__.update(fields)


class PlayedNvml:
    """Eight GPUs; `broken[index]` is the error of one that does not answer, `changed[index]` other readings."""

    def __init__(self, count: int = 8, failure: int = 0):
        self.count, self.failure = count, failure
        self.broken: dict[int, int] = {}
        self.changed: dict[int, dict[str, Any]] = {}
        self.open = 0

    def nvmlInit(self) -> None:
        if self.failure:
            raise pynvml.NVMLError(self.failure)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.86.15"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 12080

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index in self.broken:
            raise pynvml.NVMLError(self.broken[index])
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle:08d}-0000-0000-0000-000000000000"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Record:
        return Record(total=80 * GIB, free=79 * GIB, used=GIB)

    def nvmlDeviceGetPciInfo(self, handle: int) -> Record:
        return Record(busId=f"00000000:{handle + 16:02X}:00.0")

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Record]:
        return self.changed.get(handle, {}).get("processes", [])

    def nvmlDeviceGetGpuFabricInfoV(self, handle: int, info: Any) -> int:
        info._obj.state = 3
        return 0

    def nvmlDeviceGetP2PStatus(self, one: int, other: int, index: int) -> int:
        return 0

    def nvmlDeviceGetTopologyCommonAncestor(self, one: int, other: int) -> int:
        return 50

    def __getattr__(self, name: str) -> Any:
        if name not in READINGS:
            raise AttributeError(name)

        def answer(handle: int, *arguments: Any) -> Any:
            value = self.changed.get(handle, {}).get(name, READINGS[name])
            if value == pynvml.NVML_ERROR_NOT_SUPPORTED:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return value

        return answer


def test_the_play_has_the_functions_of_the_library() -> None:
    own = [name for name in vars(PlayedNvml) if name.startswith("nvml")]
    for name in (*own, *READINGS):
        real = getattr(pynvml, name)
        if name in own:
            played = list(inspect.signature(getattr(PlayedNvml, name)).parameters)[1:]
            needed = [p for p in inspect.signature(real).parameters.values() if p.default is p.empty]
            assert len(played) == len(needed), name


def test_eight_gpus_are_read_and_the_library_is_closed() -> None:
    nvml = PlayedNvml()
    found = read_gpus(nvml)
    assert (nvml.open, found.driver, found.cuda, len(found.all), len(found.pairs)) == (0, "570.86.15", (12, 8), 8, 28)
    first = found.all[0]
    assert (first.bus, first.memory_free, first.fabric_state, first.nvlinks) == ("0000:10:00.0", 79 * GIB, 3, (18, 18))
    assert (first.capability, first.persistence, first.retired_pending) == ((9, 0), True, False)
    assert [gpu.index for gpu in found.visible] == list(range(8))


def test_what_is_not_supported_is_not_judged() -> None:
    nvml = PlayedNvml(1)
    nvml.changed[0] = {name: pynvml.NVML_ERROR_NOT_SUPPORTED for name in READINGS if name != "nvmlDeviceGetName"}
    [gpu] = read_gpus(nvml).all
    assert (gpu.compute_mode, gpu.ecc_uncorrected, gpu.temperature, gpu.mig, gpu.nvlinks) == (
        None,
        None,
        None,
        False,
        (0, 0),
    )


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_UNKNOWN])
def test_a_library_that_does_not_start(code: int) -> None:
    found = read_gpus(PlayedNvml(failure=code), "0")
    assert (found.failure, found.all, found.visible) == (code, (), [])


def test_a_gpu_that_has_fallen_off_the_bus_keeps_its_place() -> None:
    nvml = PlayedNvml()
    nvml.broken[3] = pynvml.NVML_ERROR_GPU_IS_LOST
    found = read_gpus(nvml, "2,4")
    assert found.broken == ((3, pynvml.NVML_ERROR_GPU_IS_LOST),)
    assert [gpu.index for gpu in found.visible] == [2, 4]


def test_readings_of_a_sick_gpu() -> None:
    nvml = PlayedNvml(2)
    nvml.changed[1] = {
        "nvmlDeviceGetRemappedRows": (4, 2, 1, 1),
        "nvmlDeviceGetTotalEccErrors": 7,
        "nvmlDeviceGetMigMode": [1, 1],
        "processes": [Record(pid=77, usedGpuMemory=None)],
    }
    well, sick = read_gpus(nvml).all
    assert (sick.remap_pending, sick.remap_failure, sick.ecc_uncorrected, sick.mig) == (True, True, 7, True)
    assert (sick.processes[0].pid, sick.processes[0].memory) == (77, 0)
    assert (well.remap_failure, well.mig, well.processes) == (False, False, ())


def test_the_real_library_where_there_is_one() -> None:
    found = read_gpus()
    if found.failure:
        pytest.skip(f"no NVIDIA driver here: {pynvml.NVMLError(found.failure)}")
    assert isinstance(found, Gpus)
    assert found.driver
    for gpu in found.all:
        assert gpu.uuid.startswith("GPU-")
        assert 0 < gpu.memory_free <= gpu.memory_total
