"""The hub on rank 0: calls the roll, compares fingerprints, numbers the epoch, and hears when a rank falls silent.

A store that ranks poll could not push "part1 is missing" to those who wait, nor see a peer die between two polls:
hence plain TCP connections, one per rank, whose EOF is the death notice.
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
JOIN_SECONDS = 5.0  # for a connection to say which rank it is
MAX_MESSAGE = 1 << 20  # bytes; a pulse has some hundred
DISAGREE_GRACE_SECONDS = 1.5  # how long a diff waits for further parts, so that all are in it
OnRankLost = Callable[[str, ExitCode], None]


@dataclass
class _Peer:
    """One connection; `rank` is None until its hello."""

    sock: socket.socket
    address: str
    buffer: FrameBuffer = field(default_factory=lambda: FrameBuffer(MAX_MESSAGE))
    rank: int | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    rank_status: dict[str, Any] = field(default_factory=dict)
    last_seen: float = field(default_factory=time.monotonic)
    silent: bool = True  # has not sent a byte yet


@dataclass(frozen=True)
class Timeouts:
    """Seconds: for all ranks to come; without a heartbeat, and without progress, until a rank counts as lost."""

    join: float
    heartbeat: float
    progress: float


class Coordinator:
    """Serves one epoch of the gang on part 0's roll call port, in a thread of rank 0."""

    def __init__(self, plan: Plan, epoch: int, listener: socket.socket, timeouts: Timeouts, on_lost: OnRankLost):
        self.plan, self.epoch, self.listener, self.timeouts = plan, epoch, listener, timeouts
        self.on_lost = on_lost
        self._peers: list[_Peer] = []
        self._formed = False
        self._refusal_at = 0.0
        self._started = time.monotonic()
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, None)
        threading.Thread(target=self._serve, name="hub", daemon=True).start()

    def _serve(self) -> None:
        next_beat = 0.0
        while True:
            for key, _ in self._selector.select(timeout=HEARTBEAT_INTERVAL_SECONDS / 2):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + HEARTBEAT_INTERVAL_SECONDS
                self._send_periodic()

    def _accept(self) -> None:
        try:
            sock, address = self.listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(HEARTBEAT_INTERVAL_SECONDS / 5)  # it stays readable, and must not keep this thread spinning
            return  # it has gone again, or waits for its turn
        sock.settimeout(5)  # frames to peers are small: a peer that takes none for seconds is lost
        # A machine that dies sends no goodbye: what it does not acknowledge for so long is an error on the socket.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(self.timeouts.heartbeat * 1000))
        peer = _Peer(sock, f"{address[0]}:{address[1]}")
        self._peers.append(peer)
        self._selector.register(sock, selectors.EVENT_READ, peer)

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.sock.recv(1 << 16)
            if not data:
                raise WireError("the connection closed")
            peer.silent = False
            for kind, payload in peer.buffer.feed(data):
                self._handle_frame(peer, kind, json.loads(payload))
        except Exception as error:  # anybody can connect here, and send anything
            self._drop(peer, str(error) or type(error).__name__)

    def _handle_frame(self, peer: _Peer, kind: FrameType, message: dict[str, Any]) -> None:
        peer.last_seen = time.monotonic()
        if kind == FrameType.HEARTBEAT:
            peer.rank_status = dict(message)
        elif kind == FrameType.HELLO and not self._formed:
            peer.rank, peer.fingerprint = int(message["rank"]), dict(message["fingerprint"])
            self._try_form_gang()
        else:
            raise WireError(f"{kind.name} from {peer.address} out of turn")

    def _try_form_gang(self) -> None:
        """After each hello: refuse where ranks disagree, start the epoch where all are here."""
        if self._disagreement():
            self._refusal_at = self._refusal_at or time.monotonic() + DISAGREE_GRACE_SECONDS
            return
        if not self._missing():
            self._formed = True
            self._broadcast(FrameType.WELCOME, {"epoch": self.epoch, "part0_address": self._own_address()})

    def _own_address(self) -> str:
        """Part 0's address as the other parts reach it, which behind NAT is not the one in the member list."""
        others = (p for p in self._joined() if self.plan.part_of(p.rank or 0) != 0)
        return str(next((p.sock.getsockname()[0] for p in others), "127.0.0.1"))

    def _joined(self) -> list[_Peer]:
        return [p for p in self._peers if p.rank is not None]

    def _missing(self) -> list[int]:
        here = {p.rank for p in self._peers}
        return [r for r in range(self.plan.world_size) if r not in here]

    def _missing_parts(self) -> str:
        parts = sorted({self.plan.part_of(r) for r in self._missing()})
        return ", ".join(self.plan.describe_part(p) for p in parts)

    def _disagreement(self) -> str:
        """The diff between parts, one line a key; empty where all agree so far."""
        columns: dict[str, dict[str, Any]] = {}
        claimed: dict[int, str] = {}
        lines = []
        for peer in sorted(self._joined(), key=lambda p: (p.rank or 0, p.address)):
            rank = peer.rank or 0
            if rank in claimed:
                lines.append(f"rank {rank} is claimed twice, by {claimed[rank]} and {peer.address}: check WORLD_RANK")
            claimed[rank] = peer.address
            columns.setdefault(f"part{self.plan.part_of(rank)}", peer.fingerprint)
        for key in sorted({key for fingerprint in columns.values() for key in fingerprint}):
            values = {part: fingerprint.get(key) for part, fingerprint in columns.items()}
            if len({json.dumps(v, sort_keys=True) for v in values.values()}) > 1:
                lines.append(f"{key}: " + "  ".join(f"{part}={json.dumps(v)}" for part, v in values.items()))
        return "\n".join(f"  {line}" for line in lines)

    def _send_periodic(self) -> None:
        now = time.monotonic()
        for stranger in [p for p in self._peers if p.rank is None and now - p.last_seen > JOIN_SECONDS]:
            self._drop(stranger, "did not say which rank it is")
        if self._formed:
            self._broadcast(FrameType.GANG_STATUS, self._gang_status(now))
            self._check_liveness(now)
        elif self._refusal_at and now >= self._refusal_at and self._disagreement():
            self._broadcast(FrameType.REJECTED, {"message": "the parts of the gang disagree:\n" + self._disagreement()})
        elif now - self._started > self.timeouts.join:
            self._broadcast(FrameType.REJECTED, {"message": self._timeout_message()})
        else:
            self._broadcast(FrameType.WAITING, {"missing": self._missing_parts()})

    def _timeout_message(self) -> str:
        return f"gave up after {self.timeouts.join / 60:g} minutes (GANG_TIMEOUT_MIN): missing {self._missing_parts()}"

    def _gang_status(self, now: float) -> dict[str, Any]:
        ranks = {
            p.rank: p.rank_status | {"silent_s": round(now - p.last_seen, 3)} for p in self._joined() if p.rank_status
        }
        return {"epoch": self.epoch, "ranks": ranks}

    def _check_liveness(self, now: float) -> None:
        for peer in self._joined():
            silent = now - peer.last_seen
            idle = peer.rank_status.get("idle_s", 0.0)
            if silent > self.timeouts.heartbeat:
                self.on_lost(f"no heartbeat from rank {peer.rank} ({peer.address}) for {silent:.0f} s", ExitCode.HANG)
            elif idle > self.timeouts.progress:
                self.on_lost(f"rank {peer.rank} ({peer.address}) made no progress for {idle:.0f} s", ExitCode.HANG)

    def _broadcast(self, kind: FrameType, message: dict[str, Any]) -> None:
        data = pack_json(kind, message)
        # Rank 0 last: it may leave at once on what it hears, and this thread with it.
        for peer in sorted(self._joined(), key=lambda p: p.rank == 0):
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
            # A doctor that tries whether the port can be reached says nothing and goes.
            level = logging.DEBUG if peer.silent else logging.WARNING
            log.log(level, "roll call: dropped %s: %s", peer.address, reason)
        elif self._formed:
            self.on_lost(f"lost rank {peer.rank} ({peer.address}): {reason}", ExitCode.COMMUNICATION)
