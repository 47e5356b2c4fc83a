"""A rank's sign of life: what it is doing and when it last got anywhere.

The sender turns moments into ages, so that no two machines have to agree on the time.
"""

import os
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Phase = Literal["rendezvous", "loading", "warmup", "serving"]


@dataclass
class Pulse:
    """State of one rank, written by its main thread and sent by its heartbeat thread."""

    rank: int
    part: int
    phase: Phase = "rendezvous"
    progress: float = 0.0  # of the phase, 0 … 1
    steps: int = 0
    open: int = 0  # requests that rank 0 holds
    weight_bytes: int = 0
    kv_bytes: int = 0
    startup_seconds: dict[str, float] = field(default_factory=dict)  # by phase
    pid: int = field(default_factory=os.getpid)
    _touched: float = field(default_factory=time.monotonic, repr=False)
    _entered: float = field(default_factory=time.monotonic, repr=False)

    def touch(self) -> None:
        """The main thread got somewhere."""
        self._touched = time.monotonic()

    def enter(self, phase: Phase) -> None:
        now = time.monotonic()
        self.startup_seconds[self.phase] = round(now - self._entered, 3)
        self.phase, self.progress, self._entered = phase, 0.0, now
        self.touch()

    def to_json(self) -> dict[str, Any]:
        """As sent: with `idle_s`, seconds since the last progress, in place of a moment."""
        data = asdict(self)
        del data["_touched"], data["_entered"]
        return data | {"idle_s": round(time.monotonic() - self._touched, 3)}
