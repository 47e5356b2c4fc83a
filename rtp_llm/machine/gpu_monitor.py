"""Reads the GPUs and counts Xids (errors that the NVIDIA driver reports) in a background thread, so that a metrics
scrape does not wait for the driver.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pynvml

from rtp_llm.machine.gpus import GpuInventory, read_gpus

log = logging.getLogger(__name__)

PERIOD_SECONDS = 5.0


@dataclass(frozen=True)
class GpuSnapshot:
    """The latest readings of all GPUs, their time, and the Xid errors counted since the monitor started."""

    gpus: GpuInventory = field(default_factory=GpuInventory)
    read_at: float = 0.0  # Unix time; 0: not read yet
    xids: Mapping[tuple[int, int], int] = field(default_factory=dict)  # (GPU index, Xid) to count


class GpuMonitor:
    """A background thread that reads the GPUs every few seconds into `snapshot`, and counts Xid errors in between.

    Between two readings it always waits for Xid events, because NVML drops an event for which no thread waits. A hung
    driver blocks only this thread; `snapshot` then keeps the last readings and their time.
    """

    def __init__(self, visible: str | None, nvml: Any = pynvml, period: float = PERIOD_SECONDS):
        """`visible`: value of CUDA_VISIBLE_DEVICES, None if unset. `period`: seconds between two readings."""
        self._visible, self._nvml, self._period = visible, nvml, period
        self._xids: Counter[tuple[int, int]] = Counter()
        self._stop = threading.Event()
        self.snapshot = GpuSnapshot()

    def start(self) -> None:
        threading.Thread(target=self._run, name="gpus", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        try:
            self._nvml.nvmlInit()
        except pynvml.NVMLError as error:
            log.info("GPU metrics are not available: NVML: %s", error)
            return
        try:
            events, indices = self._register_events()
            while not self._stop.is_set():
                self.snapshot = GpuSnapshot(read_gpus(self._nvml, self._visible), time.time(), dict(self._xids))
                self._wait_for_xid(events, indices)
        except pynvml.NVMLError as error:
            log.warning("GPU metrics stop until this process restarts: NVML: %s", error)
        finally:
            self._nvml.nvmlShutdown()

    def _register_events(self) -> tuple[Any, dict[str, int]]:
        """Returns (NVML event set, GPU index by UUID). The set receives the Xid errors of all GPUs that report them; it
        is None if the driver does not support events.
        """
        indices: dict[str, int] = {}
        try:
            events = self._nvml.nvmlEventSetCreate()
        except pynvml.NVMLError as error:
            log.info("Xid errors of the GPUs are not counted, because NVML events are not available: %s", error)
            return None, indices
        for index in range(self._nvml.nvmlDeviceGetCount()):
            try:
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
                indices[str(self._nvml.nvmlDeviceGetUUID(handle))] = index
                self._nvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
            except pynvml.NVMLError as error:
                log.info(
                    "Xid errors of GPU %d are not counted, because NVML events are not available: %s", index, error
                )
        return events, indices

    def _wait_for_xid(self, events: Any, indices: Mapping[str, int]) -> None:
        """Blocks until the next reading is due or an Xid error is reported, and counts the error."""
        if events is None:
            self._stop.wait(self._period)
            return
        try:
            event = self._nvml.nvmlEventSetWait_v2(events, int(self._period * 1000))
        except pynvml.NVMLError_Timeout:
            return
        except pynvml.NVMLError as error:  # NVML returns it at once, again and again, after a GPU is lost
            log.debug("waiting for Xid errors: %s", error)
            self._stop.wait(self._period)
            return
        index = self._index(event.device, indices)
        self._xids[index, int(event.eventData)] += 1
        log.error("GPU %d: the driver reports Xid error %d", index, event.eventData)

    def _index(self, handle: Any, indices: Mapping[str, int]) -> int:
        """Returns the NVML index of the GPU with this handle, or -1 if the GPU does not respond any more."""
        try:
            return indices.get(str(self._nvml.nvmlDeviceGetUUID(handle)), -1)
        except pynvml.NVMLError:
            return -1
