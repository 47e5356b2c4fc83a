"""`python -m rtp_llm.supervise.guard RUN_DIR`: supervisord's event listener, which decides what a lost process means.

A rank lost means all ranks of the part start again: one cannot be restarted into a live communicator. A budget bounds
that; a code that a restart cannot mend ends the part at once. stdout belongs to supervisord's protocol, so this
process logs to stderr.
"""

import json
import logging
import sys
import time
import xmlrpc.client
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from supervisor import childutils
from supervisor.xmlrpc import Faults, SupervisorTransport

from rtp_llm import log as logs
from rtp_llm.errors import ExitCode
from rtp_llm.machine.process import exit_with_supervisord, run_main
from rtp_llm.parallel.part_spec import PartSpec

log = logging.getLogger("rtp_llm.guard")

WINDOW_SECONDS = 600.0
SETTLE_SECONDS = 2.0  # for the other ranks to notice and leave by themselves, with codes that tell more
DOWN = {"EXITED", "FATAL", "BACKOFF"}
HEARTBEAT_MARGIN_SECONDS = 5.0  # beyond HEARTBEAT_TIMEOUT: the other ranks have the first word


@dataclass
class RestartBudget:
    """At most `limit` restarts in ten minutes, with pauses of 0.5, 1, 2, 4 … seconds between them."""

    limit: int
    _times: deque[float] = field(default_factory=deque)

    def next_delay(self, now: float) -> float | None:
        """Seconds to pause before the restart that is now due; None where the budget is spent."""
        while self._times and now - self._times[0] > WINDOW_SECONDS:
            self._times.popleft()
        if len(self._times) >= self.limit:
            return None
        self._times.append(now)
        return float(min(60.0, 0.5 * 2 ** (len(self._times) - 1)))


def incident_exit_code(codes: list[int]) -> ExitCode:
    """The one code for an incident in which processes ended with these (-1: by a signal).

    A code that no restart mends wins, then a crash, then a hang; that peers lost their connection is only the echo.
    """
    known = {ExitCode(c) for c in codes if c in ExitCode.__members__.values()}
    final = sorted(c for c in known if c.is_final)
    if final:
        return final[0]
    echoes = {ExitCode.COMMUNICATION, ExitCode.HANG}
    if any(c not in echoes for c in codes):
        return ExitCode.RANK_CRASHED
    return ExitCode.HANG if ExitCode.HANG in known else ExitCode.COMMUNICATION


@dataclass
class RestartHistory:
    """`guard.json` in the run directory: restarts and last exit codes, for the metrics; kept when the guard
    restarts.
    """

    path: Path
    restarts: dict[str, int] = field(default_factory=dict)  # by "program reason"
    last_exit: dict[str, int] = field(default_factory=dict)  # by program; -1: a signal

    @classmethod
    def open(cls, path: Path) -> "RestartHistory":
        return cls(path, **json.loads(path.read_text())) if path.exists() else cls(path)

    def add(self, processes: list[dict[str, Any]]) -> None:
        for process in processes:
            name, status = str(process["name"]), int(process["exitstatus"])
            reason = f"{name} {_reason(status)}"
            self.restarts[reason] = self.restarts.get(reason, 0) + 1
            self.last_exit[name] = status
        scratch = self.path.with_suffix(".tmp")
        try:
            scratch.write_text(json.dumps({"restarts": self.restarts, "last_exit": self.last_exit}))
            scratch.replace(self.path)
        except OSError as error:  # a full disk must not keep ranks from being restarted
            log.error("%s: not written: %s", self.path, error.strerror)


class Guard:
    """Acts on supervisord through its RPC interface."""

    def __init__(self, part_spec: PartSpec, rpc: Any):
        self.part_spec, self.rpc = part_spec, rpc
        self._history = RestartHistory.open(part_spec.guard_record_path)
        limit = part_spec.config.restart_limit
        self._ranks, self._api = RestartBudget(limit), RestartBudget(max(limit, 1))
        # Where all that happened here is that peers of another part were lost, the fault is theirs, and their budget
        # ends
        # it; this one is only there so that nothing goes on for ever.
        self._peer_loss_budget = RestartBudget(limit * 5)
        self._killed_rank = ""  # the rank that this guard has ended

    def handle(self) -> None:
        """Looks at the processes rather than at the event: several events may tell of one incident."""
        if not self._running():
            return
        if any(i["exitstatus"] == ExitCode.DOCTOR for i in self._down("doctor")):
            self._give_up("the doctor refuses", ExitCode.DOCTOR)
        elif self._down("ranks"):
            self._restart("ranks", self._ranks, settle=SETTLE_SECONDS)
        elif self._down("service"):
            self._restart("service", self._api, settle=0)
        else:
            self._kill_frozen_rank()

    def _kill_frozen_rank(self) -> None:
        """Ends the part's first rank where it had a heartbeat and lost it. The other ranks notice too and leave, but
        where they are all on other parts, nobody but the guard can end it.
        """
        name = f"rank{self.part_spec.plan.first_rank}"
        info = next((i for i in self.rpc.supervisor.getAllProcessInfo() if i["name"] == name), None)
        silent = self._seconds_since_status(info["start"]) if info else 0.0
        if silent > self.part_spec.config.heartbeat_timeout + HEARTBEAT_MARGIN_SECONDS and self._can_write():
            log.error("no heartbeat from %s for %.0f s: it is ended (exit code %d)", name, silent, ExitCode.HANG)
            self._killed_rank = name
            self.rpc.supervisor.signalProcess(f"ranks:{name}", "KILL")

    def _seconds_since_status(self, started: float) -> float:
        """Seconds since the first rank posted what it hears of the gang; 0 where it has not since it `started`."""
        gang_status = self.part_spec.gang_status_path
        try:
            posted, ranks = gang_status.stat().st_mtime, json.loads(gang_status.read_text())["ranks"]
        except FileNotFoundError:
            return 0.0
        return time.time() - posted if ranks and posted > started else 0.0

    def _can_write(self) -> bool:
        """False on a full disk, where silence does not mean that a rank is frozen."""
        try:
            (self.part_spec.run_dir / "guard.probe").write_text("x")
        except OSError:
            return False
        return True

    def _running(self) -> bool:
        """False from the moment on that supervisord was asked to stop."""
        try:
            return bool(self.rpc.supervisor.getState()["statename"] == "RUNNING")
        except xmlrpc.client.Fault:  # it no longer says anything: SHUTDOWN_STATE
            return False

    def _down(self, group: str) -> list[dict[str, Any]]:
        infos: list[dict[str, Any]] = self.rpc.supervisor.getAllProcessInfo()
        return [i for i in infos if i["group"] == group and i["statename"] in DOWN]

    def _restart(self, group: str, budget: RestartBudget, settle: float) -> None:
        time.sleep(settle)
        down = self._down(group)
        what = ", ".join(f"{i['name']} ({_describe(i['exitstatus'])})" for i in down)
        code = incident_exit_code([ExitCode.HANG if i["name"] == self._killed_rank else i["exitstatus"] for i in down])
        self._killed_rank = ""
        if code.is_final:
            self._give_up(f"{what}: no restart can mend that", code)
            return
        if code == ExitCode.COMMUNICATION and self.part_spec.plan.is_multi_part:
            budget = self._peer_loss_budget
        pause = budget.next_delay(time.monotonic())
        if pause is None:
            self._give_up(f"{what}: the budget of {budget.limit} restarts in 10 minutes is spent", code)
            return
        if not self._running():
            return
        self._history.add(down)
        log.error("lost %s; starting all of group %s again in %.1f s", what, group, pause)
        self.rpc.supervisor.stopProcessGroup(group, True)
        time.sleep(pause)
        if self._running():
            self.rpc.supervisor.startProcessGroup(group, False)

    def _give_up(self, reason: str, code: ExitCode) -> None:
        if not self._running():
            return  # it was asked to stop in the meantime, and ends with 0
        log.critical("%s; the part ends with exit code %d", reason, code)
        try:
            self.part_spec.exit_code_file.write_text(str(int(code)))
        finally:
            self.rpc.supervisor.shutdown()


def _describe(exit_status: int) -> str:
    return "killed by a signal" if exit_status < 0 else f"exit code {exit_status}, {_reason(exit_status)}"


def _reason(exit_status: int) -> str:
    """The class of an exit code, for people and for a metric's label."""
    if exit_status < 0:
        return "signal"
    return ExitCode(exit_status).name.lower() if exit_status in ExitCode.__members__.values() else "other"


def open_rpc(part_spec: PartSpec) -> Any:
    """supervisord's RPC interface, over its unix socket."""
    transport = SupervisorTransport(None, None, f"unix://{part_spec.supervisor_socket}")
    return xmlrpc.client.ServerProxy("http://127.0.0.1", transport)


def main(run_dir: Path) -> None:
    part_spec = PartSpec.load(run_dir)
    logs.setup(f"{part_spec.label} guard", part_spec.config.log_level, sys.stderr, part_spec.config.log_format)
    guard = Guard(part_spec, open_rpc(part_spec))
    while True:
        childutils.listener.wait(sys.stdin, sys.stdout)
        try:
            guard.handle()
        except xmlrpc.client.Fault as fault:
            if fault.faultCode != Faults.SHUTDOWN_STATE:
                raise
        childutils.listener.ok(sys.stdout)


if __name__ == "__main__":
    exit_with_supervisord(Path(sys.argv[1]))
    run_main(partial(main, Path(sys.argv[1])))
