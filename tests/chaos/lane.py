"""A lane of a campaign: a process that starts one gang after another and injects faults, beside other lanes."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from tests.chaos.driver import Injection, inject
from tests.chaos.faults import FAULTS, Fault, NotHereError
from tests.chaos.load import undisturbed_texts
from tests.chaos.rig import Rig, running_rig

RESTARTS_PER_START = 3  # the delay before a restart doubles with each
PAUSE_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Start:
    """Injections into one gang: those of a fault with these numbers."""

    fault: str
    seed: int
    numbers: range


@dataclass(frozen=True)
class Skipped:
    """Why a fault cannot be injected here."""

    fault: str
    reason: str


@dataclass(frozen=True)
class Ended:
    """The gang of a start has ended, perhaps before its last injection."""

    start: Start


class Lane:
    """The parent's end of a lane. `connection` becomes readable with each message, and when the process ends."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.is_busy = False

    def begin(self, start: Start) -> None:
        self.is_busy = True
        self.connection.send(start)

    def receive(self) -> Injection | Skipped | Ended:
        """Raises RuntimeError if the process has ended."""
        try:
            message: Injection | Skipped | Ended = self.connection.recv()
        except EOFError:
            raise RuntimeError("a lane has ended, see its traceback above") from None
        self.is_busy = not isinstance(message, Ended)
        return message


@contextmanager
def running_lane(checkpoint: Path, pause_file: Path | None) -> Iterator[Lane]:
    """Starts a process that runs what it is told to. At the end it removes whatever it has created."""
    here, there = multiprocessing.Pipe()
    spawn = multiprocessing.get_context("spawn")  # the parent may have threads
    process = spawn.Process(target=_run_starts, args=(there, checkpoint, pause_file))
    process.start()
    there.close()
    try:
        yield Lane(here)
    finally:
        process.terminate()
        process.join()


def end_when_told() -> None:
    """Makes SIGTERM an exit that leaves all context managers."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _run_starts(parent: Connection, checkpoint: Path, pause_file: Path | None) -> None:
    """The main function of the process: runs starts until SIGTERM."""
    end_when_told()
    texts: dict[str, dict[int, str]] = {}  # undisturbed, from the first gang
    while True:
        start: Start = parent.recv()
        try:
            for record in _run_start(start, checkpoint, texts, pause_file):
                parent.send(record)
        except NotHereError as reason:
            parent.send(Skipped(start.fault, str(reason)))
        parent.send(Ended(start))


def _run_start(
    start: Start, checkpoint: Path, texts: dict[str, dict[int, str]], pause_file: Path | None
) -> Iterator[Injection]:
    """Starts a gang, and injects the fault until the last number or until restarts become slow. Raises NotHereError."""
    fault = FAULTS[start.fault]
    if not fault.plain and os.geteuid() != 0:
        raise NotHereError("needs root, for namespaces, mounts and cgroups")
    _wait_while_exists(pause_file)
    with running_rig(fault.layout, checkpoint, fault.settings()) as rig:
        try:
            rig.wait_healthy()
        except AssertionError as error:
            problems = [f"at the start: {str(error).splitlines()[0]}"]
            yield _with_log(Injection(fault.name, start.seed, start.numbers[0], problems=problems), rig)
            return
        if not texts:
            texts.update(undisturbed_texts(rig.endpoint))
        for index, number in enumerate(start.numbers):
            _wait_while_exists(pause_file)
            record = inject(fault, rig, texts, start.seed, number)
            if number == start.numbers[-1] or _restarts_slowly(rig, fault, index) or not rig.is_running():
                record.problems += rig.stop()
            yield _with_log(record, rig)
            if not rig.is_running():
                return


def _restarts_slowly(rig: Rig, fault: Fault, index: int) -> bool:
    return index >= RESTARTS_PER_START - 1 and rig.num_restarts() >= RESTARTS_PER_START


def _wait_while_exists(path: Path | None) -> None:
    while path and path.exists():
        time.sleep(PAUSE_POLL_SECONDS)


def log_path(record: Injection) -> Path:
    """Returns where the log of the parts is kept if there are problems."""
    return Path("build/chaos") / f"{record.fault}-{record.number}.log"


def _with_log(record: Injection, rig: Rig) -> Injection:
    if record.problems:
        log_path(record).parent.mkdir(parents=True, exist_ok=True)
        log_path(record).write_text(rig.log())
    return record
