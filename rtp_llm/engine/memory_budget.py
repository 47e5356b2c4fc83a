"""The number of KV blocks that the free memory of a host can still back. Rank 0 checks it before each step, on CPU.

On Linux, allocations do not fail: the kernel kills a process at the first write for which it has no page. So the free
memory, less a reserve for everything else that a step writes, is compared before KV blocks are first written.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class MemoryBudget:
    """Measures how many more KV blocks fit into the free memory of a host. CPU only: the ranks of a host share its main
    memory.

    available_bytes: function that measures how many bytes the ranks of the host can still allocate.
    reserve_bytes: how many of these bytes KV blocks must not use.
    block_bytes: size of a KV block in bytes, summed over the host's ranks.
    num_populated: function that returns how many blocks, from the first on, already occupy memory although no step has
    written to them (pre-faulted).
    interval_seconds: time between two measurements; long enough for the second to show the memory of KV blocks that
    were returned to the kernel (retired) after the first.
    """

    available_bytes: Callable[[], int]
    reserve_bytes: int
    block_bytes: int
    num_populated: Callable[[], int] = lambda: 0
    interval_seconds: float = 0.0
    _measured_at: float = field(default=float("-inf"), init=False)

    def measure(self) -> int | None:
        """Returns how many KV blocks that occupy no memory yet may be written until the next measurement.

        If negative, memory is short: so many KV blocks must give their memory back to the kernel. Returns None if the
        last measurement is more recent than `interval_seconds`.
        """
        now = time.monotonic()
        if now - self._measured_at < self.interval_seconds:
            return None
        self._measured_at = now
        return (self.available_bytes() - self.reserve_bytes) // self.block_bytes
