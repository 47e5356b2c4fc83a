"""A fake NVML with the readings of eight H100 GPUs, for machines without GPUs."""

import queue
from typing import Any

import pynvml

from rtp_llm.machine.gpus import NVLINK_ERRORS

GIB = 1 << 30
# Readings of one H100 SXM, by function of pynvml.
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
    "nvmlDeviceGetPowerUsage": 412_500,  # milliwatts
    "nvmlDeviceGetTotalEnergyConsumption": 7_200_000,  # millijoules
    "nvmlDeviceGetClockInfo": 1980,  # MHz
}
FIELDS = {pynvml.NVML_FI_DEV_MEMORY_TEMP: 48, **{key: 0 for key in NVLINK_ERRORS.values()}} | {
    pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX: 3,  # KiB
    pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX: 5,
}


class NvmlStruct:
    """Fields of a C structure."""

    def __init__(self, **fields: Any):
        self.__dict__.update(fields)


class FakeNvml:
    """Fake of pynvml with eight GPUs by default.

    `failed[index]`: error of a GPU that does not respond. `changed[index]`: readings of a GPU that differ.
    """

    def __init__(self, count: int = 8, failure: int = 0):
        self.count, self.failure = count, failure
        self.failed: dict[int, int] = {}
        self.changed: dict[int, dict[str, Any]] = {}
        self.open = 0
        self.registered: list[tuple[int, int]] = []
        self.xids: queue.Queue[tuple[int, int]] = queue.Queue()  # (index, Xid) events to report

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
        if index in self.failed:
            raise pynvml.NVMLError(self.failed[index])
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle:08d}-0000-0000-0000-000000000000"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> NvmlStruct:
        return NvmlStruct(total=80 * GIB, free=79 * GIB, used=GIB)

    def nvmlDeviceGetPciInfo(self, handle: int) -> NvmlStruct:
        return NvmlStruct(busId=f"00000000:{handle + 16:02X}:00.0")

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[NvmlStruct]:
        return self.changed.get(handle, {}).get("processes", [])

    def nvmlDeviceGetGpuFabricInfoV(self, handle: int, info: Any) -> int:
        info._obj.state = 3
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> NvmlStruct:
        return NvmlStruct(gpu=87, memory=40)

    def nvmlDeviceGetFieldValues(self, handle: int, fieldIds: list[tuple[int, int]]) -> list[NvmlStruct]:
        return [self._field(key) for key, _ in fieldIds]

    def _field(self, key: int) -> NvmlStruct:
        value = pynvml.c_nvmlValue_t()
        value.ullVal = FIELDS[key]
        return NvmlStruct(fieldId=key, nvmlReturn=0, valueType=pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG, value=value)

    def nvmlEventSetCreate(self) -> str:
        return "events"

    def nvmlDeviceRegisterEvents(self, handle: int, eventTypes: int, eventSet: str) -> None:
        self.registered.append((handle, eventTypes))

    def nvmlEventSetWait_v2(self, eventSet: str, timeoutms: int) -> NvmlStruct:
        try:
            index, xid = self.xids.get(timeout=timeoutms / 1000)
        except queue.Empty:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT) from None
        return NvmlStruct(device=index, eventType=pynvml.nvmlEventTypeXidCriticalError, eventData=xid)

    def nvmlDeviceGetP2PStatus(self, a: int, b: int, index: int) -> int:
        return 0

    def nvmlDeviceGetTopologyCommonAncestor(self, a: int, b: int) -> int:
        return 50

    def __getattr__(self, name: str) -> Any:
        if name not in READINGS:
            raise AttributeError(name)

        def read(handle: int, *arguments: Any) -> Any:
            value = self.changed.get(handle, {}).get(name, READINGS[name])
            if value == pynvml.NVML_ERROR_NOT_SUPPORTED:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return value

        return read
