"""The state of a rendezvous: which workers are connected, which rank each gets, and when an epoch can begin.

It has no sockets and no clock: the coordinator calls it.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rtp_llm.parallel.plan import Plan

MIN_EQUAL_SHARE = 0.5  # of the fingerprint's values that a member of this gang has in common with part 0


@dataclass(frozen=True)
class KVCacheSize:
    """The size of the KV cache, equal on all ranks: number of blocks, and maximum number of tokens of a sequence. Both
    are 0 if the size is not known yet.
    """

    num_blocks: int = 0
    max_seq_len: int = 0


@dataclass(eq=False)
class Worker:
    """A process that can serve as a rank. A part has one worker per rank, and a spare that replaces a lost one.

    index: number among the workers of its part. resident_rank: the rank whose weights it has in memory. rank: its rank
    in the current or last communicator. is_waiting: True while it waits for the coordinator to give it a rank; False
    while it is in a communicator, or still leaves one.
    """

    part: int
    index: int
    pid: int
    address: str
    fingerprint: dict[str, Any] = field(default_factory=dict)
    resident_rank: int | None = None
    kv_cache: KVCacheSize = KVCacheSize()
    rank: int | None = None
    is_waiting: bool = True

    @classmethod
    def from_hello(cls, message: dict[str, Any], address: str) -> "Worker":
        """Returns the worker that sent a HELLO message. Raises ValueError, KeyError or TypeError if it is invalid."""
        resident_rank = message["resident_rank"]
        return cls(
            int(message["part"]),
            int(message["index"]),
            int(message["pid"]),
            address,
            dict(message["fingerprint"]),
            None if resident_rank is None else int(resident_rank),
            KVCacheSize(int(message["num_blocks"]), int(message["max_seq_len"])),
        )


class Rendezvous:
    """The workers (processes) of a gang, and the assignment of ranks to them for each communicator."""

    def __init__(self, plan: Plan, fingerprint: dict[str, Any]):
        """`fingerprint`: fingerprint of part 0, which distinguishes members of this gang from other programs."""
        self.plan, self._fingerprint = plan, fingerprint
        self.workers: list[Worker] = []
        self.kv_cache = KVCacheSize()  # of the last epoch; a new gang of the same part 0 continues with it

    def is_member(self, part: int, fingerprint: dict[str, Any]) -> bool:
        """Returns whether a worker with this part number and fingerprint belongs to this gang: the part exists, and at
        least half of part 0's fingerprint values are equal. The others may differ, because a setting may be wrong.

        Processes of another gang have fewer equal values. With GANG_SECRET they are rejected earlier.
        """
        equal = sum(fingerprint.get(key) == value for key, value in self._fingerprint.items())
        return 0 <= part < self.plan.num_parts and equal >= MIN_EQUAL_SHARE * len(self._fingerprint)

    def twin(self, worker: Worker) -> Worker | None:
        """Returns another worker with the same part number and index: two parts were started with the same WORLD_RANK.
        None if there is none.
        """
        place = worker.part, worker.index
        return next((w for w in self.workers if w is not worker and (w.part, w.index) == place), None)

    def assign(self) -> dict[int, Worker] | None:
        """Returns the worker of each rank; None if there are too few workers, or one has not left the last communicator
        yet.

        A worker keeps the rank whose weights it has. The remaining ranks go to the workers with the lowest index;
        workers without a rank are spares.
        """
        assigned = {}
        for part in range(self.plan.num_parts):
            workers = sorted((w for w in self.workers if w.part == part), key=lambda w: w.index)
            if any(not w.is_waiting for w in workers):
                return None
            ranks = self.plan.ranks_of(part)
            residents = {w.resident_rank: w for w in reversed(workers) if w.resident_rank in ranks}
            free = iter([w for w in workers if w.resident_rank is None])
            for rank in ranks:
                worker = residents.get(rank) or next(free, None)
                if worker is None:
                    return None
                assigned[rank] = worker
        return assigned

    def begin_epoch(self, assigned: dict[int, Worker]) -> None:
        """Records which worker serves as which rank in the next communicator; the coordinator tells the workers.

        If one of them still has a KV cache from an earlier communicator, sets `kv_cache` to its size, because all ranks
        must have the same.
        """
        sizes = [w.kv_cache for w in assigned.values() if w.kv_cache.num_blocks]
        self.kv_cache = sizes[0] if sizes else self.kv_cache
        for worker in self.workers:
            worker.rank = None
        for rank, worker in assigned.items():
            worker.rank, worker.is_waiting = rank, False

    def missing(self) -> str:
        """Returns a text that lists the parts of which too few workers wait for a rank, such as `part1 (10.0.0.2:20000,
        ranks 2-3)`; empty if there are none.
        """
        parts = [p for p in range(self.plan.num_parts) if self._num_waiting(p) < self.plan.local_world_size]
        return ", ".join(self.plan.describe_part(p) for p in parts)

    def _num_waiting(self, part: int) -> int:
        return sum(w.part == part and w.is_waiting for w in self.workers)

    def differences(self) -> str:
        """Returns the differences between the fingerprints of the parts, one line per key; empty if they agree."""
        fingerprints = {f"part{w.part}": w.fingerprint for w in sorted(self.workers, key=lambda w: w.part)}
        return "".join(f"\n  {line}" for line in _different_values(fingerprints))


def _different_values(fingerprints: dict[str, dict[str, Any]]) -> Iterable[str]:
    for key in sorted({key for fingerprint in fingerprints.values() for key in fingerprint}):
        values = {part: json.dumps(fingerprint.get(key), sort_keys=True) for part, fingerprint in fingerprints.items()}
        if len(set(values.values())) > 1:
            yield f"{key}: " + "  ".join(f"{part}={value}" for part, value in values.items())
