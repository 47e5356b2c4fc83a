"""Runs injections of many faults, in lanes side by side; what an earlier run has recorded is not run again."""

import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import wait
from pathlib import Path

from tests import random_model
from tests.chaos.driver import Injection
from tests.chaos.faults import Fault
from tests.chaos.lane import Ended, Skipped, Start, log_path, running_lane

MAX_PER_START = 10  # so few that all faults have about the same number whenever a campaign is stopped


class Records:
    """The injections so far, in a file with one JSON object per line."""

    def __init__(self, path: Path | None):
        """`path`: None keeps them in memory."""
        self._path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        self.injections = [Injection(**json.loads(line)) for line in lines]

    def add(self, injection: Injection) -> None:
        content = injection.to_json()
        self.injections.append(Injection(**content))  # rounded, as the next run will read it
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(f"{json.dumps(content)}\n")

    def numbers(self, fault: str) -> list[int]:
        return [injection.number for injection in self.injections if injection.fault == fault]


class Plan:
    """Which injections come next: those of the fault with the fewest. `skipped`: reasons by name of the fault."""

    def __init__(self, faults: Iterable[str], records: Records, num_injections: int, seed: int):
        numbers = {name: records.numbers(name) for name in faults}
        self.skipped: dict[str, str] = {}
        self._num_planned = {name: len(found) for name, found in numbers.items()}  # recorded or under way
        self._next_number = {name: max(found, default=-1) + 1 for name, found in numbers.items()}
        self._num_injections, self._seed = num_injections, seed

    def next_start(self) -> Start | None:
        """Returns what a free lane does; None if no fault needs more than is under way."""
        name = min(self._num_planned, key=self._num_planned.__getitem__, default="")
        missing = self._num_injections - self._num_planned.get(name, self._num_injections)
        if missing <= 0:
            return None
        first, count = self._next_number[name], min(missing, MAX_PER_START)
        self._num_planned[name] += count
        self._next_number[name] += count
        return Start(name, self._seed, range(first, first + count))

    def end(self, start: Start, num_recorded: int) -> None:
        """Plans again what a start has not reached."""
        if start.fault in self._num_planned:
            self._num_planned[start.fault] -= len(start.numbers) - num_recorded

    def skip(self, fault: str, reason: str) -> None:
        self.skipped[fault] = reason
        self._num_planned.pop(fault, None)


def run(
    faults: Iterable[Fault],
    records: Records,
    num_injections: int,
    seed: int,
    *,
    deadline: float = float("inf"),
    num_lanes: int = 1,
    pause_file: Path | None = None,
) -> dict[str, str]:
    """Brings every fault to `num_injections`. From `deadline` (monotonic seconds) on, no gang is started any more.

    No lane begins an injection while `pause_file` exists. Returns why faults were skipped, by name.
    """
    plan = Plan([fault.name for fault in faults], records, num_injections, seed)
    with _tiny_checkpoint() as checkpoint, ExitStack() as stack:
        lanes = [stack.enter_context(running_lane(checkpoint, pause_file)) for _ in range(num_lanes)]
        while True:
            for lane in lanes:
                if not lane.is_busy and time.monotonic() < deadline and (start := plan.next_start()):
                    lane.begin(start)
            busy = {lane.connection: lane for lane in lanes if lane.is_busy}
            if not busy:
                return plan.skipped
            for connection in wait(list(busy)):
                _note(busy[connection].receive(), plan, records)  # type: ignore[index]


def _note(message: Injection | Skipped | Ended, plan: Plan, records: Records) -> None:
    match message:
        case Injection():
            records.add(message)
            print(describe(message), flush=True)
        case Skipped(fault, reason):
            plan.skip(fault, reason)
            print(f"{fault}: skipped: {reason}", flush=True)
        case Ended(start):
            plan.end(start, len(set(start.numbers) & set(records.numbers(start.fault))))


def describe(record: Injection) -> str:
    """Returns the lines about one injection that a run prints."""
    noticed = "never" if record.noticed is None else f"after {record.noticed:.2f} s"
    lines = [
        f"{record.fault} {record.number}: {record.target or '-'}, {record.in_flight} in flight, lasted"
        f" {record.lasted:.1f} s: pause {record.pause:.2f} s, /health noticed {noticed}, was well after"
        f" {record.healthy:.2f} s, wrong for {record.wrong:.2f} s, late for {record.late:.2f} s; took"
        f" {record.took:.1f} s; {record.outcomes}",
        *(f"  {problem}" for problem in record.problems),
    ]
    if record.problems:
        lines.append(f"  log: {log_path(record)}")
    return "\n".join(lines)


@contextmanager
def _tiny_checkpoint() -> Iterator[Path]:
    """A checkpoint with random weights, whose greedy text does not depend on the number of ranks."""
    with tempfile.TemporaryDirectory(prefix="rtp-chaos-") as folder:
        path = Path(folder) / "model"
        random_model.write(path)
        yield path
