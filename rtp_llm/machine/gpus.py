"""Reads the GPUs of this machine through NVML, without a CUDA context.

A value that the GPU or driver does not report is None. The doctor's checks treat it as unknown, neither good nor bad.
"""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import pynvml

from rtp_llm.machine.devices import VisibleDevices, apply_cuda_visible_devices

DRIVER_TIMEOUT_SECONDS = 5.0
KILL_WAIT_SECONDS = 0.5
DRIVER_TIMEOUT = int(pynvml.NVML_ERROR_TIMEOUT)  # `GpuInventory.failure` if the driver does not respond
P2P_READ = 0  # pynvml's constant is a tuple by mistake
MAX_NVLINKS = 18  # per GPU; NVML reports "not supported" for links that a GPU does not have

# Bits of nvmlClocksEventReason* (nvml.h) that mean the GPU is slowed down by heat or power.
THROTTLE_REASONS = {
    0x08: "hardware slowdown",
    0x20: "thermal slowdown (software)",
    0x40: "thermal slowdown (hardware)",
    0x80: "power brake",
}
APPLICATION_CLOCKS = 0x02  # a bit of the same mask: clocks limited by nvidia-smi -ac
CLOCKS = {"sm": pynvml.NVML_CLOCK_SM, "memory": pynvml.NVML_CLOCK_MEM}
ALL_LINKS = 0xFFFFFFFF  # scope ID of a field value: sum over the GPU's NVLinks
NVLINK_BYTES = {
    "transmitted": pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX,
    "received": pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX,
}
NVLINK_ERRORS = {
    "crc_flit": pynvml.NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL,
    "crc_data": pynvml.NVML_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL,
    "replay": pynvml.NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL,
    "recovery": pynvml.NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL,
}


@dataclass(frozen=True)
class GpuProcess:
    """A process that uses a GPU. `memory` in bytes; `pid` in the host's namespace, which a container cannot resolve."""

    pid: int
    memory: int


@dataclass(frozen=True)
class Gpu:
    """One GPU. Memory in bytes, temperatures in degrees Celsius, power in watts, energy in joules, clocks in hertz."""

    index: int
    uuid: str
    name: str
    bus: str  # PCI address, "0000:1b:00.0"
    memory_total: int
    memory_free: int
    capability: tuple[int, int] | None = None
    processes: tuple[GpuProcess, ...] = ()
    compute_mode: int | None = None
    mig: bool = False
    ecc_uncorrected: int | None = None  # since the driver was loaded
    remap_pending: bool = False
    remap_failure: bool = False
    retired_pending: bool = False
    clock_reasons: int | None = 0  # bit mask of nvmlClocksEventReason*
    temperature: int | None = None
    slowdown_temperature: int | None = None
    persistence: bool | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    pcie_replays: int | None = None
    fabric_state: int | None = None  # nvml.h, NVML_GPU_FABRIC_STATE_*: 0 not supported, 3 completed
    nvlinks: tuple[int, int] = (0, 0)  # (active, total)
    utilization: float | None = None  # fraction of the last sampling period in which a kernel ran, 0 … 1
    memory_temperature: int | None = None
    power: float | None = None
    energy: float | None = None  # since the driver was loaded
    clocks: Mapping[str, float] = field(default_factory=dict, hash=False)
    remapped_rows: Mapping[str, int] = field(default_factory=dict, hash=False)
    nvlink_bytes: Mapping[str, int] = field(default_factory=dict, hash=False)
    nvlink_errors: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        """Returns the name for messages, such as "GPU 0 (NVIDIA H100 80GB HBM3)"."""
        return f"GPU {self.index} ({self.name})"

    @property
    def throttle_reasons(self) -> dict[str, float]:
        """Returns 1 for each active throttle reason, 0 for the others, by name; empty if not supported."""
        if self.clock_reasons is None:
            return {}
        return {name: float(bool(self.clock_reasons & bit)) for bit, name in THROTTLE_REASONS.items()}


@dataclass(frozen=True)
class GpuPair:
    """How GPUs `a` and `b` (NVML indices) are connected: P2P, NVLink and PCIe topology. None: not reported."""

    a: int
    b: int
    p2p: int | None  # nvmlGpuP2PStatus of reads; 0 is OK
    nvlink: int | None  # nvmlGpuP2PStatus of NVLink; 0 is OK
    topology: int | None  # nvmlGpuTopologyLevel


@dataclass(frozen=True)
class GpuInventory:
    """All GPUs of this machine, and those visible to CUDA."""

    failure: int = 0  # NVML's error code if it could not be initialized
    driver: str = ""
    cuda: tuple[int, int] = (0, 0)  # newest CUDA version that the driver supports
    all: tuple[Gpu, ...] = ()
    failed: tuple[tuple[int, int], ...] = ()  # (index, error code) of GPUs that could not be opened
    pairs: tuple[GpuPair, ...] = ()
    selection: VisibleDevices = field(default_factory=lambda: VisibleDevices(()))

    @property
    def visible(self) -> list[Gpu]:
        """Returns the GPUs visible to CUDA, in CUDA's order.

        For a visible MIG instance, the list has the first GPU of the machine that is in MIG mode: NVML is not asked
        which GPU the instance belongs to.
        """
        by_index = {gpu.index: gpu for gpu in self.all}
        mig_gpu = next((gpu for gpu in self.all if gpu.mig), None)
        selected = [by_index.get(i) if i >= 0 else mig_gpu for i in self.selection.indices]
        return [gpu for gpu in selected if gpu]


def read_gpus(nvml: Any = None, visible: str | None = None) -> GpuInventory:
    """Returns the readings of all GPUs; without GPUs and with `failure` if NVML cannot be initialized.

    `nvml`: the module to ask; None for pynvml, tests pass a fake. `visible`: value of CUDA_VISIBLE_DEVICES, None if
    unset.
    """
    nvml = nvml or pynvml
    try:
        nvml.nvmlInit()
    except pynvml.NVMLError as error:
        return GpuInventory(failure=int(error.value), selection=apply_cuda_visible_devices((), visible))
    try:
        return _read(nvml, visible)
    finally:
        nvml.nvmlShutdown()


def completes_within(operation: Callable[[], object], seconds: float = DRIVER_TIMEOUT_SECONDS) -> bool:
    """Returns whether `operation` ends within `seconds`, whatever its result.

    Runs it in a forked child process and kills the child after that time, because a call of a hung GPU driver, or a
    read from a hung network file system, may block forever.
    """
    pid = os.fork()
    if pid == 0:
        try:
            operation()
        finally:
            os._exit(0)
    if _wait_for_exit(pid, seconds):
        return True
    os.kill(pid, signal.SIGKILL)
    _wait_for_exit(pid, KILL_WAIT_SECONDS)  # a process blocked in the kernel does not exit
    return False


def _wait_for_exit(pid: int, seconds: float) -> bool:
    """Waits up to `seconds` for child process `pid` to exit. Returns True if it has exited."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.002)
    return False


def _read(nvml: Any, visible: str | None) -> GpuInventory:
    count = int(nvml.nvmlDeviceGetCount())
    gpus: list[Gpu] = []
    handles: dict[int, Any] = {}
    failed: list[tuple[int, int]] = []
    for index in range(count):
        try:
            handles[index] = nvml.nvmlDeviceGetHandleByIndex(index)
            gpus.append(_read_gpu(nvml, handles[index], index))
        except pynvml.NVMLError as error:
            failed.append((index, int(error.value)))
    # A GPU that cannot be opened still has an index in CUDA's numbering.
    uuids = {gpu.index: gpu.uuid for gpu in gpus}
    version = int(_query(nvml.nvmlSystemGetCudaDriverVersion_v2) or 0)
    return GpuInventory(
        driver=str(_query(nvml.nvmlSystemGetDriverVersion) or ""),
        cuda=(version // 1000, version % 1000 // 10),
        all=tuple(gpus),
        failed=tuple(failed),
        pairs=tuple(_read_pair(nvml, handles, a, b) for a, b in combinations([gpu.index for gpu in gpus], 2)),
        selection=apply_cuda_visible_devices([uuids.get(i, "") for i in range(count)], visible),
    )


def _read_gpu(nvml: Any, handle: Any, index: int) -> Gpu:
    """Returns the readings of one GPU; unsupported ones are None. Raises NVMLError if the GPU does not respond."""

    def query(name: str, *arguments: Any) -> Any:
        return _query(lambda: getattr(nvml, name)(handle, *arguments))

    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    rows = query("nvmlDeviceGetRemappedRows")  # corrected, uncorrected, pending, failed
    remapped = rows or (0, 0, 0, 0)
    fields = _read_fields(nvml, handle, [*NVLINK_BYTES.values(), *NVLINK_ERRORS.values()])
    utilization, power = query("nvmlDeviceGetUtilizationRates"), query("nvmlDeviceGetPowerUsage")
    energy = query("nvmlDeviceGetTotalEnergyConsumption")
    clocks = {name: query("nvmlDeviceGetClockInfo", domain) for name, domain in CLOCKS.items()}
    mig = query("nvmlDeviceGetMigMode")
    persistence = query("nvmlDeviceGetPersistenceMode")
    processes = query("nvmlDeviceGetComputeRunningProcesses") or []
    return Gpu(
        index=index,
        uuid=str(nvml.nvmlDeviceGetUUID(handle)),
        name=str(nvml.nvmlDeviceGetName(handle)),
        bus=_normalize_pci_address(nvml.nvmlDeviceGetPciInfo(handle).busId),
        memory_total=int(memory.total),
        memory_free=int(memory.free),
        capability=query("nvmlDeviceGetCudaComputeCapability"),
        processes=tuple(GpuProcess(int(p.pid), int(p.usedGpuMemory or 0)) for p in processes),
        compute_mode=query("nvmlDeviceGetComputeMode"),
        mig=bool(mig and mig[0] == pynvml.NVML_DEVICE_MIG_ENABLE),
        ecc_uncorrected=query(
            "nvmlDeviceGetTotalEccErrors", pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        ),
        remap_pending=bool(remapped[2]),
        remap_failure=bool(remapped[3]),
        retired_pending=bool(query("nvmlDeviceGetRetiredPagesPendingStatus")),
        clock_reasons=query("nvmlDeviceGetCurrentClocksEventReasons"),
        temperature=query("nvmlDeviceGetTemperature", pynvml.NVML_TEMPERATURE_GPU),
        slowdown_temperature=query("nvmlDeviceGetTemperatureThreshold", pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),
        persistence=None if persistence is None else bool(persistence),
        pcie_width=query("nvmlDeviceGetCurrPcieLinkWidth"),
        pcie_width_max=query("nvmlDeviceGetMaxPcieLinkWidth"),
        pcie_replays=query("nvmlDeviceGetPcieReplayCounter"),
        fabric_state=_read_fabric_state(nvml, handle),
        nvlinks=_count_nvlinks(nvml, handle),
        utilization=None if utilization is None else utilization.gpu / 100,
        memory_temperature=_read_fields(nvml, handle, [pynvml.NVML_FI_DEV_MEMORY_TEMP], scope=0).get(
            pynvml.NVML_FI_DEV_MEMORY_TEMP
        ),
        power=None if power is None else power / 1000,
        energy=None if energy is None else energy / 1000,
        clocks={name: mhz * 1e6 for name, mhz in clocks.items() if mhz is not None},
        remapped_rows={"correctable": int(rows[0]), "uncorrectable": int(rows[1])} if rows else {},
        nvlink_bytes={name: fields[key] * 1024 for name, key in NVLINK_BYTES.items() if key in fields},
        nvlink_errors={name: fields[key] for name, key in NVLINK_ERRORS.items() if key in fields},
    )


def _query(call: Callable[[], Any]) -> Any:
    """Returns the result of an NVML call; None if the call is not supported. Raises NVMLError if the GPU is lost."""
    try:
        return call()
    except (pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_ResetRequired):
        raise
    except (pynvml.NVMLError, AttributeError):
        return None


def _read_fields(nvml: Any, handle: Any, keys: Iterable[int], scope: int = ALL_LINKS) -> dict[int, int]:
    """Returns the field values (nvml.h, nvmlFieldValue_t) that this GPU supports, by field id."""
    fields = _query(lambda: nvml.nvmlDeviceGetFieldValues(handle, [(key, scope) for key in keys])) or []
    return {int(f.fieldId): _field_value(f) for f in fields if f.nvmlReturn == pynvml.NVML_SUCCESS}


def _field_value(field_value: Any) -> int:
    value = field_value.value
    return int(
        {
            pynvml.NVML_VALUE_TYPE_DOUBLE: value.dVal,
            pynvml.NVML_VALUE_TYPE_UNSIGNED_INT: value.uiVal,
            pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG: value.ulVal,
            pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: value.ullVal,
            pynvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG: value.sllVal,
        }.get(field_value.valueType, value.siVal)
    )


def _normalize_pci_address(text: Any) -> str:
    """Converts NVML's PCI address with an eight-digit domain to the form in /sys: four digits, lower case."""
    address = (text.decode() if isinstance(text, bytes) else str(text)).lower()
    return address[4:] if len(address.split(":")[0]) == 8 else address


def _read_fabric_state(nvml: Any, handle: Any) -> int | None:
    info = pynvml.c_nvmlGpuFabricInfoV_t()
    supported = _query(lambda: nvml.nvmlDeviceGetGpuFabricInfoV(handle, ctypes.byref(info)) or True)
    return int(info.state) if supported else None


def _count_nvlinks(nvml: Any, handle: Any) -> tuple[int, int]:
    states = [_query(lambda link=link: nvml.nvmlDeviceGetNvLinkState(handle, link)) for link in range(MAX_NVLINKS)]  # type: ignore[misc]
    existing = [state for state in states if state is not None]
    return sum(map(bool, existing)), len(existing)


def _read_pair(nvml: Any, handles: dict[int, Any], a: int, b: int) -> GpuPair:
    def query(name: str, *arguments: Any) -> int | None:
        status = _query(lambda: getattr(nvml, name)(handles[a], handles[b], *arguments))
        return None if status is None else int(status)

    return GpuPair(
        a,
        b,
        p2p=query("nvmlDeviceGetP2PStatus", P2P_READ),
        nvlink=query("nvmlDeviceGetP2PStatus", pynvml.NVML_P2P_CAPS_INDEX_NVLINK),
        topology=query("nvmlDeviceGetTopologyCommonAncestor"),
    )
