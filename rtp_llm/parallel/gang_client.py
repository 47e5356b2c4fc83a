"""A rank's membership in the gang: the rendezvous before torch is imported, then heartbeats.

The lifetime of a gang is divided into numbered epochs (starts of all ranks). Losing any rank ends the epoch for all
ranks: they abort it and exit with a code for the reason, and the guards of all parts (supervise/guard.py) restart them
in the next epoch.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rtp_llm.config import Config
from rtp_llm.errors import CommunicationError, ExitCode, GangError
from rtp_llm.parallel.coordinator import HEARTBEAT_INTERVAL_SECONDS, Coordinator, OnRankLost, Timeouts
from rtp_llm.parallel.plan import RENDEZVOUS_PORT_OFFSET, Plan
from rtp_llm.parallel.rank_status import RankStatus
from rtp_llm.parallel.wire import FrameType, connect, listen, pack_json, recv_frame

log = logging.getLogger(__name__)

CONNECT_RETRY_SECONDS = 0.1
CONNECT_TIMEOUT_SECONDS = 3.0
ABORT_TIMEOUT_SECONDS = 1.0  # NCCL's abort can hang on a faulty GPU


class GangClient:
    """One rank's connection to the coordinator. `join` blocks until all ranks of all parts have joined."""

    def __init__(self, plan: Plan, rank_status: RankStatus, config: Config, run_dir: Path, on_lost: OnRankLost):
        self.plan, self.rank_status, self.config = plan, rank_status, config
        self.epoch = 0
        self.address = ""  # address at which other parts reach this machine; set by `join`
        self._rank_statuses: dict[str, dict[str, Any]] = {}  # last RankStatus of each rank, from the coordinator
        # Ends the collectives of the current epoch, given a reason; called before `on_lost`, from any thread.
        self.abort_epoch: Callable[[str], None] = lambda reason: None
        self._on_lost = on_lost
        self._status_file = GangStatusFile(run_dir) if rank_status.rank == plan.first_rank else None
        self._coordinator: Coordinator | None = None
        self._sock: socket.socket | None = None
        self._next_report_at = 0.0

    def join(self, fingerprint: dict[str, Any]) -> None:
        """Blocks until all ranks have joined the gang. `fingerprint`: values that must be equal on all parts.

        Raises GangError if parts disagree or one does not join in time, with the same message on all parts.
        """
        deadline = time.monotonic() + self.config.gang_timeout_min * 60
        if self.rank_status.rank == 0:
            self._coordinator = self._open_coordinator()
        while True:
            try:
                self._sock = self._connect(deadline)
                self._sock.sendall(
                    pack_json(FrameType.HELLO, {"rank": self.rank_status.rank, "fingerprint": fingerprint})
                )
                welcome = self._wait_welcome(self._sock)
                break
            except OSError as error:
                # Part 0 may have been restarted before all ranks had joined: connect again.
                if self._sock:
                    self._sock.close()
                if time.monotonic() > deadline:
                    raise self._join_error(f"rendezvous interrupted: {error}") from None
                self._report(f"rendezvous interrupted: {error}")
                time.sleep(CONNECT_RETRY_SECONDS)
        self.epoch = int(welcome["epoch"])
        local_address = str(self._sock.getsockname()[0])
        self.address = str(welcome["part0_address"]) if self.plan.part == 0 else local_address
        size = self.plan.world_size
        log.info("epoch %d of the gang: all %d ranks are here and agree on their settings", self.epoch, size)
        threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True).start()
        threading.Thread(target=self._receive_gang_status, name="gang-status", daemon=True).start()

    def epochs(self) -> Iterator[int]:
        """Yields the number of each epoch that this process is a member of: today just the one that it has joined.

        After that it waits, because an aborted epoch ends the process: `on_lost` exits in the thread that aborted.
        """
        yield self.epoch
        threading.Event().wait()

    def wait_until_loaded(self) -> None:
        """Blocks until all ranks have loaded their weights.

        Otherwise a rank with a fast disk would enter the first collective early and exceed its timeout there. This wait
        has no timeout, because the coordinator detects a rank that makes no progress.
        """
        while not self._all_loaded():
            self.rank_status.mark_progress()
            time.sleep(0.05)

    def _all_loaded(self) -> bool:
        statuses = self._rank_statuses.values()
        return sum(status["phase"] not in ("rendezvous", "loading") for status in statuses) >= self.plan.world_size

    def _open_coordinator(self) -> Coordinator:
        config = self.config
        host = "0.0.0.0" if self.plan.is_multi_part else "127.0.0.1"
        listener = listen(host, self.plan.leader_port(RENDEZVOUS_PORT_OFFSET))
        epoch = self._status_file.next_epoch() if self._status_file else 1
        timeouts = Timeouts(config.gang_timeout_min * 60, config.heartbeat_timeout, config.dist_comm_timeout)
        return Coordinator(self.plan, epoch, listener, timeouts, self._end_epoch)

    def _connect(self, deadline: float) -> socket.socket:
        host, port = leader_host(self.plan), self.plan.leader_port(RENDEZVOUS_PORT_OFFSET)
        while True:
            try:
                return connect(host, port, CONNECT_TIMEOUT_SECONDS)
            except OSError as error:
                reason = error.strerror or str(error) or type(error).__name__
            if time.monotonic() > deadline:
                raise self._join_error(f"{host}:{port}: {reason}")
            self._report(f"waiting for {self.plan.describe_part(0)}: rendezvous at {host}:{port}: {reason}")
            time.sleep(CONNECT_RETRY_SECONDS)

    def _join_error(self, reason: str) -> GangError:
        return GangError(
            f"gave up after {self.config.gang_timeout_min:g} minutes (GANG_TIMEOUT_MIN):"
            f" missing {self.plan.describe_part(0)}: {reason}"
        )

    def _wait_welcome(self, sock: socket.socket) -> dict[str, Any]:
        sock.settimeout(max(self.config.heartbeat_timeout, 5))
        while True:
            frame_type, payload = recv_frame(sock)
            message: dict[str, Any] = json.loads(payload)
            if frame_type == FrameType.WELCOME:
                return message
            if frame_type == FrameType.REJECTED:
                raise GangError(str(message["message"]))
            if frame_type == FrameType.WAITING and message["missing"]:
                self._report(f"waiting for {message['missing']}")

    def _report(self, text: str) -> None:
        """Logs why this rank waits, at most every few seconds, and writes the reason to gang.json, for /health.

        Only the first rank of each part reports.
        """
        if self._status_file is None:
            return
        self._status_file.write({"epoch": self.epoch, "ranks": {}, "message": text})
        if time.monotonic() >= self._next_report_at:
            self._next_report_at = time.monotonic() + min(3.0, self.config.gang_sleep_time)
            log.info("%s", text)

    def _send_heartbeats(self) -> None:
        assert self._sock is not None
        while True:
            try:
                self._sock.sendall(pack_json(FrameType.HEARTBEAT, self.rank_status.to_json()))
            except OSError as error:
                self._lost(f"lost part 0: {error}", ExitCode.COMMUNICATION)
            self.rank_status.phase_changed.wait(HEARTBEAT_INTERVAL_SECONDS)
            self.rank_status.phase_changed.clear()

    def _receive_gang_status(self) -> None:
        """Writes each gang status (the status of all ranks, from rank 0) to gang.json, for this part's API process."""
        assert self._sock is not None
        self._sock.settimeout(self.config.heartbeat_timeout)
        while True:
            try:
                frame_type, payload = recv_frame(self._sock)
            except TimeoutError:
                self._lost(f"no message from rank 0 for {self.config.heartbeat_timeout:.0f} s", ExitCode.HANG)
                return
            except OSError as error:
                self._lost(f"lost part 0: {error}", ExitCode.COMMUNICATION)
                return
            if frame_type != FrameType.GANG_STATUS:
                continue
            gang_status = json.loads(payload)
            self._rank_statuses = gang_status["ranks"]
            if self._status_file:
                self._status_file.write(gang_status | {"message": ""})

    def _lost(self, message: str, code: ExitCode) -> None:
        # On rank 0 the coordinator reports which rank was lost: wait for it, since the first report ends the process.
        if self._coordinator:
            time.sleep(HEARTBEAT_INTERVAL_SECONDS)
        self._end_epoch(message, code)

    def _end_epoch(self, message: str, code: ExitCode) -> None:
        abort = threading.Thread(target=self.abort_epoch, args=(message,), name="abort", daemon=True)
        abort.start()
        abort.join(ABORT_TIMEOUT_SECONDS)
        self._on_lost(message, code)


class GangStatusFile:
    """Writes `gang.json` in the run directory: the status of all ranks, or the reason why they wait.

    The API process of the part reads the file and checks its age.
    """

    def __init__(self, run_dir: Path):
        self._path = run_dir / "gang.json"
        self._epoch_path = run_dir / "epoch"

    def write(self, gang_status: dict[str, Any]) -> None:
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(gang_status))
            os.replace(temporary, self._path)
        except OSError as error:  # on a full disk the ranks continue, and /health reports a stale status
            log.error("cannot write %s (status of all ranks): %s", self._path, error.strerror)

    def next_epoch(self) -> int:
        """Returns the number of the new epoch (start of the gang): the last number + 1.

        The last number is in a file, so that it survives restarts of rank 0.
        """
        last = int(self._epoch_path.read_text()) if self._epoch_path.exists() else 0
        self._epoch_path.write_text(str(last + 1))
        return last + 1


def leader_host(plan: Plan) -> str:
    """Returns the host at which this part reaches part 0.

    Part 0 itself uses loopback: behind NAT its published address may not route back (alibaba/rtp-llm issue 82).
    """
    return "127.0.0.1" if plan.part == 0 else plan.leader.ip


def exit_process(message: str, code: ExitCode) -> None:
    """Logs the message and exits with `code`.

    Uses os._exit because a hung collective blocks a normal exit; the guard restarts the ranks.
    """
    log.critical("%s: this rank exits (exit code %d)", message, code)
    logging.shutdown()
    os._exit(code)


def accept_ranks(listener: socket.socket, plan: Plan, epoch: int, timeout: float) -> dict[int, socket.socket]:
    """Accepts on rank 0 the connections over which it sends steps to the other ranks. Returns sockets by rank.

    Each rank first sends a JOIN frame with its number. Raises CommunicationError if a rank does not connect within
    `timeout` seconds.
    """
    peers: dict[int, socket.socket] = {}
    deadline = time.monotonic() + timeout
    while len(peers) < plan.world_size - 1:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            missing = [r for r in range(1, plan.world_size) if r not in peers]
            raise CommunicationError(
                f"ranks {missing} did not connect to rank 0 for scheduler steps within {timeout:.0f} s"
            ) from None
        rank = _read_join(sock, epoch)
        if rank is None:
            sock.close()
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peers[rank] = sock
    return peers


def _read_join(sock: socket.socket, epoch: int) -> int | None:
    """Returns the rank that opened this connection; None if the peer is no rank, or did not restart with this gang."""
    sock.settimeout(CONNECT_TIMEOUT_SECONDS)
    try:
        frame_type, payload = recv_frame(sock)
        message = json.loads(payload) if frame_type == FrameType.JOIN else {}
        if message["epoch"] == epoch:
            return int(message["rank"])
        log.warning(
            "port for steps from rank 0: closed the connection of a rank of another epoch (start of the gang): %s",
            message,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("port for steps from rank 0: closed a connection that is not from a rank: %s", error)
    return None


def retry_connect(dial: Callable[[], socket.socket], address: str, timeout: float) -> socket.socket:
    """Calls `dial` until it returns a connection to rank 0, over which rank 0 sends steps. Returns the connection.

    `address`: "host:port" of rank 0, for the error. Raises CommunicationError after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return dial()
        except OSError as error:
            if time.monotonic() > deadline:
                raise CommunicationError(f"cannot connect to rank 0 at {address} (scheduler steps): {error}") from error
            time.sleep(0.05)
