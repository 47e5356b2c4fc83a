"""The guard, the process that restarts the processes of a part: exit code of a failure, what it restarts, what it
kills, and when it ends the part."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.config import Config
from rtp_llm.errors import ExitCode
from rtp_llm.parallel.part_spec import ModelInfo, PartSpec
from rtp_llm.parallel.plan import make_plan
from rtp_llm.supervise import guard
from rtp_llm.supervise.gang_watch import GangWatch
from rtp_llm.supervise.guard import Guard, incident_exit_code

SIGNAL = -1  # supervisord's exit status for a signal
PARTS = '{"x_part0": {"ip": "a", "port": 10000}, "x_part1": {"ip": "b", "port": 10000}}'


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

    def startProcess(self, name: str, wait: bool) -> None:
        """The process runs, so that the guard sees its next end as another one."""
        self.calls.append(f"start {name}")
        info = next(i for i in self.processes if f"{i['group']}:{i['name']}" == name)
        info["statename"] = "RUNNING"

    def shutdown(self) -> None:
        self.calls.append("shutdown")


@dataclass
class FakeClock:
    """Stands in for the guard's module `time`. Seconds pass only where a test says so."""

    now: float = 1000.0
    sleeps: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(guard, "time", fake)
    return fake


def process(name: str, group: str, statename: str = "RUNNING", exitstatus: int = 0, pid: int = 0) -> dict[str, Any]:
    return {"name": name, "group": group, "statename": statename, "exitstatus": exitstatus, "pid": pid, "stop": 0}


def part() -> list[dict[str, Any]]:
    """Returns the running processes of a part with two ranks: worker0 is rank 0, worker1 is rank 1."""
    workers = [process(f"worker{i}", "ranks", pid=100 + i) for i in range(3)]
    return [*workers, process("api", "service", pid=200), process("coordinator", "gang", pid=300)]


def exited(processes: list[dict[str, Any]], name: str, status: int = SIGNAL) -> None:
    info = next(i for i in processes if i["name"] == name)
    info |= {"statename": "EXITED", "exitstatus": status, "stop": info["stop"] + 1}


def make_guard(tmp_path: Path, supervisor: FakeSupervisor, **settings: Any) -> Guard:
    """Returns a guard that knows of epoch 1, in which worker0 and worker1 are ranks 0 and 1."""
    config = Config.model_validate({"tp_size": 2, "restart_limit": 3, **settings})
    model = ModelInfo("m", "qwen3", "fp32", 1024)
    part_spec = PartSpec(tmp_path, config, make_plan(config, 0), model, {}, False)
    part_guard = Guard(part_spec, supervisor, GangWatch(part_spec))
    part_guard.watch.roles = {100: (0, 1), 101: (1, 1)}
    part_guard.pids = {info["name"]: info["pid"] for info in supervisor.processes}
    return part_guard


def lose(part_guard: Guard, supervisor: FakeSupervisor, name: str, epoch: int, status: int = SIGNAL) -> None:
    """Ends a worker that was rank 1 in this epoch."""
    part_guard.watch.roles[part_guard.pids[name]] = 1, epoch
    exited(supervisor.processes, name, status)
    part_guard.step()


def test_running_processes_cause_no_action(tmp_path: Path) -> None:
    supervisor = FakeSupervisor(part())
    make_guard(tmp_path, supervisor).step()
    assert supervisor.calls == []


@pytest.mark.parametrize(
    ("name", "call"),
    [("worker1", "start ranks:worker1"), ("api", "start service:api"), ("coordinator", "start gang:coordinator")],
)
def test_only_the_lost_process_is_restarted_at_once(tmp_path: Path, clock: FakeClock, name: str, call: str) -> None:
    supervisor = FakeSupervisor(part())
    part_guard = make_guard(tmp_path, supervisor)
    exited(supervisor.processes, name)
    part_guard.step()
    assert supervisor.calls == [call]
    assert clock.sleeps == []
    part_guard.step()
    assert supervisor.calls == [call], "it runs again"


def test_further_restarts_wait(tmp_path: Path, clock: FakeClock) -> None:
    supervisor = FakeSupervisor(part())
    part_guard = make_guard(tmp_path, supervisor)
    for epoch in (1, 2):
        lose(part_guard, supervisor, "worker1", epoch)
        clock.now += 10
    lose(part_guard, supervisor, "worker1", 3)
    part_guard.step()
    assert supervisor.calls == ["start ranks:worker1"] * 2, "the loss of epoch 3 is not judged yet, those before count"
    clock.now += 0.5
    part_guard.step()
    assert supervisor.calls == ["start ranks:worker1"] * 3


def test_restart_history_survives_the_guard(tmp_path: Path) -> None:
    """It counts roles, not programs: which worker is rank 1 changes with every recovery."""
    for worker in ("worker1", "worker2"):
        supervisor = FakeSupervisor(part())
        part_guard = make_guard(tmp_path, supervisor)
        part_guard.watch.roles[102] = 1, 2
        exited(supervisor.processes, worker)
        exited(supervisor.processes, "worker0", 71)
        exited(supervisor.processes, "api", 1)
        part_guard.step()
    record = json.loads((tmp_path / "guard.json").read_text())
    assert record["restarts"] == {"rank1 signal": 2, "rank0 communication": 2, "api other": 2}
    assert record["last_exit"] == {"rank0": 71, "rank1": SIGNAL, "api": 1}


@pytest.mark.parametrize(("seconds", "ends"), [(10, True), (601, False)])
def test_budgets_survive_the_guard(tmp_path: Path, clock: FakeClock, seconds: float, ends: bool) -> None:
    """The guard is killed after each failure: a part that keeps failing ends all the same."""
    supervisor = FakeSupervisor(part())
    for epoch in (1, 2):
        part_guard = make_guard(tmp_path, supervisor, restart_limit=1)
        part_guard.watch.served_at = clock.now
        lose(part_guard, supervisor, "worker1", epoch)
        clock.now += seconds
    make_guard(tmp_path, supervisor, restart_limit=1).step()
    assert ("shutdown" in supervisor.calls) == ends


def test_a_new_guard_counts_no_end_twice(tmp_path: Path, clock: FakeClock) -> None:
    """The guard is killed before it has restarted the API process, which has exited for the second time."""
    supervisor = FakeSupervisor(part())
    exited(supervisor.processes, "api")
    make_guard(tmp_path, supervisor, restart_limit=2).step()
    exited(supervisor.processes, "api")
    for _ in range(3):
        make_guard(tmp_path, supervisor, restart_limit=2).step()
    assert supervisor.calls == ["start service:api"]


def test_a_new_guard_knows_the_role_of_a_rank_that_has_ended(tmp_path: Path) -> None:
    """It reads gang.json of the guard before it, in which the rank still has its place."""
    supervisor = FakeSupervisor(part())
    status = {"epoch": 7, "ranks": {"1": {"part": 0, "pid": 101}, "0": {"part": 3, "pid": 100}}}
    part_spec = make_guard(tmp_path, supervisor).part_spec
    assert GangWatch(part_spec).roles == {}
    part_spec.gang_status_path.write_text(json.dumps(status))
    assert GangWatch(part_spec).roles == {101: (1, 7)}


def test_all_ranks_that_end_in_an_epoch_are_one_failure(tmp_path: Path, clock: FakeClock) -> None:
    supervisor = FakeSupervisor(part())
    part_guard = make_guard(tmp_path, supervisor, restart_limit=1)
    exited(supervisor.processes, "worker0")
    exited(supervisor.processes, "worker1", 71)
    part_guard.step()
    clock.now += 100
    part_guard.step()
    assert supervisor.calls == ["start ranks:worker0", "start ranks:worker1"]


@pytest.mark.parametrize(
    ("settings", "ends"), [({}, True), ({"local_world_size": 1, "json_gang_parts": PARTS}, False)], ids=["one", "two"]
)
def test_loss_of_remote_peers_has_its_own_budget(
    tmp_path: Path, clock: FakeClock, settings: dict[str, Any], ends: bool
) -> None:
    supervisor = FakeSupervisor(part())
    part_guard = make_guard(tmp_path, supervisor, restart_limit=1, **settings)
    for epoch in (1, 2, 3):
        lose(part_guard, supervisor, "worker1", epoch, ExitCode.COMMUNICATION)
        clock.now += 10
        part_guard.step()
    assert ("shutdown" in supervisor.calls) == ends


def test_a_spare_does_not_spend_the_budget_of_the_ranks(tmp_path: Path, clock: FakeClock) -> None:
    supervisor = FakeSupervisor(part())
    part_guard = make_guard(tmp_path, supervisor, restart_limit=1)
    for name in ("worker2", "worker1"):
        exited(supervisor.processes, name)
        part_guard.step()
        clock.now += 10
        part_guard.step()
    assert supervisor.calls == ["start ranks:worker2", "start ranks:worker1"]
    assert json.loads((tmp_path / "guard.json").read_text())["restarts"] == {"spare signal": 1, "rank1 signal": 1}


def test_a_worker_that_never_gets_a_rank_spends_the_budget(tmp_path: Path, clock: FakeClock) -> None:
    """A part whose workers crash before the first epoch must end, instead of restarting them for ever."""
    supervisor = FakeSupervisor(part())
    part_guard = make_guard(tmp_path, supervisor, restart_limit=1)
    part_guard.watch.roles = {}
    for _ in range(2):
        exited(supervisor.processes, "worker0")
        part_guard.step()
        clock.now += 10
    assert supervisor.calls == ["start ranks:worker0", "shutdown"]


@pytest.mark.parametrize(("code", "expected"), [(65, "65"), (69, "69"), (64, "64"), (73, "73")])
def test_final_exit_code_ends_the_part_with_it(tmp_path: Path, code: int, expected: str) -> None:
    supervisor = FakeSupervisor(part())
    exited(supervisor.processes, "worker0", 71)
    exited(supervisor.processes, "worker1", code)
    make_guard(tmp_path, supervisor).step()
    assert supervisor.calls == ["shutdown"]
    assert (tmp_path / "exit_code").read_text() == expected


def test_spent_budget_ends_the_part_with_the_incident_exit_code(tmp_path: Path, clock: FakeClock) -> None:
    supervisor = FakeSupervisor(part())
    part_guard = make_guard(tmp_path, supervisor, restart_limit=1)
    part_guard.watch.verdicts = {"1": "engine", "2": "engine"}
    lose(part_guard, supervisor, "worker1", 1, 71)
    lose(part_guard, supervisor, "worker1", 2, SIGNAL)
    assert supervisor.calls == ["start ranks:worker1", "shutdown"]
    assert clock.sleeps == [guard.SETTLE_SECONDS], "another process may exit with a more specific code"
    assert (tmp_path / "exit_code").read_text() == "70"


def test_what_a_request_breaks_does_not_end_the_part(tmp_path: Path, clock: FakeClock) -> None:
    supervisor = FakeSupervisor(part())
    part_guard = make_guard(tmp_path, supervisor, restart_limit=1)
    part_guard.watch.verdicts = {"1": "request", "2": "request", "3": "investigating"}
    for epoch in (1, 2, 3):
        lose(part_guard, supervisor, "worker1", epoch)
        clock.now += 10
        part_guard.step()
    assert supervisor.calls == ["start ranks:worker1"] * 3


@pytest.mark.parametrize("name", ["api", "coordinator"])
def test_service_and_coordinator_are_restarted_once_with_restart_limit_0(tmp_path: Path, name: str) -> None:
    supervisor = FakeSupervisor(part())
    part_guard = make_guard(tmp_path, supervisor, restart_limit=0)
    exited(supervisor.processes, name)
    part_guard.step()
    assert supervisor.calls == [f"start {'service' if name == 'api' else 'gang'}:{name}"]


def test_no_action_during_shutdown(tmp_path: Path) -> None:
    supervisor = FakeSupervisor(part(), state="SHUTDOWN")
    exited(supervisor.processes, "worker0")
    make_guard(tmp_path, supervisor).step()
    assert supervisor.calls == []
    assert not (tmp_path / "exit_code").exists()


@pytest.mark.parametrize(
    ("status", "calls"),
    [(int(ExitCode.DOCTOR), ["shutdown"]), (int(ExitCode.RANK_CRASHED), [])],
    ids=["found errors", "crashed"],
)
def test_gang_doctor_ends_the_part_only_if_it_found_errors(tmp_path: Path, status: int, calls: list[str]) -> None:
    supervisor = FakeSupervisor([*part(), process("gang-doctor", "doctor", "EXITED", status)])
    make_guard(tmp_path, supervisor).step()
    assert supervisor.calls == calls
    code = tmp_path / "exit_code"
    assert (code.read_text() if code.exists() else "") == ("75" if calls else "")


# Processes that run, but hang


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process that the guard may kill."""
    with ExitStack() as stack:
        running = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        stack.enter_context(running)
        stack.callback(running.kill)
        yield running


class Watched:
    """A guard that is polled once a second, while a process shows a sign of life or does not."""

    def __init__(self, tmp_path: Path, clock: FakeClock, name: str, pid: int):
        self.supervisor = FakeSupervisor(part())
        next(i for i in self.supervisor.processes if i["name"] == name)["pid"] = pid
        self.guard, self.clock, self.name = make_guard(tmp_path, self.supervisor), clock, name
        self._alive_path = self.guard.part_spec.api_alive_path
        if name == "coordinator":
            self.guard.watch.coordinator_pid = pid

    def show_life(self) -> None:
        if self.name == "coordinator":
            self.guard.watch.num_messages += 1
        else:
            self._alive_path.touch()
            os.utime(self._alive_path, ns=(0, round(self.clock.now * 1e9)))

    def poll(self, seconds: int) -> None:
        for _ in range(seconds):
            self.clock.now += 1
            self.guard.step()


HUNG = [
    ("api", "the API process has not responded for 9 s"),
    ("coordinator", "no message from the coordinator for 9 s"),
]
Victim = subprocess.Popen[bytes]


@pytest.mark.parametrize(("name", "reason"), HUNG)
def test_silent_process_is_killed(tmp_path: Path, clock: FakeClock, victim: Victim, name: str, reason: str) -> None:
    watched = Watched(tmp_path, clock, name, victim.pid)
    for _ in range(20):
        watched.show_life()
        watched.poll(1)
    watched.poll(7)
    assert watched.guard.watch.kill_reasons == {}, "HEARTBEAT_TIMEOUT is 8 s"
    watched.poll(2)
    assert victim.wait(60) == -9
    assert watched.guard.watch.kill_reasons == {victim.pid: reason}
    watched.guard.pids[name] = victim.pid
    exited(watched.supervisor.processes, name)
    watched.guard.step()
    record = json.loads((tmp_path / "guard.json").read_text())
    assert record["last_exit"] == {name: ExitCode.HANG}, "the guard's own signal is not the reason"


@pytest.mark.parametrize("name", ["api", "coordinator"])
def test_frozen_machine_kills_nothing(tmp_path: Path, clock: FakeClock, victim: Victim, name: str) -> None:
    watched = Watched(tmp_path, clock, name, victim.pid)
    watched.show_life()
    watched.poll(1)
    clock.now += 3600
    watched.poll(5)
    watched.show_life()
    watched.poll(5)
    assert watched.guard.watch.kill_reasons == {}


def test_new_api_process_is_not_judged_by_the_old_one(tmp_path: Path, clock: FakeClock, victim: Victim) -> None:
    """It may load a large tokenizer before it first shows life."""
    watched = Watched(tmp_path, clock, "api", victim.pid)
    watched.show_life()
    watched.poll(2)
    exited(watched.supervisor.processes, "api")
    watched.poll(60)
    assert watched.supervisor.calls == ["start service:api"]
    assert watched.guard.watch.kill_reasons == {}


def test_coordinator_of_another_part_is_not_killed(tmp_path: Path, clock: FakeClock, victim: Victim) -> None:
    """The pid in its messages is one of the machine of part 0."""
    watched = Watched(tmp_path, clock, "api", victim.pid)
    watched.guard.watch.coordinator_pid = os.getpid()
    watched.poll(60)
    assert watched.guard.watch.kill_reasons == {}
