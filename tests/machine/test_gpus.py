"""read_gpus with a fake NVML: readings, unsupported readings and failed GPUs."""

import inspect

import pynvml
import pytest

from rtp_llm.machine.gpus import GpuInventory, read_gpus
from tests.machine.fake_nvml import GIB, READINGS, FakeNvml, NvmlStruct


def test_fake_nvml_has_the_signatures_of_pynvml() -> None:
    methods = [name for name in vars(FakeNvml) if name.startswith("nvml")]
    for name in (*methods, *READINGS):
        function = getattr(pynvml, name)
        if name in methods:
            parameters = list(inspect.signature(getattr(FakeNvml, name)).parameters)[1:]
            required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
            assert len(parameters) == len(required), name


def test_eight_gpus_are_read_and_nvml_is_shut_down() -> None:
    nvml = FakeNvml()
    inventory = read_gpus(nvml)
    assert (nvml.open, inventory.driver, inventory.cuda) == (0, "570.86.15", (12, 8))
    assert (len(inventory.all), len(inventory.pairs)) == (8, 28)
    first = inventory.all[0]
    assert (first.bus, first.memory_free, first.fabric_state, first.nvlinks) == ("0000:10:00.0", 79 * GIB, 3, (18, 18))
    assert (first.capability, first.persistence, first.retired_pending) == ((9, 0), True, False)
    assert [gpu.index for gpu in inventory.visible] == list(range(8))
    assert (first.utilization, first.power, first.energy, first.memory_temperature) == (0.87, 412.5, 7200.0, 48)
    assert (first.clocks["sm"], first.nvlink_bytes) == (1980e6, {"transmitted": 3072, "received": 5120})
    assert set(first.throttle_reasons.values()) == set(first.nvlink_errors.values()) == {0}


def test_unsupported_readings_are_none() -> None:
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
def test_nvml_init_failure_is_recorded(code: int) -> None:
    inventory = read_gpus(FakeNvml(failure=code), "0")
    assert (inventory.failure, inventory.all, inventory.visible) == (code, (), [])


def test_lost_gpu_keeps_its_index() -> None:
    nvml = FakeNvml()
    nvml.failed[3] = pynvml.NVML_ERROR_GPU_IS_LOST
    inventory = read_gpus(nvml, "2,4")
    assert inventory.failed == ((3, pynvml.NVML_ERROR_GPU_IS_LOST),)
    assert [gpu.index for gpu in inventory.visible] == [2, 4]


def test_readings_of_a_faulty_gpu() -> None:
    nvml = FakeNvml(2)
    nvml.changed[1] = {
        "nvmlDeviceGetRemappedRows": (4, 2, 1, 1),
        "nvmlDeviceGetTotalEccErrors": 7,
        "nvmlDeviceGetMigMode": [1, 1],
        "processes": [NvmlStruct(pid=77, usedGpuMemory=None)],
    }
    healthy, faulty = read_gpus(nvml).all
    assert (faulty.remap_pending, faulty.remap_failure, faulty.ecc_uncorrected, faulty.mig) == (True, True, 7, True)
    assert (faulty.processes[0].pid, faulty.processes[0].memory) == (77, 0)
    assert (healthy.remap_failure, healthy.mig, healthy.processes) == (False, False, ())


def test_real_nvml_if_there_is_a_driver() -> None:
    inventory = read_gpus()
    if inventory.failure:
        pytest.skip(f"no NVIDIA driver here: {pynvml.NVMLError(inventory.failure)}")
    assert isinstance(inventory, GpuInventory)
    assert inventory.driver
    for gpu in inventory.all:
        assert gpu.uuid.startswith("GPU-")
        assert 0 < gpu.memory_free <= gpu.memory_total
