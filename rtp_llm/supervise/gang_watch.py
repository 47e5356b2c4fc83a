"""The guard's connection to the coordinator: writes the status of all ranks to gang.json, and kills hung workers."""

import json
import logging
import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any

import psutil

from rtp_llm import files
from rtp_llm.parallel.coordinator_connection import (
    CONNECT_RETRY_SECONDS,
    REFUSED_RETRY_SECONDS,
    CoordinatorConnection,
    Heartbeats,
)
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.wire import FrameType

log = logging.getLogger("rtp_llm.guard")

LOG_INTERVAL_SECONDS = 3.0
MAX_KNOWN_PIDS = 1000


class GangWatch:
    """The guard's connection to the coordinator: a thread that receives the status of all ranks, and kills a hung rank
    of this part when the coordinator says so (KILL frame).
    """

    def __init__(self, part_spec: PartSpec):
        self.part_spec = part_spec
        self.verdicts: dict[str, str] = {}  # on lost epochs, by epoch: "investigating", "request" or "engine"
        self.roles: dict[int, tuple[int, int]] = {}  # by pid of a local worker: its last rank and epoch
        self.kill_reasons: dict[int, str] = {}  # by pid of a worker that this thread killed
        self.num_messages = 0  # from the coordinator
        self.coordinator_pid = 0
        self.served_at = 0.0  # time.monotonic() when all ranks last served
        self._epoch = 0
        self._recall_roles()
        self._message, self._next_log_at = "", 0.0
        self._heartbeats = Heartbeats(dict, threading.Event())

    def start(self) -> None:
        threading.Thread(target=self._run, name="gang-watch", daemon=True).start()

    def _run(self) -> None:
        while True:
            reason = self._follow()
            if self.part_spec.plan.part != 0:
                reason = f"waiting for {self.part_spec.plan.describe_part(0)}: {reason}"
            self._write({"epoch": self._epoch, "in_epoch": False, "ranks": {}, "message": reason})
            time.sleep(CONNECT_RETRY_SECONDS)

    def _follow(self) -> str:
        """Handles the coordinator's messages until the connection ends. Returns the reason."""
        try:
            connection = CoordinatorConnection(self.part_spec)
        except (OSError, ValueError) as error:
            return f"rendezvous: {getattr(error, 'strerror', None) or error}"
        try:
            connection.say_hello("guard")
            self._heartbeats.connection = connection
            while True:
                self._handle_frame(*connection.receive())
        except (OSError, ValueError, KeyError) as error:
            return f"rendezvous interrupted: {error}"
        finally:
            self._heartbeats.connection = None
            connection.close()
            if not connection.is_accepted:
                time.sleep(REFUSED_RETRY_SECONDS)

    def _handle_frame(self, frame_type: FrameType, message: dict[str, Any]) -> None:
        self.num_messages += 1
        if frame_type == FrameType.GANG_STATUS:
            self._epoch, self.coordinator_pid = int(message["epoch"]), int(message["pid"])
            self.verdicts = message["verdicts"]
            if message["in_epoch"] and all(rank.get("phase") == "serving" for rank in message["ranks"].values()):
                self.served_at = time.monotonic()
            self._remember_roles(message)
            self._write(message)
        elif frame_type == FrameType.KILL:
            self._kill(int(message["pid"]), str(message["reason"]))

    def _recall_roles(self) -> None:
        """Reads the roles from gang.json, if a guard before this one has written it: a worker may have ended since."""
        with suppress(OSError, ValueError, KeyError):
            status = json.loads(self.part_spec.gang_status_path.read_text())
            self._epoch = int(status["epoch"])
            self._remember_roles(status)

    def _remember_roles(self, status: dict[str, Any]) -> None:
        for rank, rank_status in status["ranks"].items():
            if rank_status["part"] == self.part_spec.plan.part:
                self.roles[int(rank_status["pid"])] = int(rank), self._epoch
        for pid in list(self.roles)[:-MAX_KNOWN_PIDS]:
            del self.roles[pid]

    def _kill(self, pid: int, reason: str) -> None:
        """Kills a worker of this part. Ignores pids of other processes."""
        with suppress(psutil.Error, ProcessLookupError):
            if "rtp_llm.engine.main" in psutil.Process(pid).cmdline() and psutil.Process(pid).ppid() == os.getppid():
                log.error("worker with pid %d: %s: killing it", pid, reason)
                self.kill_reasons[pid] = reason
                os.kill(pid, signal.SIGKILL)

    def _write(self, status: dict[str, Any]) -> None:
        """Writes gang.json (status of all ranks), which the API process of the part reads and whose age it checks."""
        if status["message"]:
            self._log_waiting(str(status["message"]))
        path = self.part_spec.gang_status_path
        try:
            files.replace(path, json.dumps(status))
        except OSError as error:  # on a full disk the ranks continue, and /health reports a stale status
            log.error("cannot write %s (status of all ranks): %s", path, error.strerror)

    def _log_waiting(self, message: str) -> None:
        if message != self._message or time.monotonic() >= self._next_log_at:
            interval = min(LOG_INTERVAL_SECONDS, self.part_spec.config.gang_sleep_time)
            self._message, self._next_log_at = message, time.monotonic() + interval
            log.info("%s", message)
