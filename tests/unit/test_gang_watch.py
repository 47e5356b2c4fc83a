"""The guard's view of the gang: gang.json, the roles of processes, and what it may kill."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.wire import FrameType
from rtp_llm.supervise import gang_watch
from rtp_llm.supervise.gang_watch import GangWatch
from tests.parallel.rendezvous import part_specs


@pytest.fixture
def specs(tmp_path: Path) -> list[PartSpec]:
    return part_specs(tmp_path, gang_sleep_time=1000)


def status(epoch: int = 1, message: str = "", **ranks: Any) -> dict[str, Any]:
    """Returns a gang status. ranks: (part, pid) by `rank0` …"""
    by_rank = {name.removeprefix("rank"): {"part": part, "pid": pid} for name, (part, pid) in ranks.items()}
    verdicts = {"1": "request"}
    return {"epoch": epoch, "ranks": by_rank, "message": message, "verdicts": verdicts, "pid": 7, "in_epoch": True}


def handle(watch: GangWatch, message: dict[str, Any], frame_type: FrameType = FrameType.GANG_STATUS) -> None:
    watch._handle_frame(frame_type, message)


def test_status_is_written_for_the_api(specs: list[PartSpec]) -> None:
    watch = GangWatch(specs[0])
    handle(watch, status(rank0=(0, 10)))
    assert json.loads(specs[0].gang_status_path.read_text()) == status(rank0=(0, 10))
    assert (watch.coordinator_pid, watch.verdicts, watch.num_messages) == (7, {"1": "request"}, 1)


def test_full_disk_is_no_reason_to_fail(specs: list[PartSpec], caplog: pytest.LogCaptureFixture) -> None:
    specs[0].gang_status_path.mkdir()  # makes the write fail, also as root
    watch = GangWatch(specs[0])
    handle(watch, status(rank0=(0, 10)))
    assert watch.roles == {10: (0, 1)}
    assert "cannot write" in caplog.text


def test_role_of_a_process_is_its_last_one(specs: list[PartSpec]) -> None:
    """The guard asks after the process has ended, when it is no longer in the status."""
    watch = GangWatch(specs[0])
    handle(watch, status(1, rank0=(0, 10), rank1=(1, 20)))
    handle(watch, status(2, rank0=(0, 11), rank1=(1, 20)))
    assert watch.roles == {10: (0, 1), 11: (0, 2)}


def test_roles_of_a_long_life_are_bounded(specs: list[PartSpec]) -> None:
    watch = GangWatch(specs[0])
    for pid in range(gang_watch.MAX_KNOWN_PIDS + 50):
        handle(watch, status(pid, rank0=(0, pid)))
    assert len(watch.roles) == gang_watch.MAX_KNOWN_PIDS
    assert watch.roles[pid] == (0, pid)


def test_reason_of_the_wait_is_logged_once_until_it_changes(
    specs: list[PartSpec], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gang_watch, "LOG_INTERVAL_SECONDS", 1000)
    caplog.set_level(logging.INFO)
    watch = GangWatch(specs[0])
    for message in ("waiting for part1", "waiting for part1", "", "lost rank 1", "waiting for part1"):
        handle(watch, status(message=message))
    assert [r.getMessage() for r in caplog.records] == ["waiting for part1", "lost rank 1", "waiting for part1"]


@pytest.mark.parametrize("part", [0, 1])
def test_status_without_a_coordinator_says_why(specs: list[PartSpec], part: int) -> None:
    watch = GangWatch(specs[part])
    reason = watch._follow()
    assert reason == "rendezvous: Connection refused"


# What it kills


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[bytes]]]:
    """A process that looks like a worker, and one that does not."""
    with ExitStack() as stack:
        processes = []
        for name in ("rtp_llm.engine.main", "sshd"):
            command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", "-m", name]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout
            process.stdout.readline()
            processes.append(process)
        yield processes


def test_only_workers_of_this_part_are_killed(
    specs: list[PartSpec], children: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pid comes from another machine, and may have been reused: it must be a child of this supervisord."""
    worker, foreign = children
    watch = GangWatch(specs[0])
    for pid in (worker.pid, foreign.pid, 2**22 - 1):
        handle(watch, {"pid": pid, "reason": "no progress for 11 s"}, FrameType.KILL)
    assert watch.kill_reasons == {}, "these are not children of the guard's parent"
    monkeypatch.setattr("os.getppid", os.getpid)
    for pid in (worker.pid, foreign.pid):
        handle(watch, {"pid": pid, "reason": "no progress for 11 s"}, FrameType.KILL)
    assert worker.wait(60) == -9
    assert foreign.poll() is None
    assert watch.kill_reasons == {worker.pid: "no progress for 11 s"}
