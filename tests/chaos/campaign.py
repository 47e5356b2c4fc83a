"""Runs injections of many faults one after the other; what an earlier run has recorded is not run again."""

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import random_model
from tests.chaos.driver import Injection, inject
from tests.chaos.faults import Fault, NotHereError
from tests.chaos.load import undisturbed_texts
from tests.chaos.rig import Rig, running_rig

MAX_PER_START = 10
RESTARTS_PER_START = 3  # the delay before a restart doubles with each


class Records:
    """The injections so far, in a file with one JSON object per line."""

    def __init__(self, path: Path | None):
        """`path`: None keeps them in memory."""
        self._path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        self.injections = [Injection(**json.loads(line)) for line in lines]

    def add(self, injection: Injection) -> None:
        self.injections.append(injection)
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(f"{json.dumps(injection.to_json())}\n")

    def of(self, fault: Fault) -> list[Injection]:
        return [injection for injection in self.injections if injection.fault == fault.name]


def run(
    faults: Iterable[Fault], records: Records, num_injections: int, seed: int, deadline: float = float("inf")
) -> dict[str, str]:
    """Brings every fault to `num_injections`, a start of each in turn, until `deadline` (monotonic seconds).

    Returns why faults were skipped, by name.
    """
    skipped: dict[str, str] = {}
    texts: dict[str, dict[int, str]] = {}  # undisturbed, from the first gang
    open_faults = list(faults)
    with _tiny_checkpoint() as checkpoint:
        while open_faults and time.monotonic() < deadline:
            for fault in list(open_faults):
                missing = num_injections - len(records.of(fault))
                if missing <= 0 or time.monotonic() > deadline:
                    open_faults.remove(fault)
                    continue
                try:
                    _run_start(fault, checkpoint, texts, records, min(missing, MAX_PER_START), seed)
                except NotHereError as reason:
                    skipped[fault.name] = str(reason)
                    print(f"{fault.name}: skipped: {reason}", flush=True)
                    open_faults.remove(fault)
    return skipped


def _run_start(
    fault: Fault, checkpoint: Path, texts: dict[str, dict[int, str]], records: Records, num_injections: int, seed: int
) -> None:
    """Starts a gang and injects a fault so often, or until restarts become slow. Raises NotHereError."""
    if not fault.plain and os.geteuid() != 0:
        raise NotHereError("needs root, for namespaces, mounts and cgroups")
    with running_rig(fault.layout, checkpoint, fault.settings()) as rig:
        try:
            rig.wait_healthy()
        except AssertionError as error:
            problems = [f"at the start: {str(error).splitlines()[0]}"]
            _add(records, Injection(fault.name, seed, len(records.of(fault)), problems=problems), rig)
            return
        if not texts:
            texts.update(undisturbed_texts(rig.endpoint))
        for index in range(num_injections):
            record = inject(fault, rig, texts, seed, len(records.of(fault)))
            restarts_slowly = index >= RESTARTS_PER_START - 1 and rig.num_restarts() >= RESTARTS_PER_START
            if index == num_injections - 1 or restarts_slowly or not rig.is_running():
                record.problems += rig.stop()
            _add(records, record, rig)
            if not rig.is_running():
                return


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
    return "\n".join(lines)


def _add(records: Records, record: Injection, rig: Rig) -> None:
    """Adds a record, and keeps the log of the parts if there are problems."""
    records.add(record)
    print(describe(record), flush=True)
    if not record.problems:
        return
    path = Path("build/chaos") / f"{record.fault}-{record.number}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rig.log())
    print(f"  log: {path}", flush=True)


@contextmanager
def _tiny_checkpoint() -> Iterator[Path]:
    """A checkpoint with random weights, whose greedy text does not depend on the number of ranks."""
    with tempfile.TemporaryDirectory(prefix="rtp-chaos-") as folder:
        path = Path(folder) / "model"
        random_model.write(path)
        yield path
