"""The connections over which rank 0 sends steps to the other ranks of an epoch."""

import json
import logging
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

from rtp_llm.errors import CommunicationError
from rtp_llm.parallel.coordinator_connection import CONNECT_TIMEOUT_SECONDS, expect_challenge
from rtp_llm.parallel.gang_client import Assignment
from rtp_llm.parallel.handshake import Answer, Challenge, read_secret
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.plan import STEP_PORT_OFFSET
from rtp_llm.parallel.ports import leader_host
from rtp_llm.parallel.wire import FrameBuffer, FrameType, WireError, connect, pack_json

log = logging.getLogger(__name__)

JOIN_TIMEOUT_SECONDS = 5.0  # from accept to the JOIN frame
MAX_STRANGERS = 256
MAX_JOIN_BYTES = 1 << 16
CHALLENGE_TIMEOUT_SECONDS = 60.0


def accept_ranks(listener: socket.socket, part_spec: PartSpec, assignment: Assignment) -> dict[int, socket.socket]:
    """Accepts, on rank 0, the connections over which it sends the steps to the other ranks. Returns their sockets by
    rank.

    Raises CommunicationError if a rank does not connect within DIST_COMM_TIMEOUT, or if the listener is shut down.
    """
    timeout, size = part_spec.config.dist_comm_timeout, part_spec.plan.world_size
    deadline = time.monotonic() + timeout
    with closing(_JoinServer(listener, part_spec, assignment)) as server:
        while len(server.ranks) < size - 1:
            if time.monotonic() >= deadline:
                missing = [r for r in range(1, size) if r not in server.ranks]
                raise CommunicationError(
                    f"ranks {missing} did not connect to rank 0 for scheduler steps within {timeout:.0f} s"
                )
            server.serve_once(deadline)
        return server.ranks


@dataclass(eq=False)
class _Stranger:
    """A connection that has not said which rank it is from. `expires_at`: monotonic seconds."""

    sock: socket.socket
    challenge: Challenge
    expires_at: float
    address: str
    buffer: FrameBuffer = field(default_factory=lambda: FrameBuffer(MAX_JOIN_BYTES))


class _JoinServer:
    """Reads the JOINs of all connections at once, so that a slow stranger delays no rank. `ranks`: those that came."""

    def __init__(self, listener: socket.socket, part_spec: PartSpec, assignment: Assignment):
        self.ranks: dict[int, socket.socket] = {}
        self._listener, self._part_spec, self._assignment = listener, part_spec, assignment
        self._secret = read_secret(part_spec.config)
        self._strangers: dict[_Stranger, None] = {}  # in the order of their arrival
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, None)

    def serve_once(self, deadline: float) -> None:
        """Waits for the next event, at most until `deadline` (monotonic seconds), and handles it.

        Raises CommunicationError if the listener is shut down.
        """
        wake_at = min((stranger.expires_at for stranger in self._strangers), default=deadline)
        for key, _ in self._selector.select(max(0.0, min(wake_at, deadline) - time.monotonic())):
            if key.data is None:
                self._accept()
            elif key.data in self._strangers:
                self._read(key.data)
        for stranger in [s for s in self._strangers if s.expires_at <= time.monotonic()]:
            self._drop(stranger, f"no JOIN frame within {JOIN_TIMEOUT_SECONDS:g} s")

    def close(self) -> None:
        """Closes the connections that have sent no valid JOIN, but not the listener."""
        for stranger in self._strangers:
            stranger.sock.close()
        self._selector.close()

    def _accept(self) -> None:
        try:
            sock, (host, *_) = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # the peer has closed the connection
            return
        except OSError as error:
            raise CommunicationError(f"port for steps from rank 0: {error}") from None
        if len(self._strangers) >= MAX_STRANGERS:
            self._drop(next(iter(self._strangers)), f"more than {MAX_STRANGERS} connections without a JOIN frame")
        sock.settimeout(JOIN_TIMEOUT_SECONDS)
        stranger = _Stranger(sock, Challenge(self._secret), time.monotonic() + JOIN_TIMEOUT_SECONDS, host)
        self._strangers[stranger] = None
        self._selector.register(sock, selectors.EVENT_READ, stranger)
        try:
            sock.sendall(stranger.challenge.frame())  # the buffer of a new connection has room for it
        except OSError as error:
            self._drop(stranger, str(error))

    def _read(self, stranger: _Stranger) -> None:
        try:
            data = stranger.sock.recv(MAX_JOIN_BYTES)
            if not data:
                raise WireError("the peer closed the connection")
            frame = next(stranger.buffer.feed(data), None)
            if frame is None:
                return
            rank = self._check_join(stranger, *frame)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            self._drop(stranger, str(error))
            return
        self._forget(stranger)
        stranger.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ranks[rank] = stranger.sock

    def _check_join(self, stranger: _Stranger, frame_type: FrameType, payload: bytes) -> int:
        """Returns the rank that opened this connection. Raises if it is not one of this epoch that is still missing."""
        if frame_type != FrameType.JOIN:
            raise WireError(f"the peer sent {frame_type.name} first; allowed: JOIN, from ranks of the same release")
        message, assignment = json.loads(payload), self._assignment
        stranger.challenge.check(message)
        if (message["incarnation"], message["epoch"]) != (assignment.incarnation, assignment.epoch):
            raise WireError(
                f"the peer is a rank of epoch {message['epoch']} (number of the gang's start) or of another"
                f" coordinator; rank 0 is in epoch {assignment.epoch}"
            )
        rank = int(message["rank"])
        if rank in self.ranks or not 0 < rank < self._part_spec.plan.world_size:
            raise WireError(f"the peer claims to be rank {rank}, which is already connected or does not exist")
        return rank

    def _drop(self, stranger: _Stranger, reason: str) -> None:
        self._forget(stranger)
        stranger.sock.close()
        text = "port for steps from rank 0: closed the connection from %s, which is not a rank: %s"
        log.warning(text, stranger.address, reason)

    def _forget(self, stranger: _Stranger) -> None:
        del self._strangers[stranger]
        self._selector.unregister(stranger.sock)


def connect_to_leader(part_spec: PartSpec, check_aborted: Callable[[], None]) -> socket.socket:
    """Returns a connection to rank 0, over which it sends the steps; retries until it listens. `check_aborted`: called
    before each attempt; may raise an error to give up.

    Raises CommunicationError after DIST_COMM_TIMEOUT.
    """
    plan, timeout = part_spec.plan, part_spec.config.dist_comm_timeout
    host, port = leader_host(plan), plan.leader_port(STEP_PORT_OFFSET)
    deadline = time.monotonic() + timeout
    while True:
        try:
            return connect(host, port, CONNECT_TIMEOUT_SECONDS)
        except OSError as error:
            if time.monotonic() > deadline:
                address = f"{host}:{port}"
                raise CommunicationError(f"cannot connect to rank 0 at {address} (scheduler steps): {error}") from error
        check_aborted()
        time.sleep(0.02)


def join_leader(sock: socket.socket, part_spec: PartSpec, assignment: Assignment) -> None:
    """Sends JOIN with this rank's number to rank 0. Raises CommunicationError."""
    sock.settimeout(min(CHALLENGE_TIMEOUT_SECONDS, part_spec.config.dist_comm_timeout))
    try:
        answer = Answer(read_secret(part_spec.config), expect_challenge(sock))
        message = {"rank": assignment.rank, "epoch": assignment.epoch, "incarnation": assignment.incarnation}
        sock.sendall(pack_json(FrameType.JOIN, answer.sign(message)))
    except (OSError, ValueError, KeyError) as error:
        raise CommunicationError(f"rank 0 did not accept this rank's connection for steps: {error}") from error
    sock.settimeout(part_spec.config.dist_comm_timeout)
