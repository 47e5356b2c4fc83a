"""The content of a heartbeat: the phase of a rank, and the time since it last made progress.

The sender converts timestamps to ages, so that machines do not need synchronized clocks.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rtp_llm.machine.memory import available_memory, return_free_heap

WAIT_WINDOW_STEPS = 12  # number of steps over which `wait_s` is averaged
LONGEST_STEPS = 20  # a rank hangs after so many times the longest time without progress that it had so far
STILL_SECONDS = 2.0  # without progress, and that long by its own standards, after which /health says so
SHORT_BYTES = 64 << 20  # of available memory: with less, the kernel evicts the code of processes while they run it
STALL_SECONDS = 0.2  # without memory for any request; retired blocks are returned within 0.1 s
EVICTED_SECONDS = 1.0  # without progress in a step while memory is short
Phase = Literal["rendezvous", "loading", "warmup", "serving"]


@dataclass
class RankStatus:
    """Status of one rank, written by its main thread and sent by its heartbeat thread. The field names are the JSON
    keys of a rank in gang.json, the status file of the gang.
    """

    part: int
    rank: int = -1  # none yet
    phase: Phase = "rendezvous"
    progress: float = 0.0  # of the phase, 0 … 1
    steps: int = 0
    open: int = 0  # unfinished requests, on rank 0
    weight_bytes: int = 0
    kv_bytes: int = 0
    wait_s: float | None = None  # per step, for other ranks in collectives, moving average; None if not measured
    startup_seconds: dict[str, float] = field(default_factory=dict)  # by phase
    progress_count: int = 0  # layers (on CPU) or steps computed in this epoch
    longest_s: float = 0.0  # the longest time between two of these
    is_importing: bool = False  # torch, which can keep this process from sending heartbeats
    pid: int = field(default_factory=os.getpid)
    _last_progress: float = field(default_factory=time.monotonic, repr=False)
    _phase_start: float = field(default_factory=time.monotonic, repr=False)
    _total_wait_seconds: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        self.is_waiting = False  # for a step: the others' progress counts
        self._stalled_since = float("inf")
        self.is_in_collective: Callable[[], bool] = bool  # of the current epoch
        self.phase_changed = threading.Event()  # wakes the heartbeat thread: other ranks may wait for the phase

    def mark_progress(self) -> None:
        """Records that this rank's main thread made progress. A rank that makes none for too long is killed as hung."""
        self._last_progress = time.monotonic()

    def count_progress(self) -> None:
        """Counts one computed layer (on CPU) or step (on GPU) of this rank.

        Ranks that compute the same step reach the same count. So if all hang, the rank for which the others wait is the
        one with the lowest count.
        """
        self.progress_count += 1
        self.longest_s = max(self.longest_s, round(self.idle_seconds, 3))
        self.mark_progress()

    @property
    def idle_seconds(self) -> float:
        """Returns the seconds without progress of the main thread; 0 while it waits for rank 0's next step."""
        return 0.0 if self.is_waiting else time.monotonic() - self._last_progress

    def record_stall(self, is_stalled: bool) -> None:
        """Records, on rank 0, whether no request can be computed until the machine has more free memory."""
        self._stalled_since = min(self._stalled_since, time.monotonic()) if is_stalled else float("inf")

    def record_step(self, number: int, total_wait_seconds: float | None) -> None:
        """Records a finished step.

        `total_wait_seconds`: time spent waiting for other ranks in all steps so far; None if not measured.
        """
        self.steps = number
        self.count_progress()
        if total_wait_seconds is not None:
            step_wait_s = total_wait_seconds - self._total_wait_seconds
            self._total_wait_seconds = total_wait_seconds
            previous = step_wait_s if self.wait_s is None else self.wait_s
            self.wait_s = previous + (step_wait_s - previous) / WAIT_WINDOW_STEPS

    def set_phase(self, phase: Phase) -> None:
        now = time.monotonic()
        self.startup_seconds[self.phase] = round(now - self._phase_start, 3)
        self.phase, self.progress, self._phase_start = phase, 0.0, now
        self.mark_progress()
        self.phase_changed.set()

    def begin_epoch(self, rank: int) -> None:
        """Records that this process serves as `rank` from now on, in a new communicator of the ranks."""
        self.rank, self.progress_count, self.is_waiting, self.is_in_collective = rank, 0, False, bool
        self.record_stall(False)
        self.set_phase("rendezvous")

    def to_json(self) -> dict[str, Any]:
        """Returns the content of a heartbeat: the public fields, `idle_s` (seconds since the last progress),
        `in_collective` (whether this rank waits for others), `available_bytes` (free memory of the machine),
        `lacks_memory` (whether the rank computes nothing because memory is short) and `stands_still` (whether it has
        made no progress for much longer than ever before: it hangs, or the network loses what other ranks send).

        If memory is short, also returns unused heap memory to the kernel. The main thread may be unable to do that: its
        step can take forever while the kernel keeps evicting the pages of the program's code.
        """
        data = asdict(self)
        del data["_last_progress"], data["_phase_start"], data["_total_wait_seconds"]
        data["in_collective"] = self.is_in_collective()
        available_bytes, idle_seconds = available_memory(), self.idle_seconds
        is_short = available_bytes < SHORT_BYTES
        if is_short:
            return_free_heap()
        is_stalled = time.monotonic() - self._stalled_since > STALL_SECONDS
        lacks_memory = is_stalled or (is_short and idle_seconds > EVICTED_SECONDS)
        return data | {
            "available_bytes": available_bytes,
            "idle_s": round(idle_seconds, 3),
            "lacks_memory": lacks_memory,
            "stands_still": idle_seconds > max(STILL_SECONDS, LONGEST_STEPS * self.longest_s),
        }
