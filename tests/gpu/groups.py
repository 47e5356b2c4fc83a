"""Runs groups of tests in separate processes, so that a CUDA error in one process does not affect the others.

Imports the standard library only.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.environment import ROOT
from tests.gpu.report import Result

POLL = 0.1
TEST_SECONDS = 90  # for one test; pytest-timeout then ends the process
MOST_STARTS = 6  # of processes for one shard
FINISHED = (0, 1, 5)  # pytest's: all passed, some failed, nothing left to run
TAIL = 3000

Json = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """One file of tests. `seconds` limits the whole group; `shards` processes share its tests."""

    name: str
    file: str
    seconds: float
    shards: int = 1


@dataclass
class Shard:
    """A process that runs a share of a group. A new process replaces a lost one."""

    group: Group
    number: int
    folder: Path
    env: Mapping[str, str]
    started: int = 0
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def record(self) -> Path:
        return self.folder / f"{self.group.name}-{self.number}.jsonl"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.group.name}-{self.number}.log"

    def start(self) -> None:
        self.started += 1
        env = {
            **self.env,
            "RTP_TEST_RECORD": str(self.record),
            "RTP_TEST_SHARD": f"{self.number}/{self.group.shards}",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # other plugins may be installed there
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command(self.group.file), cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
            )

    def go_on(self) -> bool:
        """Returns whether tests are left. Replaces a lost process by one that continues after the lost test."""
        assert self.process
        code = self.process.poll()
        if code is None:
            return True
        if code in FINISHED:
            return False
        self._sweep()
        settle(self.record, "lost", f"its process ended with {code}", self._tail())
        if self.started >= MOST_STARTS or (code > 1 and not self.record.exists()):
            return False
        self.start()
        return True

    def end(self, reason: str) -> None:
        """Kills the process and all processes that it started."""
        assert self.process
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            settle(self.record, "timeout", reason, self._tail())
        self._sweep()

    def _sweep(self) -> None:
        """Kills what a lost process left. A server has a process group of its own, but the same RTP_TEST_RECORD."""
        mark = f"RTP_TEST_RECORD={self.record}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signal.SIGKILL)

    def results(self) -> list[Result]:
        found = [line for line in lines(self.record) if "result" in line]
        results = [Result(self.group.name, short(f["test"]), *(f[k] for k in FIELDS)) for f in found]
        if self.process and self.process.returncode not in FINISHED:
            reason = f"the process ended with {self.process.returncode}; the tests behind it were not run"
            results.append(Result(self.group.name, f"shard {self.number}", "not run", 0.0, reason, self._tail()))
        elif not results:
            results.append(Result(self.group.name, f"shard {self.number}", "not run", 0.0, "no tests", self._tail()))
        return results

    def speeds(self) -> list[Json]:
        return [speed for line in lines(self.record) for speed in line.get("speeds", ())]

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-TAIL:] if self.log.exists() else ""


FIELDS = ("result", "seconds", "reason", "detail")


def command(file: str) -> list[str]:
    """Returns the pytest command. Warnings do not fail here, since versions of packages differ between machines."""
    plugins = ["-p", "pytest_timeout", "-p", "tests.gpu.plugin", "-p", "no:cacheprovider"]
    timeout = [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]
    return [
        *(sys.executable, "-m", "pytest", file, *plugins, *timeout),
        *("-o", "minversion=8", "-o", "filterwarnings=default", "--tb=short", "-q"),
    ]


def run(group: Group, env: Mapping[str, str], folder: Path, seconds: float) -> list[Shard]:
    """Runs a group to its end, or until `seconds` have passed."""
    shards = [Shard(group, number, folder, env) for number in range(1, group.shards + 1)]
    for shard in shards:
        shard.start()
    deadline = time.monotonic() + seconds
    try:
        while any([shard.go_on() for shard in shards]) and time.monotonic() < deadline:
            time.sleep(POLL)
    finally:
        for shard in shards:
            shard.end(f"the group's {seconds:.0f} s were over")
    return shards


def settle(record: Path, result: str, reason: str, detail: str) -> None:
    """Records this result for each test that has a start but no end."""
    known = lines(record)
    ended = {line["test"] for line in known if "result" in line}
    open_ones = dict.fromkeys(line["test"] for line in known if line["test"] not in ended)
    with record.open("a") as file:
        for test in open_ones:
            line = {"test": test, "result": result, "seconds": 0.0, "reason": reason, "detail": detail}
            file.write(json.dumps(line) + "\n")


def lines(record: Path) -> list[Json]:
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def short(node: str) -> str:
    """ "tests/gpu/parity.py::TestParity::test_fp32[llama]" → "fp32[llama]"."""
    return node.split("::")[-1].removeprefix("test_")


def chosen(groups: Sequence[Group], names: Sequence[str]) -> list[Group]:
    """Returns the groups with these names, or all groups without names. Raises ValueError."""
    known = [group.name for group in groups]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no group {', '.join(unknown)}; there are {', '.join(known)}")
    return [group for group in groups if not names or group.name in names]
