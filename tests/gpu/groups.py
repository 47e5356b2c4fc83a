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

POLL_SECONDS = 0.1
TEST_TIMEOUT_SECONDS = 90  # per test; pytest-timeout then ends the process
MAX_STARTS = 6  # processes for one shard, one after another
FINISHED_EXIT_CODES = (0, 1, 5)  # of pytest: all passed, some failed, no tests left
LOG_TAIL_CHARS = 3000

Json = dict[str, Any]


@dataclass(frozen=True)
class SuiteGroup:
    """One file of tests, run by `shards` processes. `seconds`: time limit of the whole group."""

    name: str
    file: str
    seconds: float
    shards: int = 1


@dataclass
class Shard:
    """Runs one shard of a group in a process. Starts a new process if one is lost."""

    group: SuiteGroup
    number: int
    log_dir: Path
    env: Mapping[str, str]
    num_starts: int = 0
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def record_path(self) -> Path:
        return self.log_dir / f"{self.group.name}-{self.number}.jsonl"

    @property
    def log_path(self) -> Path:
        return self.log_dir / f"{self.group.name}-{self.number}.log"

    def start(self) -> None:
        self.num_starts += 1
        env = {
            **self.env,
            "RTP_TEST_RECORD": str(self.record_path),
            "RTP_TEST_SHARD": f"{self.number}/{self.group.shards}",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # the machine may have other plugins installed
        }
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                pytest_command(self.group.file), cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
            )

    def restart_if_lost(self) -> bool:
        """Returns whether the shard is running. Replaces a lost process by one that continues after the lost test."""
        assert self.process
        code = self.process.poll()
        if code is None:
            return True
        # pytest-timeout ends the process with 1 as well, in the middle of a test.
        if code in FINISHED_EXIT_CODES and not unfinished_tests(self.record_path):
            return False
        self._kill_leftovers()
        record_unfinished(self.record_path, "lost", f"its process ended with {code}", self._log_tail())
        if self.num_starts >= MAX_STARTS or (code > 1 and not self.record_path.exists()):
            return False
        self.start()
        return True

    def stop(self, reason: str) -> None:
        """Kills the process and all processes that it started."""
        assert self.process
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            record_unfinished(self.record_path, "timeout", reason, self._log_tail())
        self._kill_leftovers()

    def _kill_leftovers(self) -> None:
        """Kills processes that a lost process started, such as servers, which have a process group of their own. Finds
        them by RTP_TEST_RECORD in their environment."""
        variable = f"RTP_TEST_RECORD={self.record_path}".encode()
        for process_dir in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if variable in (process_dir / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process_dir.name), signal.SIGKILL)

    def results(self) -> list[Result]:
        lines = [line for line in read_record(self.record_path) if "result" in line]
        results = [
            Result(self.group.name, short_name(line["test"]), *(line[k] for k in RESULT_FIELDS)) for line in lines
        ]
        if self.process and self.process.returncode not in FINISHED_EXIT_CODES:
            reason = f"the process ended with {self.process.returncode}; its remaining tests were not run"
            results.append(Result(self.group.name, f"shard {self.number}", "not run", 0.0, reason, self._log_tail()))
        elif not results:
            reason = "no tests"
            results.append(Result(self.group.name, f"shard {self.number}", "not run", 0.0, reason, self._log_tail()))
        return results

    def speeds(self) -> list[Json]:
        return [speed for line in read_record(self.record_path) for speed in line.get("speeds", ())]

    def _log_tail(self) -> str:
        return self.log_path.read_text(errors="replace")[-LOG_TAIL_CHARS:] if self.log_path.exists() else ""


RESULT_FIELDS = ("result", "seconds", "reason", "detail")


def pytest_command(file: str) -> list[str]:
    """Returns the pytest command. Warnings are not errors, since versions of packages differ between machines."""
    plugins = ["-p", "pytest_timeout", "-p", "tests.gpu.plugin", "-p", "no:cacheprovider"]
    timeout = [f"--timeout={TEST_TIMEOUT_SECONDS}", "--timeout-method=thread"]
    return [
        *(sys.executable, "-m", "pytest", file, *plugins, *timeout),
        *("-o", "minversion=8", "-o", "filterwarnings=default", "--tb=short", "-q"),
    ]


def run_group(group: SuiteGroup, env: Mapping[str, str], log_dir: Path, seconds: float) -> list[Shard]:
    """Runs a group until it ends, at most for `seconds`."""
    shards = [Shard(group, number, log_dir, env) for number in range(1, group.shards + 1)]
    for shard in shards:
        shard.start()
    deadline = time.monotonic() + seconds
    try:
        while any([shard.restart_if_lost() for shard in shards]) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    finally:
        for shard in shards:
            shard.stop(f"the group's time limit of {seconds:.0f} s")
    return shards


def record_unfinished(record: Path, result: str, reason: str, detail: str) -> None:
    """Records this result for each test that started and did not finish."""
    unfinished = unfinished_tests(record)
    with record.open("a") as file:
        for test in unfinished:
            entry = {"test": test, "result": result, "seconds": 0.0, "reason": reason, "detail": detail}
            file.write(json.dumps(entry) + "\n")


def unfinished_tests(record: Path) -> list[str]:
    """Returns the tests that started and did not finish, in order."""
    entries = read_record(record)
    finished = {entry["test"] for entry in entries if "result" in entry}
    return list(dict.fromkeys(entry["test"] for entry in entries if entry["test"] not in finished))


def read_record(record: Path) -> list[Json]:
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def short_name(node: str) -> str:
    """Returns the name of a test: "tests/gpu/parity.py::TestParity::test_fp32[llama]" → "fp32[llama]"."""
    return node.split("::")[-1].removeprefix("test_")


def select_groups(groups: Sequence[SuiteGroup], names: Sequence[str]) -> list[SuiteGroup]:
    """Returns the groups with these names, all groups if `names` is empty. Raises ValueError if a name is unknown."""
    all_names = [group.name for group in groups]
    unknown = [name for name in names if name not in all_names]
    if unknown:
        raise ValueError(f"no group {', '.join(unknown)}; there are {', '.join(all_names)}")
    return [group for group in groups if not names or group.name in names]
