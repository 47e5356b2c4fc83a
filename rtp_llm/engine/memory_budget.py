"""The number of KV blocks that the free memory of a host can still back. Rank 0 checks it before each step, on CPU.

On Linux, allocations do not fail: the kernel kills a process at the first write for which it has no page. So the free
memory, less a reserve for everything else that a step writes, is compared before KV blocks are first written.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class MemoryBudget:
    """available_bytes: measures the memory that the ranks of the host can still use.

    reserve_bytes: the part of it that KV blocks must not use. block_bytes: size of a block, summed over the host's
    ranks.
    num_populated: returns how many of the first blocks have pages although no step has written them.
    interval_seconds: between measurements; long enough for a measurement to show the effect of retired blocks.
    """

    available_bytes: Callable[[], int]
    reserve_bytes: int
    block_bytes: int
    num_populated: Callable[[], int] = lambda: 0
    interval_seconds: float = 0.0
    _measured_at: float = field(default=float("-inf"), init=False)

    def measure(self) -> int | None:
        """Returns how many blocks without pages may be written until the next measurement.

        If negative, so many blocks with pages must be retired. Returns None if the last measurement is recent.
        """
        now = time.monotonic()
        if now - self._measured_at < self.interval_seconds:
            return None
        self._measured_at = now
        return (self.available_bytes() - self.reserve_bytes) // self.block_bytes
