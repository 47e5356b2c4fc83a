"""A rank's sign of life: what it is doing and when it last got anywhere.

The sender turns moments into ages, so that no two machines have to agree on the time.
"""

import os
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

WINDOW_STEPS = 12
Phase = Literal["rendezvous", "loading", "warmup", "serving"]


@dataclass
class RankStatus:
    """State of one rank, written by its main thread and sent by its heartbeat thread."""

    rank: int
    part: int
    phase: Phase = "rendezvous"
    progress: float = 0.0  # of the phase, 0 … 1
    steps: int = 0
    open: int = 0  # requests that rank 0 holds
    weight_bytes: int = 0
    kv_bytes: int = 0
    wait_s: float | None = None  # for other ranks in a step's sums, lately; None where it cannot be told
    startup_seconds: dict[str, float] = field(default_factory=dict)  # by phase
    pid: int = field(default_factory=os.getpid)
    _touched: float = field(default_factory=time.monotonic, repr=False)
    _entered: float = field(default_factory=time.monotonic, repr=False)
    _waited: float = field(default=0.0, repr=False)

    def mark_progress(self) -> None:
        """The main thread got somewhere."""
        self._touched = time.monotonic()

    def step(self, number: int, wait_seconds: float | None) -> None:
        """A step is done; `waited`: seconds for other ranks in all steps so far. `wait_s` follows the last dozen."""
        self.steps = number
        if wait_seconds is not None:
            lately, self._waited = wait_seconds - self._waited, wait_seconds
            self.wait_s = lately if self.wait_s is None else self.wait_s + (lately - self.wait_s) / WINDOW_STEPS

    def set_phase(self, phase: Phase) -> None:
        now = time.monotonic()
        self.startup_seconds[self.phase] = round(now - self._entered, 3)
        self.phase, self.progress, self._entered = phase, 0.0, now
        self.mark_progress()

    def to_json(self) -> dict[str, Any]:
        """As sent: with `idle_s`, seconds since the last progress, in place of a moment."""
        data = asdict(self)
        del data["_touched"], data["_entered"], data["_waited"]
        return data | {"idle_s": round(time.monotonic() - self._touched, 3)}
