"""The guard: a process that restarts processes of its part after a failure.

It runs as an event listener of supervisord, which starts the processes of the part and reports their exits. It restarts
processes that have exited; the other ranks keep their weights, and the spare replaces a lost one. It kills processes
that hang. RESTART_LIMIT limits the failures. If an exit code shows an error that a restart cannot fix, the guard stops
the part at once. It logs to stderr, because supervisord's event protocol uses stdout.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
import xmlrpc.client
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from supervisor import childutils
from supervisor.xmlrpc import Faults, SupervisorTransport

from rtp_llm import files
from rtp_llm import log as logs
from rtp_llm.errors import ExitCode
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.supervise.gang_watch import GangWatch
from rtp_llm.supervise.restart_budget import WINDOW_SECONDS, Failure, RestartBudget

log = logging.getLogger("rtp_llm.guard")

POLL_SECONDS = 1.0
FROZEN_SECONDS = 3.0
SETTLE_SECONDS = 1.0  # before the part ends: other processes of the same incident may exit with more specific codes
DOWN_STATES = {"EXITED", "FATAL", "BACKOFF"}
RESTARTED_GROUPS = ("ranks", "service", "gang")


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
    """The file `guard.json` in the run directory: numbers of restarts and last exit codes, for the metrics, and the
    failures that count against the restart budgets.

    A restarted guard reads the file again. If it forgot earlier failures, a part that keeps failing would never end.
    """

    path: Path
    restarts: dict[str, int] = field(default_factory=dict)  # by "program reason"
    last_exit: dict[str, int] = field(default_factory=dict)  # by program; -1: killed by a signal
    failures: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # fields of Failure, by budget

    @classmethod
    def open(cls, path: Path) -> "RestartHistory":
        return cls(path, **json.loads(path.read_text())) if path.exists() else cls(path)

    def recent_failures(self, budget: str, now: float) -> list[Failure]:
        """Returns the failures of the last WINDOW_SECONDS that count against the restart budget with the name `budget`.
        `now`: monotonic seconds, like the times in guard.json, which is removed when the part starts.
        """
        failures = [Failure(**values) for values in self.failures.get(budget, [])]
        return [failure for failure in failures if now - failure.time <= WINDOW_SECONDS]

    def add(self, name: str, status: int, budgets: dict[str, RestartBudget]) -> None:
        """Records the exit of a process in guard.json. name: role, such as `rank1`. status: exit code; -1 if killed by
        a signal. budgets: all restart budgets by name, with this failure already counted; the file stores them, too.
        """
        reason = f"{name} {_reason(status)}"
        self.restarts[reason] = self.restarts.get(reason, 0) + 1
        self.last_exit[name] = status
        self.failures = {name: [asdict(f) for f in budget.failures] for name, budget in budgets.items()}
        content = {"restarts": self.restarts, "last_exit": self.last_exit, "failures": self.failures}
        try:
            files.replace(self.path, json.dumps(content))
        except OSError as error:  # a full disk must not prevent restarts
            log.error("cannot write %s, so the restart metrics are out of date: %s", self.path, error.strerror)


class Watchdog:
    """Measures how long each process has shown no activity. Ignores clock changes and pauses of the machine."""

    def __init__(self) -> None:
        self._now = self._awake_since = time.monotonic()
        self._changed_at: dict[str, tuple[object, float]] = {}

    def tick(self, now: float) -> None:
        """Sets the current time; call it every POLL_SECONDS. A much longer time between two calls does not count as
        silence of the watched processes: this process was stopped, and perhaps they were too.
        """
        if now - self._now > FROZEN_SECONDS:
            self._awake_since = now
        self._now = now

    def silent_seconds(self, name: str, sign: object) -> float:
        """Returns the seconds since `sign` last changed between calls. `sign`: a value that the process `name` keeps
        changing while it works, such as the modification time of a file.
        """
        if name not in self._changed_at or self._changed_at[name][0] != sign:
            self._changed_at[name] = sign, self._now
        return self._now - max(self._changed_at[name][1], self._awake_since)


class Guard:
    """Process that watches the other processes of the part. Restarts those that end, kills those that hang, or ends the
    part, through supervisord's RPC interface.
    """

    def __init__(self, part_spec: PartSpec, rpc: Any, watch: GangWatch):
        self.part_spec, self.rpc, self.watch = part_spec, rpc, watch
        self.pids: dict[str, int] = {}  # of the last process of each program, as supervisord reported them
        self._history = RestartHistory.open(part_spec.guard_record_path)
        limit = part_spec.config.restart_limit
        limits = {
            "ranks": limit,
            "service": max(limit, 1),
            "gang": max(limit, 1),
            "spare": max(limit, 1),
            # For ranks that only lost the connection to another part, where the failure is. The budget of that part
            # limits the restarts; this larger one prevents an endless loop.
            "peers": limit * 5,
        }
        now = time.monotonic()
        self._budgets = {n: RestartBudget(limits[n], self._history.recent_failures(n, now)) for n in limits}
        self._restart_at: dict[str, float] = {}  # by supervisord's name of the process
        self._watchdog = Watchdog()

    def step(self) -> None:
        """Checks all processes of the part once, and restarts or kills as needed.

        Reads their states instead of supervisord's events, because one incident causes several events.
        """
        if not self._is_running():
            return
        processes: list[dict[str, Any]] = self.rpc.supervisor.getAllProcessInfo()
        down = [info for info in processes if info["statename"] in DOWN_STATES]
        verdicts = {i["exitstatus"] for i in down if i["group"] == "doctor"}
        final_verdicts = verdicts & {ExitCode.DOCTOR, ExitCode.GANG_INCOMPLETE}
        if final_verdicts:
            self._end_part("the doctor found errors", ExitCode(min(final_verdicts)))
            return
        for info in down:
            name = f"{info['group']}:{info['name']}"
            if info["group"] in RESTARTED_GROUPS and name not in self._restart_at:
                if self._is_final(info):
                    return
                self._restart_at[name] = self._plan_restart(info)
        if self._is_spent():
            return
        self._restart_due()
        self._kill_silent(processes)

    def _is_final(self, info: dict[str, Any]) -> bool:
        """Ends the part if its exit code shows an error that a restart cannot fix. Returns whether it did."""
        code = incident_exit_code([info["exitstatus"]])
        if code.is_final:
            self._end_part(f"{self._describe(info)}: a restart cannot fix this", code)
        return code.is_final

    def _plan_restart(self, info: dict[str, Any]) -> float:
        """Records the end of a process. Returns when to restart it."""
        now, pid, status = time.monotonic(), self.pids.get(info["name"], 0), int(info["exitstatus"])
        if pid in self.watch.kill_reasons:
            status = ExitCode.HANG
        budget = self._budgets[info["group"]]
        key = f"{info['name']} at {info['stop']}"  # the same for a guard that was restarted meanwhile
        if info["group"] == "ranks":
            if pid in self.watch.roles:
                key = str(self.watch.roles[pid][1])
                if status == ExitCode.COMMUNICATION and self.part_spec.plan.is_multi_part:
                    budget = self._budgets["peers"]
            elif self.watch.roles and status < 0:
                budget = self._budgets["spare"]
        elif info["group"] == "service":  # what the next process takes until it shows life is not silence
            self.part_spec.api_alive_path.unlink(missing_ok=True)
        budget.charge(now, key, status, self.watch.served_at)
        self._history.add(self._role(info), status, self._budgets)
        delay = budget.delay(now, self.watch.verdicts)
        log.error("lost %s; restarting it in %.1f s", self._describe(info), delay)
        return now + delay

    def _is_spent(self) -> bool:
        """Ends the part if a restart budget is exhausted. Returns whether it did."""
        now = time.monotonic()
        for budget in self._budgets.values():
            if budget.is_spent(now, self.watch.verdicts):
                time.sleep(SETTLE_SECONDS)
                codes = budget.last_codes() + [
                    int(i["exitstatus"])
                    for i in self.rpc.supervisor.getAllProcessInfo()
                    if i["group"] == "ranks" and i["statename"] in DOWN_STATES
                ]
                reason = f"the budget of {budget.limit} restarts in 10 minutes is spent"
                self._end_part(reason, incident_exit_code(codes))
                return True
        return False

    def _restart_due(self) -> None:
        now = time.monotonic()
        for name in [name for name, at in self._restart_at.items() if at <= now]:
            del self._restart_at[name]
            if not self._is_running():
                return
            try:
                self.rpc.supervisor.startProcess(name, False)
            except xmlrpc.client.Fault as fault:  # for example, fork failed for lack of memory
                log.error("cannot start %s: %s; trying again", name, fault.faultString)
                self._restart_at[name] = now + POLL_SECONDS

    def _kill_silent(self, processes: list[dict[str, Any]]) -> None:
        """Kills the API process if its event loop hangs, and the coordinator if it sends no messages."""
        timeout = self.part_spec.config.heartbeat_timeout
        pids = {i["name"]: int(i["pid"]) for i in processes if i["statename"] == "RUNNING"}
        self._watchdog.tick(time.monotonic())
        if self.watch.coordinator_pid in pids.values():
            silent_seconds = self._watchdog.silent_seconds("coordinator", self.watch.num_messages)
            if silent_seconds > timeout:
                self._kill(self.watch.coordinator_pid, f"no message from the coordinator for {silent_seconds:.0f} s")
                self.watch.coordinator_pid = 0
        with suppress(FileNotFoundError):
            written_at = self.part_spec.api_alive_path.stat().st_mtime_ns
            silent_seconds = self._watchdog.silent_seconds("api", written_at)
            if "api" in pids and silent_seconds > timeout:
                self._kill(pids["api"], f"the API process has not responded for {silent_seconds:.0f} s")
                self.part_spec.api_alive_path.unlink()

    def _kill(self, pid: int, reason: str) -> None:
        log.error("%s: killing that process, which counts as exit code %d (hang)", reason, ExitCode.HANG)
        self.watch.kill_reasons[pid] = reason
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _is_running(self) -> bool:
        """Returns False once supervisord has received a stop request."""
        try:
            return bool(self.rpc.supervisor.getState()["statename"] == "RUNNING")
        except xmlrpc.client.Fault:  # supervisord is shutting down and rejects calls
            return False

    def _role(self, info: dict[str, Any]) -> str:
        """Returns `rank1` for the worker that was rank 1, `spare` for one without a rank, else the program's name."""
        if info["group"] != "ranks":
            return str(info["name"])
        role = self.watch.roles.get(self.pids.get(info["name"], 0))
        return f"rank{role[0]}" if role else "spare"

    def _describe(self, info: dict[str, Any]) -> str:
        reason = self.watch.kill_reasons.get(self.pids.get(info["name"], 0))
        return f"{self._role(info)} ({reason or _describe(info['exitstatus'])})"

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


def _read_events(guard: Guard, woken: threading.Event) -> None:
    """Acknowledges supervisord's events and wakes the guard. The events have the pids of ended processes."""
    while True:
        headers, payload = childutils.listener.wait(sys.stdin, sys.stdout)
        if headers["eventname"].startswith("PROCESS_STATE"):
            event, _ = childutils.eventdata(payload + "\n")
            if "pid" in event:
                guard.pids[event["processname"]] = int(event["pid"])
        woken.set()
        childutils.listener.ok(sys.stdout)


def main(run_dir: Path) -> None:
    part_spec = PartSpec.load(run_dir)
    logs.setup(f"{part_spec.label} guard", part_spec.config.log_level, sys.stderr, part_spec.config.log_format)
    woken = threading.Event()
    watch = GangWatch(part_spec)
    guard = Guard(part_spec, open_rpc(part_spec), watch)
    watch.start()
    threading.Thread(target=_read_events, args=(guard, woken), name="events", daemon=True).start()
    while True:
        woken.wait(POLL_SECONDS)
        woken.clear()
        try:
            guard.step()
        except xmlrpc.client.Fault as fault:
            if fault.faultCode != Faults.SHUTDOWN_STATE:
                raise
