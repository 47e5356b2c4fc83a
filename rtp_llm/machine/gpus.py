"""What NVML tells about this machine's GPUs, read once, without a CUDA context.

A reading that a GPU or driver does not support is None: it is left out of judgement, never taken for good or bad.
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
KILL_SECONDS = 0.5
DRIVER_TIMEOUT = int(pynvml.NVML_ERROR_TIMEOUT)
P2P_READ = 0  # pynvml's own constant for it is a tuple by mistake
NVLINK_LINKS = 18  # of the newest boards; links beyond a board's own answer "not supported"

# nvml.h, clocks event reasons. The newer library calls them "event reasons", the older ones "throttle reasons".
THROTTLE_REASONS = {
    0x08: "hardware slowdown",
    0x20: "thermal slowdown (software)",
    0x40: "thermal slowdown (hardware)",
    0x80: "power brake",
}
APPLICATION_CLOCKS = 0x02
CLOCKS = {"sm": pynvml.NVML_CLOCK_SM, "memory": pynvml.NVML_CLOCK_MEM}
ALL_LINKS = 0xFFFFFFFF  # scope of a field: the sum over the GPU's NVLinks
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
    """`memory` in bytes. NVML gives host pids, which another pid namespace cannot resolve."""

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
    clock_reasons: int | None = 0  # bits of nvmlClocksEventReason*
    temperature: int | None = None
    slowdown_temperature: int | None = None
    persistence: bool | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    pcie_replays: int | None = None
    fabric_state: int | None = None  # nvml.h, NVML_GPU_FABRIC_STATE_*: 0 not supported, 3 completed
    nvlinks: tuple[int, int] = (0, 0)  # (up, there at all)
    utilization: float | None = None  # share of the last sampling period in which a kernel ran
    memory_temperature: int | None = None
    power: float | None = None
    energy: float | None = None  # since the driver was loaded
    clocks: Mapping[str, float] = field(default_factory=dict, hash=False)
    remapped_rows: Mapping[str, int] = field(default_factory=dict, hash=False)
    nvlink_bytes: Mapping[str, int] = field(default_factory=dict, hash=False)
    nvlink_errors: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        """Returns "GPU 0 (NVIDIA H100 80GB HBM3)", as in messages."""
        return f"GPU {self.index} ({self.name})"

    @property
    def throttle_reasons(self) -> dict[str, float]:
        """1 for each reason that slows it down now, 0 for the others."""
        if self.clock_reasons is None:
            return {}
        return {name: float(bool(self.clock_reasons & bit)) for bit, name in THROTTLE_REASONS.items()}


@dataclass(frozen=True)
class GpuPair:
    """Two GPUs: nvmlGpuP2PStatus of reading (0 is OK), of NVLink, and nvmlGpuTopologyLevel between them."""

    one: int
    other: int
    p2p: int | None
    nvlink: int | None
    topology: int | None


@dataclass(frozen=True)
class GpuInventory:
    """`failure`: NVML's code where it did not start, `broken`: (index, code) of GPUs that could not be opened."""

    failure: int = 0
    driver: str = ""
    cuda: tuple[int, int] = (0, 0)  # the newest CUDA that this driver serves
    all: tuple[Gpu, ...] = ()
    failed: tuple[tuple[int, int], ...] = ()
    pairs: tuple[GpuPair, ...] = ()
    selection: VisibleDevices = field(default_factory=lambda: VisibleDevices(()))

    @property
    def visible(self) -> list[Gpu]:
        """In CUDA's order; a MIG instance, which has no index of its own, stands as the first GPU with MIG on."""
        by_index = {gpu.index: gpu for gpu in self.all}
        sliced = next((gpu for gpu in self.all if gpu.mig), None)
        chosen = [by_index.get(i) if i >= 0 else sliced for i in self.selection.indices]
        return [gpu for gpu in chosen if gpu]


def read_gpus(nvml: Any = None, visible: str | None = None) -> GpuInventory:
    """`nvml`: pynvml, or what a test plays in its place; `visible`: CUDA_VISIBLE_DEVICES."""
    nvml = nvml or pynvml
    try:
        nvml.nvmlInit()
    except pynvml.NVMLError as error:
        return GpuInventory(failure=int(error.value), selection=apply_cuda_visible_devices((), visible))
    try:
        return _read(nvml, visible)
    finally:
        nvml.nvmlShutdown()


def completes_within(question: Callable[[], object], seconds: float = DRIVER_TIMEOUT_SECONDS) -> bool:
    """Whether it comes to an end in time, tried in a forked process: a driver that hangs holds its caller for ever."""
    pid = os.fork()
    if pid == 0:
        try:
            question()
        finally:
            os._exit(0)
    if _ended(pid, seconds):
        return True
    os.kill(pid, signal.SIGKILL)
    _ended(pid, KILL_SECONDS)  # unless it is stuck in the kernel
    return False


def _ended(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.002)
    return False


def _read(nvml: Any, visible: str | None) -> GpuInventory:
    count = int(nvml.nvmlDeviceGetCount())
    found: list[Gpu] = []
    handles: dict[int, Any] = {}
    broken: list[tuple[int, int]] = []
    for index in range(count):
        try:
            handles[index] = nvml.nvmlDeviceGetHandleByIndex(index)
            found.append(_gpu(nvml, handles[index], index))
        except pynvml.NVMLError as error:
            broken.append((index, int(error.value)))
    # A GPU that cannot be opened keeps its place in CUDA's numbering.
    uuids = {gpu.index: gpu.uuid for gpu in found}
    version = int(_query(nvml.nvmlSystemGetCudaDriverVersion_v2) or 0)
    whole = [gpu.index for gpu in found]
    return GpuInventory(
        driver=str(_query(nvml.nvmlSystemGetDriverVersion) or ""),
        cuda=(version // 1000, version % 1000 // 10),
        all=tuple(found),
        failed=tuple(broken),
        pairs=tuple(_pair(nvml, handles, a, b) for a, b in combinations(whole, 2)),
        selection=apply_cuda_visible_devices([uuids.get(i, "") for i in range(count)], visible),
    )


def _gpu(nvml: Any, handle: Any, index: int) -> Gpu:
    """Raises NVMLError where the GPU does not answer; what it merely does not support is None."""

    def ask(name: str, *arguments: Any) -> Any:
        return _query(lambda: getattr(nvml, name)(handle, *arguments))

    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    rows = ask("nvmlDeviceGetRemappedRows")  # corrected, uncorrected, pending, failed
    remapped = rows or (0, 0, 0, 0)
    fields = _fields(nvml, handle, [*NVLINK_BYTES.values(), *NVLINK_ERRORS.values()])
    utilization, power = ask("nvmlDeviceGetUtilizationRates"), ask("nvmlDeviceGetPowerUsage")
    energy = ask("nvmlDeviceGetTotalEnergyConsumption")
    clocks = {name: ask("nvmlDeviceGetClockInfo", domain) for name, domain in CLOCKS.items()}
    mig = ask("nvmlDeviceGetMigMode")
    persistence = ask("nvmlDeviceGetPersistenceMode")
    processes = ask("nvmlDeviceGetComputeRunningProcesses") or []
    return Gpu(
        index=index,
        uuid=str(nvml.nvmlDeviceGetUUID(handle)),
        name=str(nvml.nvmlDeviceGetName(handle)),
        bus=_bus(nvml.nvmlDeviceGetPciInfo(handle).busId),
        memory_total=int(memory.total),
        memory_free=int(memory.free),
        capability=ask("nvmlDeviceGetCudaComputeCapability"),
        processes=tuple(GpuProcess(int(p.pid), int(p.usedGpuMemory or 0)) for p in processes),
        compute_mode=ask("nvmlDeviceGetComputeMode"),
        mig=bool(mig and mig[0] == pynvml.NVML_DEVICE_MIG_ENABLE),
        ecc_uncorrected=ask(
            "nvmlDeviceGetTotalEccErrors", pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        ),
        remap_pending=bool(remapped[2]),
        remap_failure=bool(remapped[3]),
        retired_pending=bool(ask("nvmlDeviceGetRetiredPagesPendingStatus")),
        clock_reasons=ask("nvmlDeviceGetCurrentClocksEventReasons"),
        temperature=ask("nvmlDeviceGetTemperature", pynvml.NVML_TEMPERATURE_GPU),
        slowdown_temperature=ask("nvmlDeviceGetTemperatureThreshold", pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),
        persistence=None if persistence is None else bool(persistence),
        pcie_width=ask("nvmlDeviceGetCurrPcieLinkWidth"),
        pcie_width_max=ask("nvmlDeviceGetMaxPcieLinkWidth"),
        pcie_replays=ask("nvmlDeviceGetPcieReplayCounter"),
        fabric_state=_fabric(nvml, handle),
        nvlinks=_nvlinks(nvml, handle),
        utilization=None if utilization is None else utilization.gpu / 100,
        memory_temperature=_fields(nvml, handle, [pynvml.NVML_FI_DEV_MEMORY_TEMP], scope=0).get(
            pynvml.NVML_FI_DEV_MEMORY_TEMP
        ),
        power=None if power is None else power / 1000,
        energy=None if energy is None else energy / 1000,
        clocks={name: mhz * 1e6 for name, mhz in clocks.items() if mhz is not None},
        remapped_rows={"correctable": int(rows[0]), "uncorrectable": int(rows[1])} if rows else {},
        nvlink_bytes={name: fields[key] * 1024 for name, key in NVLINK_BYTES.items() if key in fields},
        nvlink_errors={name: fields[key] for name, key in NVLINK_ERRORS.items() if key in fields},
    )


def _query(question: Callable[[], Any]) -> Any:
    """The answer, or None where this GPU or driver has none. A GPU that is gone is another matter: NVMLError."""
    try:
        return question()
    except (pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_ResetRequired):
        raise
    except (pynvml.NVMLError, AttributeError):
        return None


def _fields(nvml: Any, handle: Any, keys: Iterable[int], scope: int = ALL_LINKS) -> dict[int, int]:
    """Field values (nvml.h, nvmlFieldValue_t) that this GPU has; each comes with a code and a type of its own."""
    answers = _query(lambda: nvml.nvmlDeviceGetFieldValues(handle, [(key, scope) for key in keys])) or []
    return {int(a.fieldId): _field_value(a) for a in answers if a.nvmlReturn == pynvml.NVML_SUCCESS}


def _field_value(answer: Any) -> int:
    value = answer.value
    return int(
        {
            pynvml.NVML_VALUE_TYPE_DOUBLE: value.dVal,
            pynvml.NVML_VALUE_TYPE_UNSIGNED_INT: value.uiVal,
            pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG: value.ulVal,
            pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: value.ullVal,
            pynvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG: value.sllVal,
        }.get(answer.valueType, value.siVal)
    )


def _bus(text: Any) -> str:
    """NVML writes the domain with eight digits, /sys with four, and small."""
    name = (text.decode() if isinstance(text, bytes) else str(text)).lower()
    return name[4:] if len(name.split(":")[0]) == 8 else name


def _fabric(nvml: Any, handle: Any) -> int | None:
    info = pynvml.c_nvmlGpuFabricInfoV_t()
    answered = _query(lambda: nvml.nvmlDeviceGetGpuFabricInfoV(handle, ctypes.byref(info)) or True)
    return int(info.state) if answered else None


def _nvlinks(nvml: Any, handle: Any) -> tuple[int, int]:
    states = [_query(lambda link=link: nvml.nvmlDeviceGetNvLinkState(handle, link)) for link in range(NVLINK_LINKS)]  # type: ignore[misc]
    there = [state for state in states if state is not None]
    return sum(map(bool, there)), len(there)


def _pair(nvml: Any, handles: dict[int, Any], one: int, other: int) -> GpuPair:
    def ask(name: str, *arguments: Any) -> int | None:
        answer = _query(lambda: getattr(nvml, name)(handles[one], handles[other], *arguments))
        return None if answer is None else int(answer)

    return GpuPair(
        one,
        other,
        p2p=ask("nvmlDeviceGetP2PStatus", P2P_READ),
        nvlink=ask("nvmlDeviceGetP2PStatus", pynvml.NVML_P2P_CAPS_INDEX_NVLINK),
        topology=ask("nvmlDeviceGetTopologyCommonAncestor"),
    )
