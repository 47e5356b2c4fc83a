"""The guard's judgement: what a set of exit codes means, how often it restarts, and when it gives up."""

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

SIGNAL = -1  # how supervisord writes it down


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([SIGNAL], ExitCode.RANK_CRASHED),
        ([SIGNAL, 71], ExitCode.RANK_CRASHED),
        ([70, 71, 72], ExitCode.RANK_CRASHED),
        ([0, 71], ExitCode.RANK_CRASHED),  # no rank ends by itself
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
def test_one_code_for_an_incident(codes: list[int], code: ExitCode) -> None:
    assert incident_exit_code(codes) == code


def test_the_codes_that_no_restart_mends() -> None:
    assert {int(c) for c in ExitCode if c.is_final} == {64, 65, 69, 73, 75}


def test_the_budget_pauses_longer_each_time_and_ends() -> None:
    budget = RestartBudget(4)
    assert [budget.next_delay(t) for t in (0.0, 1.0, 2.0, 3.0, 4.0)] == [0.5, 1.0, 2.0, 4.0, None]


def test_the_budget_forgets_what_is_ten_minutes_old() -> None:
    budget = RestartBudget(2)
    assert [budget.next_delay(t) for t in (0.0, 300.0, 500.0, 601.0, 602.0)] == [0.5, 1.0, None, 1.0, None]


def test_a_restart_that_was_refused_costs_nothing() -> None:
    budget = RestartBudget(1)
    assert [budget.next_delay(t) for t in (0.0, 599.0, 601.0)] == [0.5, None, 0.5]


def test_no_restart_at_all_and_no_pause_beyond_a_minute() -> None:
    assert RestartBudget(0).next_delay(0.0) is None
    budget = RestartBudget(20)
    assert max(budget.next_delay(float(t)) or 0 for t in range(20)) == 60


@dataclass
class Supervisor:
    """Stands in for supervisord's RPC interface."""

    processes: list[dict[str, Any]]
    state: str = "RUNNING"
    calls: list[str] = field(default_factory=list)

    @property
    def supervisor(self) -> "Supervisor":
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


def guarding(tmp_path: Path, supervisor: Supervisor, limit: int = 3) -> Guard:
    config = Config.model_validate({"tp_size": 2, "restart_limit": limit})
    card = ModelInfo("m", "qwen3", "fp32", 1024)
    return Guard(PartSpec(tmp_path, config, make_plan(config, 0), card, {}, False), supervisor)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the guard would have slept."""
    slept: list[float] = []
    monkeypatch.setattr("rtp_llm.supervise.guard.time.sleep", slept.append)
    return slept


def test_while_all_run_nothing_is_done(tmp_path: Path) -> None:
    supervisor = Supervisor([process("rank0", "ranks"), process("api", "service")])
    guarding(tmp_path, supervisor).handle()
    assert supervisor.calls == []


@pytest.mark.parametrize(("silent", "calls"), [(5, []), (500, ["KILL ranks:rank0"])])
def test_a_first_rank_that_lost_its_heartbeat_is_ended(tmp_path: Path, silent: float, calls: list[str]) -> None:
    supervisor = Supervisor([process("rank0", "ranks"), process("api", "service")])
    gang_status = tmp_path / "gang.json"
    gang_status.write_text('{"ranks": {"0": {}}}')
    os.utime(gang_status, (time.time() - silent,) * 2)
    guarding(tmp_path, supervisor).handle()
    assert supervisor.calls == calls


def test_on_a_full_disk_silence_proves_nothing(tmp_path: Path) -> None:
    supervisor = Supervisor([process("rank0", "ranks"), process("api", "service")])
    gang_status = tmp_path / "gang.json"
    gang_status.write_text('{"ranks": {"0": {}}}')
    os.utime(gang_status, (1, 1))
    (tmp_path / "guard.probe").mkdir()  # for root, who may write anywhere
    guarding(tmp_path, supervisor).handle()
    assert supervisor.calls == []


def test_restarts_are_counted_for_the_metrics_and_survive_the_guard(tmp_path: Path) -> None:
    supervisor = Supervisor([process("rank0", "ranks", "EXITED", SIGNAL), process("rank1", "ranks", "EXITED", 71)])
    for _ in range(2):
        guarding(tmp_path, supervisor).handle()
    assert json.loads((tmp_path / "guard.json").read_text()) == {
        "restarts": {"rank0 signal": 2, "rank1 communication": 2},
        "last_exit": {"rank0": SIGNAL, "rank1": 71},
    }


def test_a_part_that_only_lost_its_peers_does_not_pay_for_them(tmp_path: Path) -> None:
    supervisor = Supervisor([process("rank0", "ranks", "EXITED", ExitCode.COMMUNICATION)])
    alone, together = guarding(tmp_path, supervisor, limit=1), guarding(tmp_path, supervisor, limit=1)
    together.part_spec = replace(together.part_spec, plan=replace(together.part_spec.plan, local_world_size=1))
    for guard_ in (alone, together):
        supervisor.calls.clear()
        for _ in range(3):
            guard_.handle()
        assert ("shutdown" in supervisor.calls) == (guard_ is alone)


def test_one_rank_lost_restarts_all_ranks_and_not_the_api(tmp_path: Path, no_pauses: list[float]) -> None:
    supervisor = Supervisor(
        [process("rank0", "ranks"), process("rank1", "ranks", "EXITED", SIGNAL), process("api", "service")]
    )
    guarding(tmp_path, supervisor).handle()
    assert supervisor.calls == ["stop ranks", "start ranks"]
    assert no_pauses == [guard.SETTLE_SECONDS, 0.5]


def test_a_lost_api_restarts_the_api_alone(tmp_path: Path) -> None:
    supervisor = Supervisor([process("rank0", "ranks"), process("api", "service", "EXITED", SIGNAL)])
    guarding(tmp_path, supervisor).handle()
    assert supervisor.calls == ["stop service", "start service"]


@pytest.mark.parametrize(("code", "expected"), [(65, "65"), (69, "69"), (64, "64")])
def test_a_final_code_ends_the_part_with_it(tmp_path: Path, code: int, expected: str) -> None:
    supervisor = Supervisor(
        [process("rank0", "ranks", "EXITED", 71), process("rank1", "ranks", "EXITED", code), process("api", "service")]
    )
    guarding(tmp_path, supervisor).handle()
    assert supervisor.calls == ["shutdown"]
    assert (tmp_path / "exit_code").read_text() == expected


def test_a_spent_budget_ends_the_part_with_the_incidents_code(tmp_path: Path) -> None:
    supervisor = Supervisor([process("rank0", "ranks", "EXITED", SIGNAL), process("api", "service")])
    watching = guarding(tmp_path, supervisor, limit=1)
    watching.handle()
    watching.handle()
    assert supervisor.calls == ["stop ranks", "start ranks", "shutdown"]
    assert (tmp_path / "exit_code").read_text() == "70"


def test_the_api_comes_back_once_even_where_ranks_may_not(tmp_path: Path) -> None:
    supervisor = Supervisor([process("rank0", "ranks"), process("api", "service", "EXITED", SIGNAL)])
    watching = guarding(tmp_path, supervisor, limit=0)
    watching.handle()
    assert supervisor.calls == ["stop service", "start service"]


def test_during_shutdown_it_lets_everything_end(tmp_path: Path) -> None:
    supervisor = Supervisor([process("rank0", "ranks", "EXITED", SIGNAL)], state="SHUTDOWN")
    guarding(tmp_path, supervisor).handle()
    assert supervisor.calls == []
    assert not (tmp_path / "exit_code").exists()


@pytest.mark.parametrize(
    ("status", "calls"),
    [(int(ExitCode.DOCTOR), ["shutdown"]), (int(ExitCode.RANK_CRASHED), [])],
    ids=["it refuses", "it failed itself"],
)
def test_only_a_refusal_of_the_doctor_ends_the_part(tmp_path: Path, status: int, calls: list[str]) -> None:
    supervisor = Supervisor([process("rank0", "ranks"), process("gang-doctor", "doctor", "EXITED", status)])
    guarding(tmp_path, supervisor).handle()
    assert supervisor.calls == calls
    code = tmp_path / "exit_code"
    assert (code.read_text() if code.exists() else "") == ("75" if calls else "")
