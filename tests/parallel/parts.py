"""Parts with real processes: starts `rtp_llm.start_server`, sends requests, injects faults and checks the cleanup.

All processes of a part have a marker variable in their environment. It identifies ranks that outlive supervisord.
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
from rtp_llm.parallel.part_spec import shm_prefix
from tests.parallel.fetch import fetch
from tests.ports import busy_ports, reserved_ports

T = TypeVar("T")

REPOSITORY = Path(rtp_llm.__file__).parents[1]
DEADLINE = 90.0  # seconds for each operation; on an idle machine a start takes five
MARKER = "MARK_OF_TEST"
POLL = 0.05  # seconds
COMMAND_PATTERNS = {
    "supervisord": " -m supervisor.supervisord ",
    "guard": " rtp_llm.supervise.guard ",
    "api": " rtp_llm.api.server ",
    "coordinator": " rtp_llm.parallel.coordinator ",
}

running_parts: list["Part"] = []  # their logs are part of the report of a failed test


def orphaned_shm_files() -> set[str]:
    """Returns the names of files in /dev/shm that no process has mapped."""
    names = set(os.listdir("/dev/shm"))
    return {name for name in names if not _is_mapped(f"/dev/shm/{name}")} if names else set()


def _is_mapped(path: str) -> bool:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            if path in maps.read_text():
                return True
    return False


class Part:
    """One part: `start_server` and its child processes. At the end, the context manager stops it by a signal."""

    def __init__(
        self,
        env: Mapping[str, str],
        args: Sequence[str] = (),
        *,
        port: int,
        ranks: int = 1,
        address: str = "127.0.0.1",
        inside: Sequence[str] = (),
        temporary: Path | None = None,
    ):
        """`port`: START_PORT. `ranks`: LOCAL_WORLD_SIZE. `inside`: command prefix that enters a namespace.

        `temporary`: folder of the run directory, for one on a disk of its own.
        """
        self.port, self.ranks, self.address, self.inside = port, ranks, address, tuple(inside)
        self.root = Path(tempfile.mkdtemp(prefix="rtp-"))  # short, because socket paths are limited
        self.temporary = temporary or self.root / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self.log_path = self.root / "log"
        self._marker = secrets.token_hex(8)
        self._orphaned_before = orphaned_shm_files()
        base_env = {"PATH": os.environ["PATH"], "TMPDIR": str(self.temporary), MARKER: self._marker}
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [*self.inside, sys.executable, "-m", "rtp_llm.start_server", *args],
                env={**base_env, **env},
                cwd=REPOSITORY,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        running_parts.append(self)

    # State

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def run_dir(self) -> Path:
        """The run directory. Raises AssertionError until it exists."""
        paths = list(self.temporary.glob("rtp-llm-*"))
        assert len(paths) == 1, f"run directories: {paths}\n{self.log}"
        return paths[0]

    @property
    def epoch(self) -> int:
        """The epoch (how often the gang's ranks have started) in this part's gang status; 0 before the first start."""
        try:
            return int(json.loads((self.run_dir / "gang.json").read_text())["epoch"])
        except (OSError, AssertionError):
            return 0

    def processes(self) -> dict[int, str]:
        """Returns command lines by pid of all processes of this part, including orphans."""
        marker = f"{MARKER}={self._marker}".encode()
        commands = {}
        for directory in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if marker in (directory / "environ").read_bytes().split(b"\0"):
                    commands[int(directory.name)] = (directory / "cmdline").read_text().replace("\0", " ").strip()
        return {pid: command for pid, command in commands.items() if command}

    def pid(self, name: str) -> int:
        """Returns the pid of a process, and waits for it.

        name: `start_server`, `rank0`, `spare` (a worker that is no rank), `worker0`, or one of COMMAND_PATTERNS.
        """
        if name == "start_server":
            return self._process.pid

        def find_pid() -> int | None:
            if name.startswith("rank"):
                return self._rank_pids().get(name)
            return next((pid for pid, command in self.processes().items() if self._is(name, pid, command)), None)

        return self.until(find_pid, f"process {name}")

    def _is(self, name: str, pid: int, command: str) -> bool:
        index = r"\d+" if name == "spare" else name.removeprefix("worker")
        pattern = COMMAND_PATTERNS.get(name, rf" rtp_llm.engine.main \S+ {index}$")
        return bool(re.search(pattern, command)) and not (name == "spare" and pid in self._rank_pids().values())

    def _rank_pids(self) -> dict[str, int]:
        """Returns the pids of the gang's ranks, from its status."""
        try:
            ranks = json.loads((self.run_dir / "gang.json").read_text())["ranks"]
        except (OSError, AssertionError):
            return {}
        return {f"rank{rank}": int(status["pid"]) for rank, status in ranks.items()}

    # Requests

    def fetch(self, path: str, body: Any = None) -> tuple[int, str]:
        """Returns (status, text); status 0: no response. `body` is sent as JSON."""
        url = f"http://{self.address}:{self.port}{path}"
        data = None if body is None else json.dumps(body)
        if not self.inside:
            return fetch(url, data)
        script = [sys.executable, str(Path(__file__).with_name("fetch.py")), url, *([data] if data else [])]
        command = [*self.inside, *script]
        completed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=DEADLINE)
        status, text = json.loads(completed.stdout)
        return int(status), str(text)

    def complete(self, body: Mapping[str, Any]) -> str:
        """Returns the text of a /v1/completions response."""
        status, text = self.fetch("/v1/completions", dict(body))
        assert status == 200, f"{status}: {text}\n{self.log}"
        return str(json.loads(text)["choices"][0]["text"])

    # Waiting

    def until(self, condition: Callable[[], T | None], description: str, seconds: float = DEADLINE) -> T:
        """Polls until `condition` returns a true value. Returns that value. Fails if the part ends or time runs out."""
        deadline = time.monotonic() + seconds
        while True:
            value = condition()
            if value:
                return value
            code = self._process.poll()
            assert code is None, f"exited with {code} before: {description}\n{self.log}"
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {description}\n{self.log}"
            time.sleep(POLL)

    def wait_healthy(self, epoch: int = 1) -> Self:
        """Waits until /health returns 200 in this epoch (start of the gang's ranks) or a later one."""
        self.until(lambda: self.epoch >= epoch and self.fetch("/health") == (200, '"ok"'), f"healthy, epoch {epoch}")
        return self

    def wait_log(self, text: str, times: int = 1) -> None:
        self.until(lambda: self.log.count(text) >= times, f"{times} times in the log: {text!r}")

    def wait_end(self, seconds: float = DEADLINE) -> int:
        """Waits for start_server to exit. Returns its exit code."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:g} s\n{self.log}") from None

    # Faults

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid(name), number)

    # End

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Sends a stop signal without waiting for the end."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def assert_nothing_left(self) -> None:
        """Asserts that no process runs, ports are free, /dev/shm has no new file and the temporary folder is empty."""
        self.assert_no_process_left()
        if not self.inside:
            self._assert_ports_are_free()
        self._assert_no_shared_memory_left()
        assert list(self.temporary.iterdir()) == [], self.log

    def assert_no_process_left(self, seconds: float = 5) -> None:
        """Asserts that no process of this part runs. The kernel has `seconds` to end killed processes."""
        deadline = time.monotonic() + seconds
        while self.processes() and time.monotonic() < deadline:
            time.sleep(POLL)
        left = self.processes()
        assert left == {}, f"{left}\n{self.log}"

    def _assert_ports_are_free(self, seconds: float = 5) -> None:
        """Asserts that no port of this part is open, within `seconds`.

        The kernel releases the memory of a process that ends, and with it the environment by which `processes` knows
        it, before it closes its sockets.
        """
        ports = reserved_ports(self.port, self.ranks)
        deadline = time.monotonic() + seconds
        while busy_ports(ports) and time.monotonic() < deadline:
            time.sleep(POLL)
        assert busy_ports(ports) == [], self.log

    def _assert_no_shared_memory_left(self, seconds: float = 5) -> None:
        """Asserts that /dev/shm has no orphaned file, except segments of other tests' parts, whose ranks may be killed.

        Waits up to `seconds`, because another test may not have mapped its new file yet.
        """
        deadline = time.monotonic() + seconds
        while (orphaned := self._orphaned_files()) and time.monotonic() < deadline:
            time.sleep(POLL)
        assert not orphaned, f"orphaned in /dev/shm: {orphaned}\n{self.log}"

    def _orphaned_files(self) -> set[str]:
        run_dirs = re.findall(r"HTTP on port \d+, state in (\S+)", self.log)
        own_prefixes = (*(shm_prefix(Path(path)) for path in run_dirs), f"rtp-llm-{self.port:012x}-")
        orphaned = orphaned_shm_files() - self._orphaned_before
        # Of other parts, of groups that tests open without a part, and semaphores of the multiprocessing of such tests,
        # which no process maps by name.
        foreign_prefixes = ("rtp-llm-", "rtp-test-", "sem.mp-")
        return {name for name in orphaned if not name.startswith(foreign_prefixes) or name.startswith(own_prefixes)}

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

    def kill_all(self) -> None:
        """Kills all remaining processes."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def destroy(self) -> None:
        """Kills all remaining processes and removes the files."""
        self.kill_all()
        self._process.wait()
        shutil.rmtree(self.root, ignore_errors=True)
        running_parts.remove(self)


class Gang:
    """The parts of one gang, part 0 first. At the end, the context manager stops all of them at the same time."""

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
