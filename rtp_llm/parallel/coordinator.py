"""`python -m rtp_llm.parallel.coordinator RUN_DIR`: the coordinator, a process of part 0 that uses no GPU.

It runs the rendezvous, which assigns ranks to workers (processes that can serve as a rank). If a rank is lost, it ends
the epoch for all ranks and forms the next one from the remaining workers, which keep their weights in memory, and a
spare, which replaces the lost rank.

Every worker, and the guard of every part, keeps one TCP connection open. With a key-value store that ranks poll, the
coordinator could not push errors to waiting parts, and would notice a lost rank only at the next poll; a connection
reports EOF at once.
"""

import errno
import json
import logging
import os
import secrets
import selectors
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rtp_llm import log as logs
from rtp_llm.machine.process import exit_with_supervisord, run_main, stopping_file
from rtp_llm.parallel.handshake import Challenge, SecretError, read_secret
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.plan import RENDEZVOUS_PORT_OFFSET, PlannedPort
from rtp_llm.parallel.ports import gang_host, listen_as_planned
from rtp_llm.parallel.rank_status import LONGEST_STEPS
from rtp_llm.parallel.rendezvous import Rendezvous, Worker
from rtp_llm.parallel.wire import FrameBuffer, FrameType, WireError, pack_json

log = logging.getLogger("rtp_llm.coordinator")

HEARTBEAT_INTERVAL_SECONDS = 0.5
PHASE_CHANGE_SECONDS = 0.02  # from a change of phase, which ranks may wait for, to the status that tells it
HELLO_TIMEOUT_SECONDS = 5.0  # from accept to the HELLO frame
SEND_TIMEOUT_SECONDS = 5.0
MAX_MESSAGE_BYTES = 1 << 16  # a heartbeat has a few hundred bytes
# From the first difference to the rejection, which then also lists the parts that join late.
DISAGREE_GRACE_SECONDS = 1.5
SILENT_SECONDS = 2.0
FROZEN_SECONDS = 3.0  # between two periodic calls: this machine, or at least this process, was stopped
RESIDENTS_SECONDS = 3.0  # from the start until a rank with weights that has not come back counts as lost
MAX_STRANGERS = 256
# That importing torch may take without a heartbeat: reading its libraries from a cold disk holds Python's global lock.
IMPORT_SECONDS = 120.0
LOG_AGAIN_SECONDS = 60.0
MAX_LOGGED_REASONS = 1000
REFUSAL_SHOWN_SECONDS = 5.0
TWIN_SECONDS = 1.0  # after which a heartbeat of the first worker proves that both live
FAILURE_SETTLE_SECONDS = 1.0  # from the report of a rank to the end of the epoch: a lost rank explains it better
FAILURE_WINDOW_SECONDS = 600.0


@dataclass(eq=False)
class _Peer:
    """One connection to the rendezvous port. It is a worker's or a guard's once its HELLO has been accepted."""

    sock: socket.socket
    address: str
    challenge: Challenge
    buffer: FrameBuffer = field(default_factory=lambda: FrameBuffer(MAX_MESSAGE_BYTES))
    worker: Worker | None = None
    guarded_part: int | None = None
    rank_status: dict[str, Any] = field(default_factory=dict)
    connected_at: float = field(default_factory=time.monotonic)
    last_seen: float = field(default_factory=time.monotonic)
    has_sent_data: bool = False
    is_importing: bool = False

    @property
    def is_accepted(self) -> bool:
        return self.worker is not None or self.guarded_part is not None


class Coordinator:
    """The process of part 0 that forms the gang: serves the rendezvous port, assigns ranks, notices lost ranks and
    tells all others.
    """

    def __init__(self, part_spec: PartSpec, listener: socket.socket, gang_secret: bytes = b""):
        self.part_spec, self.listener = part_spec, listener
        self.incarnation = secrets.token_hex(8)  # a part 0 that was recreated counts its epochs from 1 again
        self.rendezvous = Rendezvous(part_spec.plan, part_spec.fingerprint)
        self._secret = gang_secret
        self._peers: list[_Peer] = []
        self._epoch = 0
        self._in_epoch = self._has_served = False
        self._reason = ""  # why the last epoch ended
        self._refusal, self._refused_at = "", 0.0  # of the last peer without the right secret
        self._reject_at = 0.0
        self._started_at = self._waiting_since = self._send_at = self._periodic_at = time.monotonic()
        self._failure, self._failed_at = "", 0.0  # what a rank of this epoch reported first
        self._logged_at: dict[tuple[str, str], float] = {}  # by host and reason: a stranger may come often
        self._failures: deque[float] = deque()  # ends of epochs that no lost rank explains
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, None)

    def serve(self) -> None:
        """Handles events until the process ends."""
        while True:
            self.serve_once()

    def serve_once(self) -> None:
        """Waits for the next events and handles them."""
        for key, _ in self._selector.select(timeout=max(0.0, self._send_at - time.monotonic())):
            if key.data is None:
                self._accept()
            else:
                self._read(key.data)
        if time.monotonic() >= self._send_at:
            self._send_at = time.monotonic() + HEARTBEAT_INTERVAL_SECONDS
            self._send_periodic()

    def close(self) -> None:
        for peer in self._peers:
            peer.sock.close()
        self.listener.close()
        self._selector.close()

    # Connections

    def _accept(self) -> None:
        try:
            sock, address = self.listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(HEARTBEAT_INTERVAL_SECONDS / 5)  # the listener stays readable: avoid a busy loop
            return  # the peer has closed the connection, or a later call accepts it
        sock.settimeout(SEND_TIMEOUT_SECONDS)  # frames to peers are small: a full send buffer means a lost peer
        # A machine that loses power does not close its connections: with this timeout, unacknowledged data is an error.
        heartbeat_ms = round(self.part_spec.config.heartbeat_timeout * 1000)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, heartbeat_ms)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        strangers = [p for p in self._peers if not p.is_accepted]
        if len(strangers) >= MAX_STRANGERS:
            self._drop(strangers[0], f"more than {MAX_STRANGERS} connections without a HELLO frame")
        peer = _Peer(sock, f"{address[0]}:{address[1]}", Challenge(self._secret))
        self._peers.append(peer)
        self._selector.register(sock, selectors.EVENT_READ, peer)
        self._send(peer, peer.challenge.frame())

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.sock.recv(1 << 16)
            if not data:
                raise WireError("the peer closed the connection")
            peer.has_sent_data = True
            for frame_type, payload in peer.buffer.feed(data):
                self._handle_frame(peer, frame_type, json.loads(payload))
        except Exception as error:  # any program can connect to this port and send arbitrary data
            if isinstance(error, SecretError):
                host = peer.address.rpartition(":")[0]
                self._refusal, self._refused_at = f"{host}: {error}", time.monotonic()
            self._drop(peer, str(error) or type(error).__name__)

    def _handle_frame(self, peer: _Peer, frame_type: FrameType, message: dict[str, Any]) -> None:
        if frame_type == FrameType.HELLO:
            self._on_hello(peer, message)
        elif frame_type == FrameType.HEARTBEAT and peer.is_accepted:
            if message.get("phase") != peer.rank_status.get("phase"):
                self._send_at = min(self._send_at, time.monotonic() + PHASE_CHANGE_SECONDS)
            peer.rank_status = dict(message)
            peer.is_importing = bool(message.get("is_importing"))
        elif frame_type == FrameType.EPOCH_ENDED and peer.worker:
            if self._in_epoch and message["epoch"] == self._epoch and not self._failure:
                self._failure = f"rank {peer.worker.rank}: {message['reason']}"
                self._failed_at = time.monotonic()
        else:
            raise WireError(f"the peer sent an unexpected {frame_type.name} frame")
        peer.last_seen = time.monotonic()

    def _on_hello(self, peer: _Peer, message: dict[str, Any]) -> None:
        """Accepts a worker that asks for a rank, or a guard. Raises an error if the sender is not part of this gang."""
        peer.challenge.check(message)
        if not self.rendezvous.is_member(int(message["part"]), dict(message["fingerprint"])):
            raise WireError(
                f"the peer is not a part of this gang, which has parts 0-{self.part_spec.plan.num_parts - 1} and the"
                f" fingerprint of part 0, version {self.part_spec.fingerprint.get('version')}"
            )
        if message["kind"] == "guard":
            peer.guarded_part = int(message["part"])
        else:
            worker = Worker.from_hello(message, peer.address)
            if peer.worker:
                self.rendezvous.workers.remove(peer.worker)
                worker.rank = peer.worker.rank
            peer.worker = worker
            self.rendezvous.workers.append(worker)
        self._send(peer, pack_json(FrameType.ACCEPTED, {"proof": peer.challenge.proof(message)}))
        self._try_begin_epoch()
        self._send_at = min(self._send_at, time.monotonic() + PHASE_CHANGE_SECONDS)

    def _drop(self, peer: _Peer, reason: str) -> None:
        if peer not in self._peers:
            return
        self._peers.remove(peer)
        self._selector.unregister(peer.sock)
        peer.sock.close()
        if not peer.is_accepted:
            # The doctor probes this port: it connects, sends nothing and closes the connection.
            host, now = peer.address.rpartition(":")[0], time.monotonic()
            is_new = now - self._logged_at.get((host, reason), -LOG_AGAIN_SECONDS) >= LOG_AGAIN_SECONDS
            if peer.has_sent_data and is_new and len(self._logged_at) < MAX_LOGGED_REASONS:
                self._logged_at[host, reason] = now
                log.warning("rendezvous port: closed the connection from %s: %s", peer.address, reason)
        elif peer.worker:
            self.rendezvous.workers.remove(peer.worker)
            if peer.worker.rank is not None:
                self._on_rank_lost(peer.worker, reason)
            self._try_begin_epoch()

    def _send(self, peer: _Peer, frame: bytes) -> None:
        try:
            peer.sock.sendall(frame)
        except OSError as error:
            self._drop(peer, str(error))

    def _broadcast(self, frame_type: FrameType, message: dict[str, Any]) -> None:
        frame = pack_json(frame_type, message)
        for peer in [p for p in self._peers if p.is_accepted]:
            self._send(peer, frame)

    # Epochs

    def _try_begin_epoch(self) -> None:
        """Begins an epoch once there is a worker for every rank and the parts agree; schedules a rejection if not."""
        if self._in_epoch:
            return
        if self.rendezvous.differences():
            self._reject_at = self._reject_at or time.monotonic() + DISAGREE_GRACE_SECONDS
            return
        if any(self.rendezvous.twin(w) for w in self.rendezvous.workers):
            return
        assigned = self.rendezvous.assign()
        if not assigned:
            return
        kept = [worker.resident_rank is not None for worker in assigned.values()]
        if any(kept) and not all(kept) and time.monotonic() - self._started_at < RESIDENTS_SECONDS:
            return  # this process was restarted, and not all ranks with weights have come back yet
        self._begin_epoch(assigned)

    def _begin_epoch(self, assigned: dict[int, Worker]) -> None:
        self.rendezvous.begin_epoch(assigned)
        self._epoch = self._next_epoch()
        self._in_epoch, self._has_served, self._reject_at = True, False, 0.0
        log.info("epoch %d of the gang: %s", self._epoch, self._describe(assigned))
        part0_address, kv_cache = self._part0_address(), self.rendezvous.kv_cache
        lost = []
        for peer in [p for p in self._peers if p.worker in assigned.values()]:
            peer.rank_status = {}
            message = {
                "rank": peer.worker.rank if peer.worker else None,
                "epoch": self._epoch,
                "incarnation": self.incarnation,
                "part0_address": part0_address,
                "num_blocks": kv_cache.num_blocks,
                "max_seq_len": kv_cache.max_seq_len,
            }
            try:
                peer.sock.sendall(pack_json(FrameType.WELCOME, message))
            except OSError as error:
                lost.append((peer, str(error)))
        for peer, reason in lost:  # now that all others are in the epoch, and can be told that it ends
            self._drop(peer, reason)

    def _describe(self, assigned: dict[int, Worker]) -> str:
        kept = sum(worker.resident_rank is not None for worker in assigned.values())
        loading = ", ".join(str(rank) for rank, worker in assigned.items() if worker.resident_rank is None)
        if not kept:
            return f"all {len(assigned)} ranks are here and agree on their settings"
        return f"{kept} ranks kept their weights; " + (f"rank {loading} loads them" if loading else "none was lost")

    def _next_epoch(self) -> int:
        """Returns the number of the new epoch. The last one is in a file, so that it survives this process."""
        path = self.part_spec.run_dir / "epoch"
        last = self._epoch
        try:
            last = max(last, int(path.read_text()) if path.exists() else 0)
            path.write_text(str(last + 1))
        except OSError as error:
            log.error("cannot write the epoch number to %s: %s", path, error.strerror)
        return last + 1

    def _part0_address(self) -> str:
        """Returns part 0's address to which another part connected; behind NAT, the settings have another one."""
        remote = (p for p in self._peers if p.worker and p.worker.part != 0)
        return str(next((p.sock.getsockname()[0] for p in remote), "127.0.0.1"))

    def _on_rank_lost(self, worker: Worker, reason: str) -> None:
        message = f"lost rank {worker.rank} ({worker.address}): {reason}"
        if worker.part == 0 and stopping_file(self.part_spec.run_dir).exists():
            message = "part0 is stopping"
        if self._in_epoch:
            self._end_epoch(message)
        elif message != self._reason:  # other ranks may have reported the lost connection before
            self._reason = message
            log.warning("%s", message)

    def _check_failure(self, now: float) -> None:
        """Ends the epoch if a rank reported that it cannot continue although no process has ended.

        A new epoch often helps, for example after a cut network. If it does not, the ranks' processes are restarted.
        """
        if not self._failure or now - self._failed_at < FAILURE_SETTLE_SECONDS:
            return
        while self._failures and now - self._failures[0] > FAILURE_WINDOW_SECONDS:
            self._failures.popleft()
        self._failures.append(now)
        is_useless = not self._has_served or len(self._failures) > self.part_spec.config.restart_limit
        self._end_epoch(self._failure, restart=is_useless)

    def _end_epoch(self, reason: str, *, restart: bool = False) -> None:
        """Makes all ranks leave the epoch. restart: their processes exit, instead of keeping what they have loaded."""
        self._in_epoch, self._reason, self._failure = False, reason, ""
        self._waiting_since = time.monotonic()
        log.warning("epoch %d ends: %s", self._epoch, reason)
        frame = pack_json(FrameType.EPOCH_ENDED, {"epoch": self._epoch, "reason": reason, "restart": restart})
        for peer in list(self._peers):
            if peer.worker and restart and peer.worker.rank is not None:
                peer.worker.is_waiting = False  # it exits
            if peer.worker and not peer.worker.is_waiting:
                self._send(peer, frame)
        self._broadcast(FrameType.GANG_STATUS, self._gang_status(time.monotonic()))

    # Periodic

    def _send_periodic(self) -> None:
        now = time.monotonic()
        if now - self._periodic_at > FROZEN_SECONDS:
            for peer in self._peers:
                peer.last_seen = now
        self._periodic_at = now
        for peer in [p for p in self._peers if not p.is_accepted and now - p.connected_at > HELLO_TIMEOUT_SECONDS]:
            self._drop(peer, f"no HELLO frame within {HELLO_TIMEOUT_SECONDS:g} s")
        self._check_liveness(now)
        self._check_failure(now)
        self._reject_twins(now)
        self._try_begin_epoch()
        if not self._in_epoch:
            self._reject_disagreement(now)
        status = self._gang_status(now)
        self._has_served = self._has_served or (self._in_epoch and _all_serve(status, self.part_spec.plan.world_size))
        self._broadcast(FrameType.GANG_STATUS, status)

    def _reject_disagreement(self, now: float) -> None:
        differences, join_seconds = self.rendezvous.differences(), self.part_spec.config.gang_timeout_min * 60
        if not differences:
            self._reject_at = 0.0
        if self._reject_at and now >= self._reject_at:
            self._broadcast(FrameType.REJECTED, {"message": f"the parts of the gang disagree:{differences}"})
        elif now - self._waiting_since > join_seconds and self.rendezvous.missing():
            minutes = join_seconds / 60
            message = f"gave up after {minutes:g} minutes (GANG_TIMEOUT_MIN): missing {self.rendezvous.missing()}"
            self._broadcast(FrameType.REJECTED, {"message": message})

    def _reject_twins(self, now: float) -> None:
        """Rejects two parts with the same WORLD_RANK; only the second one if the first is in an epoch.

        The connection of a part that was recreated stays open for some time, so both must first show that they are
        alive.
        """
        for peer in [p for p in self._peers if p.worker]:
            twin = self.rendezvous.twin(peer.worker) if peer.worker else None
            other = next((p for p in self._peers if twin and p.worker is twin), None)
            if peer.worker is None or other is None or other.connected_at > peer.connected_at:
                continue
            if other.last_seen < peer.connected_at + TWIN_SECONDS:
                continue
            message = (
                f"the parts of the gang disagree:\n  part{peer.worker.part} is claimed twice, by {other.address} and"
                f" {peer.address}: check WORLD_RANK"
            )
            log.error("%s", message)
            for rejected in (peer,) if self._in_epoch else [p for p in self._peers if p.is_accepted]:
                self._send(rejected, pack_json(FrameType.REJECTED, {"message": message}))

    def _gang_status(self, now: float) -> dict[str, Any]:
        ranks = {
            p.worker.rank: p.rank_status | {"silent_s": round(now - p.last_seen, 3)}
            for p in self._peers
            if p.worker and p.worker.rank is not None and p.rank_status
        }
        message = ""
        if not self._in_epoch:
            waiting = self.rendezvous.missing()
            refusal = self._refusal if now - self._refused_at < REFUSAL_SHOWN_SECONDS else ""
            message = "; ".join(filter(None, (self._reason, f"waiting for {waiting}" if waiting else "", refusal)))
        return {
            "epoch": self._epoch,
            "incarnation": self.incarnation,
            "in_epoch": self._in_epoch,
            "ranks": ranks,
            "message": message,
            "verdicts": self._verdicts(),
            "pid": os.getpid(),
        }

    def _verdicts(self) -> dict[str, str]:
        """Returns the API process's verdicts on lost epochs, see `api.suspects`."""
        try:
            verdicts: dict[str, str] = json.loads(self.part_spec.verdicts_path.read_text())
        except (OSError, ValueError):
            return {}
        return verdicts

    def _check_liveness(self, now: float) -> None:
        """Drops the peers without heartbeats, and ranks without progress; the guards of their parts kill them."""
        timeout = self.part_spec.config.heartbeat_timeout
        limits = {False: timeout, True: max(timeout, IMPORT_SECONDS)}
        for peer in [p for p in self._peers if p.is_accepted and now - p.last_seen > limits[p.is_importing]]:
            self._condemn(peer, f"no heartbeat for {now - peer.last_seen:.0f} s")
        hanging = [p for p in self._peers if p.worker and p.worker.rank is not None and self._hangs(p.rank_status)]
        if hanging and self._in_epoch:  # the others of a lost epoch are about to leave it
            # Ranks that wait for another one in a collective stand still as well: further on, or in the same layer.
            least = min(p.rank_status["progress_count"] for p in hanging)
            last = [p for p in hanging if p.rank_status["progress_count"] == least]
            for peer in [p for p in last if not p.rank_status["in_collective"]] or last:
                self._condemn(peer, f"no progress for {peer.rank_status['idle_s']:.0f} s")

    def _hangs(self, rank_status: dict[str, Any]) -> bool:
        if not rank_status:
            return False
        config = self.part_spec.config
        limit = max(config.hang_seconds, LONGEST_STEPS * float(rank_status["longest_s"]))
        # Loading, the import of torch and the first contact with a GPU may stand still for longer.
        return float(rank_status["idle_s"]) > (limit if rank_status["phase"] == "serving" else config.dist_comm_timeout)

    def _condemn(self, peer: _Peer, reason: str) -> None:
        worker = peer.worker
        if worker:
            # A silent guard means that the whole part is frozen or cut off. Its ranks may be healthy when it is back.
            alive_at = time.monotonic() - SILENT_SECONDS
            for guard in [p for p in self._peers if p.guarded_part == worker.part and p.last_seen > alive_at]:
                self._send(guard, pack_json(FrameType.KILL, {"pid": worker.pid, "reason": reason}))
        self._drop(peer, reason)


def _all_serve(status: dict[str, Any], world_size: int) -> bool:
    return [rank["phase"] for rank in status["ranks"].values()].count("serving") == world_size


def main(run_dir: Path) -> None:
    part_spec = PartSpec.load(run_dir)
    config, plan = part_spec.config, part_spec.plan
    logs.setup(f"{part_spec.label} coordinator", config.log_level, style=config.log_format)
    port, purpose = plan.leader_port(RENDEZVOUS_PORT_OFFSET), f"rendezvous (START_PORT - {RENDEZVOUS_PORT_OFFSET})"
    listener = listen_as_planned(PlannedPort(port, purpose, gang_host(plan)))
    Coordinator(part_spec, listener, read_secret(config)).serve()


if __name__ == "__main__":
    exit_with_supervisord(Path(sys.argv[1]))
    run_main(partial(main, Path(sys.argv[1])))
