"""The reader of NVML against a played library: what it takes over, what it leaves out, what it does not survive."""

import inspect

import pynvml
import pytest

from rtp_llm.machine.gpus import GpuInventory, read_gpus
from tests.machine.fake_nvml import GIB, READINGS, FakeNvml, NvmlStruct


def test_the_play_has_the_functions_of_the_library() -> None:
    own = [name for name in vars(FakeNvml) if name.startswith("nvml")]
    for name in (*own, *READINGS):
        real = getattr(pynvml, name)
        if name in own:
            played = list(inspect.signature(getattr(FakeNvml, name)).parameters)[1:]
            needed = [p for p in inspect.signature(real).parameters.values() if p.default is p.empty]
            assert len(played) == len(needed), name


def test_eight_gpus_are_read_and_the_library_is_closed() -> None:
    nvml = FakeNvml()
    found = read_gpus(nvml)
    assert (nvml.open, found.driver, found.cuda, len(found.all), len(found.pairs)) == (0, "570.86.15", (12, 8), 8, 28)
    first = found.all[0]
    assert (first.bus, first.memory_free, first.fabric_state, first.nvlinks) == ("0000:10:00.0", 79 * GIB, 3, (18, 18))
    assert (first.capability, first.persistence, first.retired_pending) == ((9, 0), True, False)
    assert [gpu.index for gpu in found.visible] == list(range(8))
    assert (first.utilization, first.power, first.energy, first.memory_temperature) == (0.87, 412.5, 7200.0, 48)
    assert (first.clocks["sm"], first.nvlink_bytes) == (1980e6, {"transmitted": 3072, "received": 5120})
    assert set(first.throttle_reasons.values()) == set(first.nvlink_errors.values()) == {0}


def test_what_is_not_supported_is_not_judged() -> None:
    nvml = FakeNvml(1)
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
    found = read_gpus(FakeNvml(failure=code), "0")
    assert (found.failure, found.all, found.visible) == (code, (), [])


def test_a_gpu_that_has_fallen_off_the_bus_keeps_its_place() -> None:
    nvml = FakeNvml()
    nvml.failed[3] = pynvml.NVML_ERROR_GPU_IS_LOST
    found = read_gpus(nvml, "2,4")
    assert found.failed == ((3, pynvml.NVML_ERROR_GPU_IS_LOST),)
    assert [gpu.index for gpu in found.visible] == [2, 4]


def test_readings_of_a_sick_gpu() -> None:
    nvml = FakeNvml(2)
    nvml.changed[1] = {
        "nvmlDeviceGetRemappedRows": (4, 2, 1, 1),
        "nvmlDeviceGetTotalEccErrors": 7,
        "nvmlDeviceGetMigMode": [1, 1],
        "processes": [NvmlStruct(pid=77, usedGpuMemory=None)],
    }
    well, sick = read_gpus(nvml).all
    assert (sick.remap_pending, sick.remap_failure, sick.ecc_uncorrected, sick.mig) == (True, True, 7, True)
    assert (sick.processes[0].pid, sick.processes[0].memory) == (77, 0)
    assert (well.remap_failure, well.mig, well.processes) == (False, False, ())


def test_the_real_library_where_there_is_one() -> None:
    found = read_gpus()
    if found.failure:
        pytest.skip(f"no NVIDIA driver here: {pynvml.NVMLError(found.failure)}")
    assert isinstance(found, GpuInventory)
    assert found.driver
    for gpu in found.all:
        assert gpu.uuid.startswith("GPU-")
        assert 0 < gpu.memory_free <= gpu.memory_total
