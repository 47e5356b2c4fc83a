"""The guard, the process that restarts a part's ranks after a failure: exit code of a failure, number and delay of
restarts, and the end of the part."""

import json
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.config import Config
from rtp_llm.errors import ExitCode
from rtp_llm.parallel.part_spec import ModelInfo, PartSpec
from rtp_llm.parallel.plan import make_plan
from rtp_llm.supervise import guard
from rtp_llm.supervise.guard import Guard, RestartBudget, incident_exit_code

SIGNAL = -1  # supervisord's exit status for a signal


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([SIGNAL], ExitCode.RANK_CRASHED),
        ([SIGNAL, 71], ExitCode.RANK_CRASHED),
        ([70, 71, 72], ExitCode.RANK_CRASHED),
        ([0, 71], ExitCode.RANK_CRASHED),  # a rank never exits with 0 by itself
        ([1], ExitCode.RANK_CRASHED),  # a traceback
        ([139, 71], ExitCode.RANK_CRASHED),
        ([71, 71], ExitCode.COMMUNICATION),
        ([72, 71], ExitCode.HANG),
        ([64, 71], ExitCode.BAD_CONFIG),
        ([71, 65], ExitCode.BAD_CHECKPOINT),
        ([69, 69], ExitCode.GANG_INCOMPLETE),
        ([SIGNAL, 73], ExitCode.GPU_FAULT),
        ([65, 64], ExitCode.BAD_CONFIG),
    ],
)
def test_incident_has_one_exit_code(codes: list[int], code: ExitCode) -> None:
    assert incident_exit_code(codes) == code


def test_final_exit_codes() -> None:
    assert {int(c) for c in ExitCode if c.is_final} == {64, 65, 69, 73, 75}


def test_delay_doubles_until_the_budget_is_spent() -> None:
    budget = RestartBudget(4)
    assert [budget.next_delay(t) for t in (0.0, 1.0, 2.0, 3.0, 4.0)] == [0.5, 1.0, 2.0, 4.0, None]


def test_restarts_older_than_ten_minutes_do_not_count() -> None:
    budget = RestartBudget(2)
    assert [budget.next_delay(t) for t in (0.0, 300.0, 500.0, 601.0, 602.0)] == [0.5, 1.0, None, 1.0, None]


def test_rejected_restart_does_not_count() -> None:
    budget = RestartBudget(1)
    assert [budget.next_delay(t) for t in (0.0, 599.0, 601.0)] == [0.5, None, 0.5]


def test_limit_0_and_maximum_delay() -> None:
    assert RestartBudget(0).next_delay(0.0) is None
    budget = RestartBudget(20)
    assert max(budget.next_delay(float(t)) or 0 for t in range(20)) == 60


@dataclass
class FakeSupervisor:
    """Fake of supervisord's RPC interface."""

    processes: list[dict[str, Any]]
    state: str = "RUNNING"
    calls: list[str] = field(default_factory=list)

    @property
    def supervisor(self) -> "FakeSupervisor":
        return self

    def getState(self) -> dict[str, str]:
        return {"statename": self.state}

    def getAllProcessInfo(self) -> list[dict[str, Any]]:
        return self.processes

    def stopProcessGroup(self, group: str, wait: bool) -> None:
        self.calls.append(f"stop {group}")

    def startProcessGroup(self, group: str, wait: bool) -> None:
        self.calls.append(f"start {group}")

    def signalProcess(self, name: str, signal: str) -> None:
        self.calls.append(f"{signal} {name}")

    def shutdown(self) -> None:
        self.calls.append("shutdown")


def process(name: str, group: str, statename: str = "RUNNING", exitstatus: int = 0) -> dict[str, Any]:
    return {"name": name, "group": group, "statename": statename, "exitstatus": exitstatus, "start": 0}


def make_guard(tmp_path: Path, supervisor: FakeSupervisor, limit: int = 3) -> Guard:
    config = Config.model_validate({"tp_size": 2, "restart_limit": limit})
    model = ModelInfo("m", "qwen3", "fp32", 1024)
    return Guard(PartSpec(tmp_path, config, make_plan(config, 0), model, {}, False), supervisor)


@pytest.fixture(autouse=True)
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replaces the guard's sleep. Records its arguments in seconds."""
    durations: list[float] = []
    monkeypatch.setattr("rtp_llm.supervise.guard.time.sleep", durations.append)
    return durations


def test_running_processes_cause_no_action(tmp_path: Path) -> None:
    supervisor = FakeSupervisor([process("rank0", "ranks"), process("api", "service")])
    make_guard(tmp_path, supervisor).handle()
    assert supervisor.calls == []


@pytest.mark.parametrize(("silent_seconds", "calls"), [(5, []), (500, ["KILL ranks:rank0"])])
def test_first_rank_without_heartbeat_is_killed(tmp_path: Path, silent_seconds: float, calls: list[str]) -> None:
    supervisor = FakeSupervisor([process("rank0", "ranks"), process("api", "service")])
    gang_status = tmp_path / "gang.json"
    gang_status.write_text('{"ranks": {"0": {}}}')
    os.utime(gang_status, (time.time() - silent_seconds,) * 2)
    make_guard(tmp_path, supervisor).handle()
    assert supervisor.calls == calls


def test_stale_status_on_a_full_disk_kills_no_rank(tmp_path: Path) -> None:
    supervisor = FakeSupervisor([process("rank0", "ranks"), process("api", "service")])
    gang_status = tmp_path / "gang.json"
    gang_status.write_text('{"ranks": {"0": {}}}')
    os.utime(gang_status, (1, 1))
    (tmp_path / "guard.probe").mkdir()  # makes the write fail, also as root
    make_guard(tmp_path, supervisor).handle()
    assert supervisor.calls == []


def test_restart_history_survives_the_guard(tmp_path: Path) -> None:
    supervisor = FakeSupervisor([process("rank0", "ranks", "EXITED", SIGNAL), process("rank1", "ranks", "EXITED", 71)])
    for _ in range(2):
        make_guard(tmp_path, supervisor).handle()
    assert json.loads((tmp_path / "guard.json").read_text()) == {
        "restarts": {"rank0 signal": 2, "rank1 communication": 2},
        "last_exit": {"rank0": SIGNAL, "rank1": 71},
    }


def test_loss_of_remote_peers_has_its_own_budget(tmp_path: Path) -> None:
    supervisor = FakeSupervisor([process("rank0", "ranks", "EXITED", ExitCode.COMMUNICATION)])
    one_part, two_parts = make_guard(tmp_path, supervisor, limit=1), make_guard(tmp_path, supervisor, limit=1)
    two_parts.part_spec = replace(two_parts.part_spec, plan=replace(two_parts.part_spec.plan, local_world_size=1))
    for part_guard in (one_part, two_parts):
        supervisor.calls.clear()
        for _ in range(3):
            part_guard.handle()
        assert ("shutdown" in supervisor.calls) == (part_guard is one_part)


def test_lost_rank_restarts_all_ranks_but_not_the_api(tmp_path: Path, sleeps: list[float]) -> None:
    supervisor = FakeSupervisor(
        [process("rank0", "ranks"), process("rank1", "ranks", "EXITED", SIGNAL), process("api", "service")]
    )
    make_guard(tmp_path, supervisor).handle()
    assert supervisor.calls == ["stop ranks", "start ranks"]
    assert sleeps == [guard.SETTLE_SECONDS, 0.5]


def test_lost_api_restarts_only_the_api(tmp_path: Path) -> None:
    supervisor = FakeSupervisor([process("rank0", "ranks"), process("api", "service", "EXITED", SIGNAL)])
    make_guard(tmp_path, supervisor).handle()
    assert supervisor.calls == ["stop service", "start service"]


@pytest.mark.parametrize(("code", "expected"), [(65, "65"), (69, "69"), (64, "64")])
def test_final_exit_code_ends_the_part_with_it(tmp_path: Path, code: int, expected: str) -> None:
    supervisor = FakeSupervisor(
        [process("rank0", "ranks", "EXITED", 71), process("rank1", "ranks", "EXITED", code), process("api", "service")]
    )
    make_guard(tmp_path, supervisor).handle()
    assert supervisor.calls == ["shutdown"]
    assert (tmp_path / "exit_code").read_text() == expected


def test_spent_budget_ends_the_part_with_the_incident_exit_code(tmp_path: Path) -> None:
    supervisor = FakeSupervisor([process("rank0", "ranks", "EXITED", SIGNAL), process("api", "service")])
    part_guard = make_guard(tmp_path, supervisor, limit=1)
    part_guard.handle()
    part_guard.handle()
    assert supervisor.calls == ["stop ranks", "start ranks", "shutdown"]
    assert (tmp_path / "exit_code").read_text() == "70"


def test_api_is_restarted_once_with_restart_limit_0(tmp_path: Path) -> None:
    supervisor = FakeSupervisor([process("rank0", "ranks"), process("api", "service", "EXITED", SIGNAL)])
    part_guard = make_guard(tmp_path, supervisor, limit=0)
    part_guard.handle()
    assert supervisor.calls == ["stop service", "start service"]


def test_no_action_during_shutdown(tmp_path: Path) -> None:
    supervisor = FakeSupervisor([process("rank0", "ranks", "EXITED", SIGNAL)], state="SHUTDOWN")
    make_guard(tmp_path, supervisor).handle()
    assert supervisor.calls == []
    assert not (tmp_path / "exit_code").exists()


@pytest.mark.parametrize(
    ("status", "calls"),
    [(int(ExitCode.DOCTOR), ["shutdown"]), (int(ExitCode.RANK_CRASHED), [])],
    ids=["found errors", "crashed"],
)
def test_gang_doctor_ends_the_part_only_if_it_found_errors(tmp_path: Path, status: int, calls: list[str]) -> None:
    supervisor = FakeSupervisor([process("rank0", "ranks"), process("gang-doctor", "doctor", "EXITED", status)])
    make_guard(tmp_path, supervisor).handle()
    assert supervisor.calls == calls
    code = tmp_path / "exit_code"
    assert (code.read_text() if code.exists() else "") == ("75" if calls else "")
