"""The coordinator: a process of part 0 that uses no GPU.

It runs the rendezvous, which assigns ranks to workers (processes that can serve as a rank). If a rank is lost, it ends
the epoch for all ranks and forms the next one from the remaining workers, which keep their weights in memory, and a
spare, which replaces the lost rank.

Every worker, and the guard of every part, keeps one TCP connection open. With a key-value store that ranks poll, the
coordinator could not push errors to waiting parts, and would notice a lost rank only at the next poll; a connection
reports EOF at once.
"""

import logging
import os
import secrets
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtp_llm import files
from rtp_llm import log as logs
from rtp_llm.machine.process import stopping_file
from rtp_llm.parallel.gang_port import Connection, GangPort
from rtp_llm.parallel.handshake import SecretError, read_secret
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.plan import RENDEZVOUS_PORT_OFFSET, PlannedPort
from rtp_llm.parallel.ports import gang_host, listen_as_planned
from rtp_llm.parallel.rank_status import LONGEST_STEPS
from rtp_llm.parallel.rendezvous import Rendezvous, Worker
from rtp_llm.parallel.wire import FrameType, WireError, pack_json

log = logging.getLogger("rtp_llm.coordinator")

HEARTBEAT_INTERVAL_SECONDS = 0.5
PHASE_CHANGE_SECONDS = 0.02  # from a change of phase, which ranks may wait for, to the status that tells it
# From the first difference to the rejection, which then also lists the parts that join late.
DISAGREE_GRACE_SECONDS = 1.5
SILENT_SECONDS = 2.0
FROZEN_SECONDS = 3.0  # between two periodic calls: this machine, or at least this process, was stopped
RESIDENTS_SECONDS = 3.0  # from the start until a rank with weights that has not come back counts as lost
# That importing torch may take without a heartbeat: reading its libraries from a cold disk holds Python's global lock.
IMPORT_SECONDS = 120.0
REFUSAL_SHOWN_SECONDS = 5.0
TWIN_SECONDS = 1.0  # after which a heartbeat of the first worker proves that both live
FAILURE_SETTLE_SECONDS = 1.0  # from the report of a rank to the end of the epoch: a lost rank explains it better
FAILURE_WINDOW_SECONDS = 600.0


@dataclass(eq=False)
class _Peer:
    """A worker or a guard, whose HELLO has been accepted."""

    connection: Connection
    worker: Worker | None = None
    guarded_part: int | None = None
    rank_status: dict[str, Any] = field(default_factory=dict)
    last_seen: float = field(default_factory=time.monotonic)
    is_importing: bool = False


class Coordinator:
    """Forms the gang: listens on the rendezvous port, assigns ranks to workers, notices when a rank is lost, and tells
    all other ranks.
    """

    def __init__(self, part_spec: PartSpec, listener: socket.socket, gang_secret: bytes = b""):
        self.part_spec, self._listener = part_spec, listener
        self.incarnation = secrets.token_hex(8)  # a part 0 that was recreated counts its epochs from 1 again
        self.rendezvous = Rendezvous(part_spec.plan, part_spec.fingerprint)
        self._port = GangPort(listener, gang_secret, "rendezvous port", self._handle_frame, self._on_lost)
        self._peers: dict[Connection, _Peer] = {}
        self._epoch = 0
        self._in_epoch = self._has_served = False
        self._reason = ""  # why the last epoch ended
        self._refusal, self._refused_at = "", 0.0  # of the last peer without the right secret
        self._reject_at = 0.0
        self._started_at = self._waiting_since = self._send_at = self._periodic_at = time.monotonic()
        self._failure, self._failed_at = "", 0.0  # what a rank of this epoch reported first
        self._failures: deque[float] = deque()  # ends of epochs that no lost rank explains

    def serve(self) -> None:
        """Runs the event loop: calls `serve_once` again and again until the process ends."""
        while True:
            self.serve_once()

    def serve_once(self) -> None:
        """Waits for connections and frames of workers and guards, at most until heartbeats are due. Handles them."""
        self._port.serve_once(self._send_at)
        if time.monotonic() >= self._send_at:
            self._send_at = time.monotonic() + HEARTBEAT_INTERVAL_SECONDS
            self._send_periodic()

    def close(self) -> None:
        self._port.close()
        self._listener.close()

    # Connections

    def _handle_frame(self, connection: Connection, frame_type: FrameType, message: dict[str, Any]) -> None:
        peer = self._peers.get(connection)
        if frame_type == FrameType.HELLO:
            self._on_hello(connection, message)
        elif frame_type == FrameType.HEARTBEAT and peer:
            if message.get("phase") != peer.rank_status.get("phase"):
                self._send_at = min(self._send_at, time.monotonic() + PHASE_CHANGE_SECONDS)
            peer.rank_status = dict(message)
            peer.is_importing = bool(message.get("is_importing"))
        elif frame_type == FrameType.EPOCH_ENDED and peer and peer.worker:
            if self._in_epoch and message["epoch"] == self._epoch and not self._failure:
                self._failure = f"rank {peer.worker.rank}: {message['reason']}"
                self._failed_at = time.monotonic()
        else:
            raise WireError(
                f"the peer sent {frame_type.name}; allowed: HELLO, after that HEARTBEAT, and EPOCH_ENDED from a worker;"
                " do all parts run the same release?"
            )
        if peer:
            peer.last_seen = time.monotonic()

    def _on_hello(self, connection: Connection, message: dict[str, Any]) -> None:
        """Accepts a worker that asks for a rank, or a guard. Raises an error if the sender is not part of this gang."""
        try:
            connection.challenge.check(message)
        except SecretError as error:
            host = connection.address.rpartition(":")[0]
            self._refusal, self._refused_at = f"{host}: {error}", time.monotonic()
            raise
        part, last_part = int(message["part"]), self.part_spec.plan.num_parts - 1
        if not self.rendezvous.is_member(part, dict(message["fingerprint"])):
            reason = f"it says that it is part {part}, allowed: 0 to {last_part}"
            if 0 <= part <= last_part:
                version = self.part_spec.fingerprint.get("version")
                reason = f"most of its settings, model and version differ from those of part 0 (version {version})"
            raise WireError(
                f"the peer is not a part of this gang: {reason}; does it have a wrong address of part 0 (member list or"
                " LEADER_ADDRESS)?"
            )
        # A machine that loses power does not close its connections: with this timeout, unacknowledged data is an error.
        heartbeat_ms = round(self.part_spec.config.heartbeat_timeout * 1000)
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, heartbeat_ms)
        peer = self._peers.get(connection) or _Peer(connection)
        if message["kind"] == "guard":
            peer.guarded_part = part
        else:
            worker = Worker.from_hello(message, connection.address)
            if peer.worker:
                self.rendezvous.workers.remove(peer.worker)
                worker.rank = peer.worker.rank
            peer.worker = worker
            self.rendezvous.workers.append(worker)
        self._peers[connection], connection.is_known = peer, True
        self._port.send(connection, pack_json(FrameType.ACCEPTED, {"proof": connection.challenge.proof(message)}))
        self._try_begin_epoch()
        self._send_at = min(self._send_at, time.monotonic() + PHASE_CHANGE_SECONDS)

    def _on_lost(self, connection: Connection, reason: str) -> None:
        worker = self._peers.pop(connection).worker
        if worker:
            self.rendezvous.workers.remove(worker)
            if worker.rank is not None:
                self._on_rank_lost(worker, reason)
            self._try_begin_epoch()

    def _broadcast(self, frame_type: FrameType, message: dict[str, Any]) -> None:
        frame = pack_json(frame_type, message)
        for connection in list(self._peers):
            self._port.send(connection, frame)

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
        log.info("epoch %d of the gang begins: %s", self._epoch, self._describe(assigned))
        part0_address, kv_cache = self._part0_address(), self.rendezvous.kv_cache
        lost = []
        for peer in [p for p in self._peers.values() if p.worker in assigned.values()]:
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
                peer.connection.sock.sendall(pack_json(FrameType.WELCOME, message))
            except OSError as error:
                lost.append((peer.connection, str(error)))
        for connection, reason in lost:  # now that all others are in the epoch, and can be told that it ends
            self._port.drop(connection, reason)

    def _describe(self, assigned: dict[int, Worker]) -> str:
        kept = sum(worker.resident_rank is not None for worker in assigned.values())
        loading = [str(rank) for rank, worker in assigned.items() if worker.resident_rank is None]
        if not kept:
            return f"all {len(assigned)} ranks are here and agree on their settings"
        return f"{kept} ranks kept their weights; ranks that load them: {', '.join(loading) or 'none'}"

    def _next_epoch(self) -> int:
        """Returns the number of the new epoch. The last one is in a file, so that it survives this process."""
        path = self.part_spec.run_dir / "epoch"
        last = self._epoch
        try:
            last = max(last, int(path.read_text()) if path.exists() else 0)
            path.write_text(str(last + 1))
        except OSError as error:
            text = "cannot write the number of this start of the gang (epoch) to %s: %s; a restart may use it again"
            log.error(text, path, error.strerror)
        return last + 1

    def _part0_address(self) -> str:
        """Returns part 0's address to which another part connected; behind NAT, the settings have another one."""
        remote = (p.connection.sock for p in self._peers.values() if p.worker and p.worker.part != 0)
        return str(next((sock.getsockname()[0] for sock in remote), "127.0.0.1"))

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
        for peer in list(self._peers.values()):
            if peer.worker and restart and peer.worker.rank is not None:
                peer.worker.is_waiting = False  # it exits
            if peer.worker and not peer.worker.is_waiting:
                self._port.send(peer.connection, frame)
        self._broadcast(FrameType.GANG_STATUS, self._gang_status(time.monotonic()))

    # Periodic

    def _send_periodic(self) -> None:
        now = time.monotonic()
        if now - self._periodic_at > FROZEN_SECONDS:
            for peer in self._peers.values():
                peer.last_seen = now
        self._periodic_at = now
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
        for peer in [p for p in self._peers.values() if p.worker]:
            twin = self.rendezvous.twin(peer.worker) if peer.worker else None
            other = next((p for p in self._peers.values() if twin and p.worker is twin), None)
            if peer.worker is None or other is None:
                continue
            first, second = other.connection, peer.connection
            if first.connected_at > second.connected_at or other.last_seen < second.connected_at + TWIN_SECONDS:
                continue
            message = (
                f"the parts of the gang disagree:\n  part{peer.worker.part} is claimed twice, by {first.address} and"
                f" {second.address}: check WORLD_RANK"
            )
            log.error("%s", message)
            for rejected in (second,) if self._in_epoch else list(self._peers):
                self._port.send(rejected, pack_json(FrameType.REJECTED, {"message": message}))

    def _gang_status(self, now: float) -> dict[str, Any]:
        ranks = {
            p.worker.rank: p.rank_status | {"silent_s": round(now - p.last_seen, 3)}
            for p in self._peers.values()
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
            "verdicts": files.read_state(self.part_spec.verdicts_path),  # of the API process, see `api.suspects`
            "pid": os.getpid(),
        }

    def _check_liveness(self, now: float) -> None:
        """Drops the peers without heartbeats, and ranks without progress; the guards of their parts kill them."""
        timeout = self.part_spec.config.heartbeat_timeout
        limits = {False: timeout, True: max(timeout, IMPORT_SECONDS)}
        peers = list(self._peers.values())
        for peer in [p for p in peers if now - p.last_seen > limits[p.is_importing]]:
            self._condemn(peer, f"no heartbeat for {now - peer.last_seen:.0f} s")
        peers = list(self._peers.values())
        hanging = [p for p in peers if p.worker and p.worker.rank is not None and self._hangs(p.rank_status)]
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
            guards = [p for p in self._peers.values() if p.guarded_part == worker.part and p.last_seen > alive_at]
            for guard in guards:
                self._port.send(guard.connection, pack_json(FrameType.KILL, {"pid": worker.pid, "reason": reason}))
        self._port.drop(peer.connection, reason)


def _all_serve(status: dict[str, Any], world_size: int) -> bool:
    return [rank["phase"] for rank in status["ranks"].values()].count("serving") == world_size


def main(run_dir: Path) -> None:
    part_spec = PartSpec.load(run_dir)
    config, plan = part_spec.config, part_spec.plan
    logs.setup(f"{part_spec.label} coordinator", config.log_level, style=config.log_format)
    port, purpose = plan.leader_port(RENDEZVOUS_PORT_OFFSET), f"rendezvous (START_PORT - {RENDEZVOUS_PORT_OFFSET})"
    listener = listen_as_planned(PlannedPort(port, purpose, gang_host(plan)))
    Coordinator(part_spec, listener, read_secret(config)).serve()
