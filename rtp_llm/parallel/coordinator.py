"""The coordinator on rank 0: runs the rendezvous, in which all ranks join, and detects ranks that are lost later.

It compares the fingerprints of the ranks (values that must be equal on all parts) and assigns the epoch number. An
epoch lasts from a rendezvous until any rank is lost.

Every rank keeps one TCP connection open. With a key-value store that ranks poll, the coordinator could not push the
list of missing parts to waiting ranks, and would notice a lost rank only at the next poll; a connection reports EOF.
"""

import errno
import json
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rtp_llm.errors import ExitCode
from rtp_llm.parallel.plan import Plan
from rtp_llm.parallel.wire import FrameBuffer, FrameType, WireError, pack_json

log = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_SECONDS = 0.5
PHASE_CHANGE_SECONDS = 0.02  # from a change of phase, which ranks may wait for, to the status that tells it
HELLO_TIMEOUT_SECONDS = 5.0  # from accept to the HELLO frame
SEND_TIMEOUT_SECONDS = 5.0
MAX_MESSAGE_BYTES = 1 << 20  # a heartbeat has a few hundred bytes
DISAGREE_GRACE_SECONDS = (
    1.5  # from the first difference to the rejection, which then lists parts that join late as well
)
OnRankLost = Callable[[str, ExitCode], None]


@dataclass
class _Peer:
    """One connection to the rendezvous port. `rank` is None until the HELLO frame, which names it, has arrived."""

    sock: socket.socket
    address: str
    buffer: FrameBuffer = field(default_factory=lambda: FrameBuffer(MAX_MESSAGE_BYTES))
    rank: int | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    rank_status: dict[str, Any] = field(default_factory=dict)
    last_seen: float = field(default_factory=time.monotonic)
    has_sent_data: bool = False


@dataclass(frozen=True)
class Timeouts:
    """Limits in seconds.

    join: for all ranks to join. heartbeat, progress: a rank without them for this time counts as lost.
    """

    join: float
    heartbeat: float
    progress: float


class Coordinator:
    """Serves one rendezvous of the gang and its heartbeats on part 0's rendezvous port, in a thread of rank 0.

    Calls `on_lost` with a message and an exit code if a rank is lost after the rendezvous.
    """

    def __init__(self, plan: Plan, epoch: int, listener: socket.socket, timeouts: Timeouts, on_lost: OnRankLost):
        self.plan, self.epoch, self.listener, self.timeouts = plan, epoch, listener, timeouts
        self.on_lost = on_lost
        self._peers: list[_Peer] = []
        self._formed = False
        self._reject_at = 0.0
        self._started = self._send_at = time.monotonic()
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, None)
        threading.Thread(target=self._serve, name="coordinator", daemon=True).start()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select(timeout=max(0.0, self._send_at - time.monotonic())):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            if time.monotonic() >= self._send_at:
                self._send_at = time.monotonic() + HEARTBEAT_INTERVAL_SECONDS
                self._send_periodic()

    def _accept(self) -> None:
        try:
            sock, address = self.listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(HEARTBEAT_INTERVAL_SECONDS / 5)  # the listener stays readable: avoid a busy loop
            return  # the peer has closed the connection, or a later call accepts it
        sock.settimeout(SEND_TIMEOUT_SECONDS)  # frames to peers are small: a full send buffer means a lost peer
        # A machine that loses power does not close its connections: with this timeout, unacknowledged data is an error.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(self.timeouts.heartbeat * 1000))
        peer = _Peer(sock, f"{address[0]}:{address[1]}")
        self._peers.append(peer)
        self._selector.register(sock, selectors.EVENT_READ, peer)

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.sock.recv(1 << 16)
            if not data:
                raise WireError("the peer closed the connection")
            peer.has_sent_data = True
            for frame_type, payload in peer.buffer.feed(data):
                self._handle_frame(peer, frame_type, json.loads(payload))
        except Exception as error:  # any program can connect to this port and send arbitrary data
            self._drop(peer, str(error) or type(error).__name__)

    def _handle_frame(self, peer: _Peer, frame_type: FrameType, message: dict[str, Any]) -> None:
        peer.last_seen = time.monotonic()
        if frame_type == FrameType.HEARTBEAT:
            if message.get("phase") != peer.rank_status.get("phase"):
                self._send_at = min(self._send_at, time.monotonic() + PHASE_CHANGE_SECONDS)
            peer.rank_status = dict(message)
        elif frame_type == FrameType.HELLO and not self._formed:
            peer.rank, peer.fingerprint = int(message["rank"]), dict(message["fingerprint"])
            self._try_form_gang()
        else:
            raise WireError(f"the peer sent an unexpected {frame_type.name} frame")

    def _try_form_gang(self) -> None:
        """Welcomes the ranks once all have joined with equal fingerprints; schedules a rejection if they differ."""
        if self._fingerprint_diff():
            self._reject_at = self._reject_at or time.monotonic() + DISAGREE_GRACE_SECONDS
            return
        if not self._missing_ranks():
            self._formed = True
            self._broadcast(FrameType.WELCOME, {"epoch": self.epoch, "part0_address": self._part0_address()})

    def _part0_address(self) -> str:
        """Returns part 0's address to which another part connected; behind NAT, the settings have another one."""
        remote = (p for p in self._joined_peers() if self.plan.part_of(p.rank or 0) != 0)
        return str(next((p.sock.getsockname()[0] for p in remote), "127.0.0.1"))

    def _joined_peers(self) -> list[_Peer]:
        return [p for p in self._peers if p.rank is not None]

    def _missing_ranks(self) -> list[int]:
        joined = {p.rank for p in self._peers}
        return [r for r in range(self.plan.world_size) if r not in joined]

    def _describe_missing_parts(self) -> str:
        parts = sorted({self.plan.part_of(r) for r in self._missing_ranks()})
        return ", ".join(self.plan.describe_part(p) for p in parts)

    def _fingerprint_diff(self) -> str:
        """Returns the differences between the fingerprints (values that must be equal on all parts), one line per key.

        Empty if all joined ranks agree.
        """
        fingerprints: dict[str, dict[str, Any]] = {}
        addresses: dict[int, str] = {}  # by rank
        lines = []
        for peer in sorted(self._joined_peers(), key=lambda p: (p.rank or 0, p.address)):
            rank = peer.rank or 0
            if rank in addresses:
                lines.append(f"rank {rank} is claimed twice, by {addresses[rank]} and {peer.address}: check WORLD_RANK")
            addresses[rank] = peer.address
            fingerprints.setdefault(f"part{self.plan.part_of(rank)}", peer.fingerprint)
        for key in sorted({key for fingerprint in fingerprints.values() for key in fingerprint}):
            values = {part: fingerprint.get(key) for part, fingerprint in fingerprints.items()}
            if len({json.dumps(v, sort_keys=True) for v in values.values()}) > 1:
                lines.append(f"{key}: " + "  ".join(f"{part}={json.dumps(v)}" for part, v in values.items()))
        return "\n".join(f"  {line}" for line in lines)

    def _send_periodic(self) -> None:
        now = time.monotonic()
        for peer in [p for p in self._peers if p.rank is None and now - p.last_seen > HELLO_TIMEOUT_SECONDS]:
            self._drop(peer, f"no HELLO frame within {HELLO_TIMEOUT_SECONDS:g} s")
        if self._formed:
            self._broadcast(FrameType.GANG_STATUS, self._gang_status(now))
            self._check_liveness(now)
        elif self._reject_at and now >= self._reject_at and self._fingerprint_diff():
            message = "the parts of the gang disagree:\n" + self._fingerprint_diff()
            self._broadcast(FrameType.REJECTED, {"message": message})
        elif now - self._started > self.timeouts.join:
            self._broadcast(FrameType.REJECTED, {"message": self._timeout_message()})
        else:
            self._broadcast(FrameType.WAITING, {"missing": self._describe_missing_parts()})

    def _timeout_message(self) -> str:
        minutes = self.timeouts.join / 60
        return f"gave up after {minutes:g} minutes (GANG_TIMEOUT_MIN): missing {self._describe_missing_parts()}"

    def _gang_status(self, now: float) -> dict[str, Any]:
        ranks = {
            p.rank: p.rank_status | {"silent_s": round(now - p.last_seen, 3)}
            for p in self._joined_peers()
            if p.rank_status
        }
        return {"epoch": self.epoch, "ranks": ranks}

    def _check_liveness(self, now: float) -> None:
        for peer in self._joined_peers():
            silent_seconds = now - peer.last_seen
            idle_seconds = peer.rank_status.get("idle_s", 0.0)
            rank = f"rank {peer.rank} ({peer.address})"
            if silent_seconds > self.timeouts.heartbeat:
                self.on_lost(f"no heartbeat from {rank} for {silent_seconds:.0f} s", ExitCode.HANG)
            elif idle_seconds > self.timeouts.progress:
                self.on_lost(f"{rank} made no progress for {idle_seconds:.0f} s", ExitCode.HANG)

    def _broadcast(self, frame_type: FrameType, message: dict[str, Any]) -> None:
        data = pack_json(frame_type, message)
        # Rank 0 last: it may exit as soon as it receives the frame, and this thread exits with it.
        for peer in sorted(self._joined_peers(), key=lambda p: p.rank == 0):
            try:
                peer.sock.sendall(data)
            except OSError as error:
                self._drop(peer, str(error))

    def _drop(self, peer: _Peer, reason: str) -> None:
        if peer not in self._peers:
            return
        self._peers.remove(peer)
        self._selector.unregister(peer.sock)
        peer.sock.close()
        if peer.rank is None:
            # The doctor probes this port: it connects, sends nothing and closes the connection.
            level = logging.WARNING if peer.has_sent_data else logging.DEBUG
            log.log(level, "rendezvous port: closed the connection from %s: %s", peer.address, reason)
        elif self._formed:
            self.on_lost(f"lost rank {peer.rank} ({peer.address}): {reason}", ExitCode.COMMUNICATION)
