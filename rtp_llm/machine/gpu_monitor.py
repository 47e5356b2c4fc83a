"""A thread that keeps the GPUs' readings fresh and counts their Xids, so that a scrape never waits for the driver."""

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
    """The last readings, when they were taken (seconds since the epoch, 0 never), and how often each Xid was reported:
    (GPU's index, Xid) to count.
    """

    gpus: GpuInventory = field(default_factory=GpuInventory)
    at: float = 0.0
    xids: Mapping[tuple[int, int], int] = field(default_factory=dict)


class GpuMonitor:
    """Reads every few seconds; while it waits it listens for Xids, which NVML tells only to those who wait.

    A driver that hangs holds this thread and nothing else: the readings then grow old, and the age tells.
    """

    def __init__(self, visible: str | None, nvml: Any = pynvml, period: float = PERIOD_SECONDS):
        """`visible`: CUDA_VISIBLE_DEVICES."""
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
            log.info("no GPU metrics: %s", error)
            return
        try:
            events, indices = self._listen()
            while not self._stop.is_set():
                self.snapshot = GpuSnapshot(read_gpus(self._nvml, self._visible), time.time(), dict(self._xids))
                self._wait(events, indices)
        except pynvml.NVMLError as error:
            log.warning("no more GPU metrics: %s", error)
        finally:
            self._nvml.nvmlShutdown()

    def _listen(self) -> tuple[Any, dict[str, int]]:
        """An event set for the Xids of every GPU that reports them, and their indices by UUID."""
        events, indices = self._nvml.nvmlEventSetCreate(), {}
        for index in range(self._nvml.nvmlDeviceGetCount()):
            try:
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
                indices[str(self._nvml.nvmlDeviceGetUUID(handle))] = index
                self._nvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
            except pynvml.NVMLError as error:
                log.info("Xids of GPU %d are not counted: %s", index, error)
        return events, indices

    def _wait(self, events: Any, indices: Mapping[str, int]) -> None:
        """Until the next reading is due, or an Xid came, which is a reason to read at once."""
        try:
            event = self._nvml.nvmlEventSetWait_v2(events, int(self._period * 1000))
        except pynvml.NVMLError_Timeout:
            return
        except pynvml.NVMLError as error:  # of a GPU that is gone, again and again
            log.debug("waiting for Xids: %s", error)
            self._stop.wait(self._period)
            return
        index = indices.get(str(self._nvml.nvmlDeviceGetUUID(event.device)), -1)
        self._xids[index, int(event.eventData)] += 1
        log.error("GPU %d: Xid %d", index, event.eventData)
