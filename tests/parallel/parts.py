"""Parts made of real processes: starts `rtp_llm.start_server`, talks to it, hurts it, and sees that nothing is left.

Every process of a part carries a mark in its environment, which it cannot lose by being orphaned: that is how a rank
that outlived its supervisor is found.
"""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import rtp_llm
from tests.parallel.fetch import fetch
from tests.ports import busy, reserved_ports

T = TypeVar("T")

REPOSITORY = Path(rtp_llm.__file__).parents[1]
DEADLINE = 90.0  # seconds for anything a part does; on an idle machine a start takes five
MARK = "MARK_OF_TEST"
POLL = 0.05
MODULES = {
    "supervisord": " -m supervisor.supervisord ",
    "guard": " -m rtp_llm.supervise.guard ",
    "api": " -m rtp_llm.api.main ",
}

running: list["Part"] = []  # whose output is of interest when a test fails


def shared_memory() -> set[str]:
    """Files in /dev/shm that no process holds: what a process of ours would leave behind."""
    names = set(os.listdir("/dev/shm"))
    return {name for name in names if not _held(f"/dev/shm/{name}")} if names else set()


def _held(path: str) -> bool:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            if path in maps.read_text():
                return True
    return False


class Part:
    """One part: a `start_server` with everything below it. A context manager that stops it orderly at the end."""

    def __init__(
        self,
        env: Mapping[str, str],
        args: Sequence[str] = (),
        *,
        port: int,
        ranks: int = 1,
        address: str = "127.0.0.1",
        inside: Sequence[str] = (),
    ):
        """`port` is its START_PORT, `ranks` its LOCAL_WORLD_SIZE; `inside`: the words that run a command where the
        part is to run, for a network namespace.
        """
        self.port, self.ranks, self.address, self.inside = port, ranks, address, tuple(inside)
        self.root = Path(tempfile.mkdtemp(prefix="rtp-"))  # short, for the sockets in it
        self.temporary = self.root / "tmp"
        self.temporary.mkdir()
        self.log_path = self.root / "log"
        self._mark = secrets.token_hex(8)
        self._shared_memory = shared_memory()
        own = {"PATH": os.environ["PATH"], "TMPDIR": str(self.temporary), MARK: self._mark}
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [*self.inside, sys.executable, "-m", "rtp_llm.start_server", *args],
                env={**own, **env},
                cwd=REPOSITORY,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        running.append(self)

    # What it is and says

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def run_dir(self) -> Path:
        """Raises AssertionError until there is one."""
        found = list(self.temporary.glob("rtp-llm-*"))
        assert len(found) == 1, f"run directories: {found}\n{self.log}"
        return found[0]

    @property
    def epoch(self) -> int:
        """The gang's epoch as this part has heard of it; 0 before the first."""
        try:
            return int(json.loads((self.run_dir / "gang.json").read_text())["epoch"])
        except (OSError, AssertionError):
            return 0

    def processes(self) -> dict[int, str]:
        """pid and command line of every process of this part, orphans included."""
        mark = f"{MARK}={self._mark}".encode()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
        return {pid: command for pid, command in found.items() if command}

    def pid(self, name: str) -> int:
        """pid of `rank0`, `api`, `guard` or `supervisord`, for which it waits; or `start_server`."""
        if name == "start_server":
            return self._process.pid
        rank = name.removeprefix("rank")
        pattern = re.compile(rf" -m rtp_llm.engine.main \S+ {rank}$" if rank.isdigit() else MODULES[name])

        def look() -> int | None:
            return next((pid for pid, command in self.processes().items() if pattern.search(command)), None)

        return self.until(look, f"process {name}")

    # Talking to it

    def fetch(self, path: str, body: Any = None) -> tuple[int, str]:
        """(status, text); status 0: nobody answers. `body` is sent as JSON."""
        url = f"http://{self.address}:{self.port}{path}"
        data = None if body is None else json.dumps(body)
        if not self.inside:
            return fetch(url, data)
        script = [sys.executable, str(Path(__file__).with_name("fetch.py")), url, *([data] if data else [])]
        done = subprocess.run([*self.inside, *script], capture_output=True, text=True, check=True, timeout=DEADLINE)
        status, text = json.loads(done.stdout)
        return int(status), str(text)

    def complete(self, body: Mapping[str, Any]) -> str:
        """The text that /v1/completions answers."""
        status, text = self.fetch("/v1/completions", dict(body))
        assert status == 200, f"{status}: {text}\n{self.log}"
        return str(json.loads(text)["choices"][0]["text"])

    # Waiting for it

    def until(self, condition: Callable[[], T | None], what: str, seconds: float = DEADLINE) -> T:
        """What `condition` gives as soon as that is true; at once an error where the part ends meanwhile."""
        deadline = time.monotonic() + seconds
        while True:
            found = condition()
            if found:
                return found
            code = self._process.poll()
            assert code is None, f"ended with {code} before: {what}\n{self.log}"
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}\n{self.log}"
            time.sleep(POLL)

    def wait_healthy(self, epoch: int = 1) -> Self:
        """Until /health answers 200 in this epoch or a later one."""
        self.until(lambda: self.epoch >= epoch and self.fetch("/health") == (200, '"ok"'), f"healthy, epoch {epoch}")
        return self

    def wait_log(self, text: str, times: int = 1) -> None:
        self.until(lambda: self.log.count(text) >= times, f"{times} times in the log: {text!r}")

    def wait_end(self, seconds: float = DEADLINE) -> int:
        """The exit code of start_server."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:g} s\n{self.log}") from None

    # Hurting it

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid(name), number)

    # Its end

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Asks for an orderly end, and does not wait."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def assert_nothing_left(self) -> None:
        """No process of it lives, its ports are free, nothing new lies in /dev/shm, its temporary folder is empty."""
        self.assert_no_process_left()
        if not self.inside:
            assert busy(reserved_ports(self.port, self.ranks)) == [], self.log
        self._assert_no_shared_memory_left()
        assert list(self.temporary.iterdir()) == [], self.log

    def assert_no_process_left(self, seconds: float = 5) -> None:
        """`seconds`: for the kernel to end what it was told to end."""
        deadline = time.monotonic() + seconds
        while self.processes() and time.monotonic() < deadline:
            time.sleep(POLL)
        assert self.processes() == {}, self.log

    def _assert_no_shared_memory_left(self, seconds: float = 5) -> None:
        """`seconds`: a part of another test may be between creating a segment and mapping it."""
        deadline = time.monotonic() + seconds
        while (left := shared_memory() - self._shared_memory) and time.monotonic() < deadline:
            time.sleep(POLL)
        assert left == set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self.stop()
                self.wait_end()
                self.assert_nothing_left()
        finally:
            self.destroy()

    def destroy(self) -> None:
        """Ends what is left of it by force, whatever has happened."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self.root, ignore_errors=True)
        running.remove(self)


class Gang:
    """The parts of one gang, part 0 first. Its end asks all of them to stop at the same moment."""

    def __init__(self, *parts: Part):
        self.parts = parts

    @property
    def leader(self) -> Part:
        return self.parts[0]

    def wait_healthy(self, epoch: int = 1) -> Self:
        for part in self.parts:
            part.wait_healthy(epoch)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            for part in self.parts:
                part.stop()
        stack = ExitStack()
        for part in self.parts:
            stack.push(part)
        stack.__exit__(kind, error, at)
