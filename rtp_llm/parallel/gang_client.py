"""A rank's membership in the gang: the roll call before anything heavy starts, the heartbeat after it.

A gang lives in numbered epochs. When any rank is lost the epoch is over for all: everyone leaves with a code that says
why, and the supervisors of all parts start the next one.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rtp_llm.config import Config
from rtp_llm.errors import CommunicationError, ExitCode, GangError
from rtp_llm.parallel.coordinator import HEARTBEAT_INTERVAL_SECONDS, Coordinator, OnRankLost, Timeouts
from rtp_llm.parallel.plan import RENDEZVOUS_PORT_OFFSET, Plan
from rtp_llm.parallel.rank_status import RankStatus
from rtp_llm.parallel.wire import FrameType, connect, listen, pack_json, recv_frame

log = logging.getLogger(__name__)

CONNECT_RETRY_SECONDS = 0.3
CONNECT_TIMEOUT_SECONDS = 3.0


class GangClient:
    """One rank's seat in the current epoch; `join` blocks until every rank of every part has one."""

    def __init__(self, plan: Plan, rank_status: RankStatus, config: Config, run_dir: Path, on_lost: OnRankLost):
        self.plan, self.rank_status, self.config = plan, rank_status, config
        self.epoch = 0
        self.address = ""  # this machine as the other parts see it; known once joined
        self._ranks: dict[str, dict[str, Any]] = {}  # the newest pulses of all ranks, from the hub
        self._on_lost = on_lost
        self._board = GangStatusFile(run_dir) if rank_status.rank == plan.first_rank else None
        self._hub: Coordinator | None = None
        self._sock: socket.socket | None = None
        self._say_again = 0.0

    def join(self, fingerprint: dict[str, Any]) -> None:
        """Raises GangError where parts disagree or one never comes; every part raises the same text."""
        deadline = time.monotonic() + self.config.gang_timeout_min * 60
        if self.rank_status.rank == 0:
            self._hub = self._open_coordinator()
        while True:
            try:
                self._sock = self._connect(deadline)
                self._sock.sendall(
                    pack_json(FrameType.HELLO, {"rank": self.rank_status.rank, "fingerprint": fingerprint})
                )
                welcome = self._wait_welcome(self._sock)
                break
            except OSError as error:
                # Part 0 went away before the roll was complete: it will come back, so call again.
                if self._sock:
                    self._sock.close()
                if time.monotonic() > deadline:
                    raise self._join_error(f"roll call interrupted: {error}") from None
                self._report(f"roll call interrupted: {error}")
                time.sleep(CONNECT_RETRY_SECONDS)
        self.epoch = int(welcome["epoch"])
        own = str(self._sock.getsockname()[0])
        self.address = str(welcome["part0_address"]) if self.plan.part == 0 else own
        log.info("epoch %d: all %d ranks are here and agree", self.epoch, self.plan.world_size)
        threading.Thread(target=self._heartbeat, name="heartbeat", daemon=True).start()
        threading.Thread(target=self._listen, name="gang", daemon=True).start()

    def wait_until_loaded(self) -> None:
        """Returns when every rank has its weights. Disks differ by minutes, and a collective would give up waiting;
        here a rank that stops making progress is the hub's to notice."""
        while sum(p["phase"] not in ("rendezvous", "loading") for p in self._ranks.values()) < self.plan.world_size:
            self.rank_status.mark_progress()
            time.sleep(0.05)

    def _open_coordinator(self) -> Coordinator:
        config = self.config
        host = "0.0.0.0" if self.plan.is_multi_part else "127.0.0.1"
        listener = listen(host, self.plan.leader_port(RENDEZVOUS_PORT_OFFSET))
        epoch = self._board.next_epoch() if self._board else 1
        timeouts = Timeouts(config.gang_timeout_min * 60, config.heartbeat_timeout, config.dist_comm_timeout)
        return Coordinator(self.plan, epoch, listener, timeouts, self._on_lost)

    def _connect(self, deadline: float) -> socket.socket:
        host, port = leader_host(self.plan), self.plan.leader_port(RENDEZVOUS_PORT_OFFSET)
        while True:
            try:
                return connect(host, port, CONNECT_TIMEOUT_SECONDS)
            except OSError as error:
                reason = error.strerror or str(error) or type(error).__name__
            if time.monotonic() > deadline:
                raise self._join_error(f"{host}:{port}: {reason}")
            self._report(f"waiting for {self.plan.describe_part(0)}: roll call at {host}:{port}: {reason}")
            time.sleep(CONNECT_RETRY_SECONDS)

    def _join_error(self, reason: str) -> GangError:
        return GangError(
            f"gave up after {self.config.gang_timeout_min:g} minutes (GANG_TIMEOUT_MIN):"
            f" missing {self.plan.describe_part(0)}: {reason}"
        )

    def _wait_welcome(self, sock: socket.socket) -> dict[str, Any]:
        sock.settimeout(max(self.config.heartbeat_timeout, 5))
        while True:
            kind, payload = recv_frame(sock)
            message: dict[str, Any] = json.loads(payload)
            if kind == FrameType.WELCOME:
                return message
            if kind == FrameType.REJECTED:
                raise GangError(str(message["message"]))
            if kind == FrameType.WAITING and message["missing"]:
                self._report(f"waiting for {message['missing']}")

    def _report(self, text: str) -> None:
        """Says who is missing every few seconds, once per part, and leaves word for /health."""
        if self._board is None:
            return
        self._board.write({"epoch": self.epoch, "ranks": {}, "message": text})
        if time.monotonic() >= self._say_again:
            self._say_again = time.monotonic() + min(3.0, self.config.gang_sleep_time)
            log.info("%s", text)

    def _heartbeat(self) -> None:
        assert self._sock is not None
        while True:
            try:
                self._sock.sendall(pack_json(FrameType.HEARTBEAT, self.rank_status.to_json()))
            except OSError as error:
                self._lost(f"lost part 0: {error}", ExitCode.COMMUNICATION)
            time.sleep(HEARTBEAT_INTERVAL_SECONDS)

    def _listen(self) -> None:
        """Reads the state of the gang that the hub sends with every beat, and posts it for this part's API."""
        assert self._sock is not None
        self._sock.settimeout(self.config.heartbeat_timeout)
        while True:
            try:
                kind, payload = recv_frame(self._sock)
            except TimeoutError:
                self._lost(f"no word from rank 0 for {self.config.heartbeat_timeout:.0f} s", ExitCode.HANG)
                return
            except OSError as error:
                self._lost(f"lost part 0: {error}", ExitCode.COMMUNICATION)
                return
            if kind != FrameType.GANG_STATUS:
                continue
            state = json.loads(payload)
            self._ranks = state["ranks"]
            if self._board:
                self._board.write(state | {"message": ""})

    def _lost(self, message: str, code: ExitCode) -> None:
        # Rank 0's own hub has the better reason and reports it itself; give it the first word.
        if self._hub:
            time.sleep(HEARTBEAT_INTERVAL_SECONDS)
        self._on_lost(message, code)


class GangStatusFile:
    """`gang.json` in the run directory: what the local API process knows of the gang. Its age tells whether it still
    holds.
    """

    def __init__(self, run_dir: Path):
        self._path = run_dir / "gang.json"
        self._epoch_path = run_dir / "epoch"

    def write(self, state: dict[str, Any]) -> None:
        scratch = self._path.with_suffix(".tmp")
        try:
            scratch.write_text(json.dumps(state))
            os.replace(scratch, self._path)
        except OSError as error:  # a full disk: /health will say that this is stale, and the ranks compute on
            log.error("%s: not written: %s", self._path, error.strerror)

    def next_epoch(self) -> int:
        """The number of the epoch that rank 0 now opens; counted over restarts of its process."""
        last = int(self._epoch_path.read_text()) if self._epoch_path.exists() else 0
        self._epoch_path.write_text(str(last + 1))
        return last + 1


def leader_host(plan: Plan) -> str:
    """Where this part reaches part 0. On part 0 itself loopback, whatever the file calls it: behind NAT its own
    published address may not lead back (alibaba/rtp-llm issue 82)."""
    return "127.0.0.1" if plan.part == 0 else plan.leader.ip


def exit_process(message: str, code: ExitCode) -> None:
    """The default answer to a loss: say so and go, past any collective that hangs. The supervisor does the rest."""
    log.critical("%s: leaving the epoch (exit code %d)", message, code)
    logging.shutdown()
    os._exit(code)


def accept_ranks(listener: socket.socket, plan: Plan, epoch: int, timeout: float) -> dict[int, socket.socket]:
    """Rank 0: takes the step connections of all other ranks, each of which names its rank and epoch.

    Raises CommunicationError where one does not come within `timeout` seconds.
    """
    peers: dict[int, socket.socket] = {}
    deadline = time.monotonic() + timeout
    while len(peers) < plan.world_size - 1:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            missing = [r for r in range(1, plan.world_size) if r not in peers]
            raise CommunicationError(f"ranks {missing} did not connect for steps within {timeout:.0f} s") from None
        rank = _read_join(sock, epoch)
        if rank is None:
            sock.close()
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peers[rank] = sock
    return peers


def _read_join(sock: socket.socket, epoch: int) -> int | None:
    """The rank that a new step connection belongs to; None for a stranger and for a rank of another epoch."""
    sock.settimeout(CONNECT_TIMEOUT_SECONDS)
    try:
        kind, payload = recv_frame(sock)
        message = json.loads(payload) if kind == FrameType.JOIN else {}
        if message["epoch"] == epoch:
            return int(message["rank"])
        log.warning("step port: dropped a connection from another epoch: %s", message)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("step port: dropped a connection: %s", error)
    return None


def retry_connect(dial: Callable[[], socket.socket], timeout: float) -> socket.socket:
    """Dials until the peer listens. Raises CommunicationError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return dial()
        except OSError as error:
            if time.monotonic() > deadline:
                raise CommunicationError(f"rank 0's step port: {error}") from error
            time.sleep(0.05)
