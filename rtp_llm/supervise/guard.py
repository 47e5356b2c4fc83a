"""`python -m rtp_llm.supervise.guard RUN_DIR`: the guard, which restarts processes of its part after a failure.

It runs as an event listener of supervisord, which starts the processes of the part and reports their exits. If a rank
exits, the guard restarts all ranks of the part, because a new process cannot join an existing NCCL or gloo
communicator. RESTART_LIMIT limits the restarts. If an exit code shows an error that a restart cannot fix, the guard
stops the part at once. It logs to stderr, because supervisord's event protocol uses stdout.
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
SETTLE_SECONDS = 2.0  # time for the other ranks to exit by themselves, with more specific codes
DOWN_STATES = {"EXITED", "FATAL", "BACKOFF"}
HEARTBEAT_MARGIN_SECONDS = 5.0  # beyond HEARTBEAT_TIMEOUT, so that the other ranks report first


@dataclass
class RestartBudget:
    """At most `limit` restarts in ten minutes, after delays of 0.5, 1, 2, 4 … 60 seconds."""

    limit: int
    _times: deque[float] = field(default_factory=deque)

    def next_delay(self, now: float) -> float | None:
        """Consumes one restart. Returns the delay before it in seconds; None if the budget is spent."""
        while self._times and now - self._times[0] > WINDOW_SECONDS:
            self._times.popleft()
        if len(self._times) >= self.limit:
            return None
        self._times.append(now)
        return float(min(60.0, 0.5 * 2 ** (len(self._times) - 1)))


def incident_exit_code(codes: list[int]) -> ExitCode:
    """Returns the most important exit code of processes that exited together. `codes`: -1 for killed by a signal.

    Order: errors that a restart cannot fix, crash, hang, lost connection (usually a consequence of the others).
    """
    known_codes = {ExitCode(c) for c in codes if c in ExitCode.__members__.values()}
    final_codes = sorted(c for c in known_codes if c.is_final)
    if final_codes:
        return final_codes[0]
    if any(c not in (ExitCode.COMMUNICATION, ExitCode.HANG) for c in codes):
        return ExitCode.RANK_CRASHED
    return ExitCode.HANG if ExitCode.HANG in known_codes else ExitCode.COMMUNICATION


@dataclass
class RestartHistory:
    """The file `guard.json` in the run directory: restarts and last exit codes, for the metrics.

    It survives restarts of the guard.
    """

    path: Path
    restarts: dict[str, int] = field(default_factory=dict)  # by "program reason"
    last_exit: dict[str, int] = field(default_factory=dict)  # by program; -1: killed by a signal

    @classmethod
    def open(cls, path: Path) -> "RestartHistory":
        return cls(path, **json.loads(path.read_text())) if path.exists() else cls(path)

    def add(self, processes: list[dict[str, Any]]) -> None:
        for process in processes:
            name, status = str(process["name"]), int(process["exitstatus"])
            reason = f"{name} {_reason(status)}"
            self.restarts[reason] = self.restarts.get(reason, 0) + 1
            self.last_exit[name] = status
        temporary = self.path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps({"restarts": self.restarts, "last_exit": self.last_exit}))
            temporary.replace(self.path)
        except OSError as error:  # a full disk must not prevent restarts
            log.error("cannot write %s, so the metric of restarts is out of date: %s", self.path, error.strerror)


class Guard:
    """Restarts process groups, or ends the part, through supervisord's RPC interface."""

    def __init__(self, part_spec: PartSpec, rpc: Any):
        self.part_spec, self.rpc = part_spec, rpc
        self._history = RestartHistory.open(part_spec.guard_record_path)
        limit = part_spec.config.restart_limit
        self._rank_budget, self._api_budget = RestartBudget(limit), RestartBudget(max(limit, 1))
        # For incidents in which the ranks only lost connections to ranks of another part, where the failure is. The
        # budget of that part limits the restarts; this larger one prevents an endless loop.
        self._peer_loss_budget = RestartBudget(limit * 5)
        self._killed_rank = ""  # process name of the rank that this guard killed

    def handle(self) -> None:
        """Handles an event of supervisord: restarts the processes that are down, or ends the part.

        Examines the states of all processes instead of the event, because one incident causes several events.
        """
        if not self._is_running():
            return
        if any(i["exitstatus"] == ExitCode.DOCTOR for i in self._down("doctor")):
            self._end_part("the doctor found errors", ExitCode.DOCTOR)
        elif self._down("ranks"):
            self._restart("ranks", self._rank_budget, settle=SETTLE_SECONDS)
        elif self._down("service"):
            self._restart("service", self._api_budget, settle=0)
        else:
            self._kill_frozen_rank()

    def _kill_frozen_rank(self) -> None:
        """Kills the part's first rank if its heartbeats stopped.

        The other ranks notice and exit. If they all run on other parts, only the guard can kill the frozen rank.
        """
        name = f"rank{self.part_spec.plan.first_rank}"
        info = next((i for i in self.rpc.supervisor.getAllProcessInfo() if i["name"] == name), None)
        silent_seconds = self._seconds_since_status(info["start"]) if info else 0.0
        if silent_seconds > self.part_spec.config.heartbeat_timeout + HEARTBEAT_MARGIN_SECONDS and self._can_write():
            log.error("no heartbeat from %s for %.0f s: killing it (exit code %d)", name, silent_seconds, ExitCode.HANG)
            self._killed_rank = name
            self.rpc.supervisor.signalProcess(f"ranks:{name}", "KILL")

    def _seconds_since_status(self, start_time: float) -> float:
        """Returns the seconds since the part's first rank wrote gang.json (the status of all ranks).

        Returns 0 if the rank has not written the file since its start. `start_time`: of its process, Unix time.
        """
        path = self.part_spec.gang_status_path
        try:
            written_at, ranks = path.stat().st_mtime, json.loads(path.read_text())["ranks"]
        except FileNotFoundError:
            return 0.0
        return time.time() - written_at if ranks and written_at > start_time else 0.0

    def _can_write(self) -> bool:
        """Returns False if the disk is full: the status file gang.json is then old although the rank is not frozen."""
        try:
            (self.part_spec.run_dir / "guard.probe").write_text("x")
        except OSError:
            return False
        return True

    def _is_running(self) -> bool:
        """Returns False once supervisord has received a stop request."""
        try:
            return bool(self.rpc.supervisor.getState()["statename"] == "RUNNING")
        except xmlrpc.client.Fault:  # supervisord is shutting down and rejects calls
            return False

    def _down(self, group: str) -> list[dict[str, Any]]:
        processes: list[dict[str, Any]] = self.rpc.supervisor.getAllProcessInfo()
        return [i for i in processes if i["group"] == group and i["statename"] in DOWN_STATES]

    def _restart(self, group: str, budget: RestartBudget, settle: float) -> None:
        time.sleep(settle)
        down = self._down(group)
        exits = ", ".join(f"{i['name']} ({_describe(i['exitstatus'])})" for i in down)
        code = incident_exit_code([ExitCode.HANG if i["name"] == self._killed_rank else i["exitstatus"] for i in down])
        self._killed_rank = ""
        if code.is_final:
            self._end_part(f"{exits}: a restart cannot fix this", code)
            return
        if code == ExitCode.COMMUNICATION and self.part_spec.plan.is_multi_part:
            budget = self._peer_loss_budget
        delay = budget.next_delay(time.monotonic())
        if delay is None:
            self._end_part(f"{exits}: the budget of {budget.limit} restarts in 10 minutes is spent", code)
            return
        if not self._is_running():
            return
        self._history.add(down)
        log.error("lost %s; restarting group %s in %.1f s", exits, group, delay)
        self.rpc.supervisor.stopProcessGroup(group, True)
        time.sleep(delay)
        if self._is_running():
            self.rpc.supervisor.startProcessGroup(group, False)

    def _end_part(self, reason: str, code: ExitCode) -> None:
        if not self._is_running():
            return  # stopped in the meantime: the part ends with 0
        log.critical("%s; the part ends with exit code %d", reason, code)
        try:
            self.part_spec.exit_code_file.write_text(str(int(code)))
        finally:
            self.rpc.supervisor.shutdown()


def _describe(exit_status: int) -> str:
    return "killed by a signal" if exit_status < 0 else f"exit code {exit_status}, {_reason(exit_status)}"


def _reason(exit_status: int) -> str:
    """Returns the name of an exit code, for log lines and as a metric label."""
    if exit_status < 0:
        return "signal"
    return ExitCode(exit_status).name.lower() if exit_status in ExitCode.__members__.values() else "other"


def open_rpc(part_spec: PartSpec) -> Any:
    """Returns a client of supervisord's XML-RPC interface, over its unix socket."""
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
