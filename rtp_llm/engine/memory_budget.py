"""How many more KV blocks the memory of a host can back: what rank 0 asks before a step, on CPU.

No allocation fails on Linux: a process is killed at the first write for which no page is left. So the room is compared
with a reserve, which covers what a step touches besides KV blocks, before blocks are written for the first time.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class MemoryBudget:
    """available_bytes: measures the memory that the ranks of the host may still touch.

    reserve_bytes: of it, not for KV blocks. block_bytes: that a block takes on all ranks of the host together.
    num_populated: returns how many of the first blocks have pages although no step has written them.
    interval_seconds: between measurements; as long as it takes until one shows the effect of retired blocks.
    """

    available_bytes: Callable[[], int]
    reserve_bytes: int
    block_bytes: int
    num_populated: Callable[[], int] = lambda: 0
    interval_seconds: float = 0.0
    _measured_at: float = field(default=float("-inf"), init=False)

    def measure(self) -> int | None:
        """Returns how many blocks without pages may be written until the next measurement.

        Negative: so many blocks with pages must give them back.
        Returns None if the last measurement is recent.
        """
        now = time.monotonic()
        if now - self._measured_at < self.interval_seconds:
            return None
        self._measured_at = now
        return (self.available_bytes() - self.reserve_bytes) // self.block_bytes
