"""The connections over which rank 0 sends steps to the other ranks of an epoch."""

import json
import logging
import socket
import time
from collections.abc import Callable

from rtp_llm.errors import CommunicationError
from rtp_llm.parallel.coordinator_connection import CONNECT_TIMEOUT_SECONDS, expect_challenge
from rtp_llm.parallel.gang_client import Assignment
from rtp_llm.parallel.handshake import Answer, Challenge, read_secret
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.plan import STEP_PORT_OFFSET
from rtp_llm.parallel.ports import leader_host
from rtp_llm.parallel.wire import FrameType, WireError, connect, pack_json, recv_frame

log = logging.getLogger(__name__)

JOIN_TIMEOUT_SECONDS = 1.0  # less than the other rank waits for the challenge, so that a stranger cannot outlast it
MAX_JOIN_BYTES = 1 << 16
CHALLENGE_TIMEOUT_SECONDS = 60.0


def accept_ranks(listener: socket.socket, part_spec: PartSpec, assignment: Assignment) -> dict[int, socket.socket]:
    """Accepts the connections of the other ranks on rank 0. Returns their sockets by rank.

    Raises CommunicationError if a rank does not connect within DIST_COMM_TIMEOUT, or if the listener is shut down.
    """
    timeout, size = part_spec.config.dist_comm_timeout, part_spec.plan.world_size
    peers: dict[int, socket.socket] = {}
    deadline = time.monotonic() + timeout
    while len(peers) < size - 1:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            missing = [r for r in range(1, size) if r not in peers]
            raise CommunicationError(
                f"ranks {missing} did not connect to rank 0 for scheduler steps within {timeout:.0f} s"
            ) from None
        except OSError as error:
            raise CommunicationError(f"port for steps from rank 0: {error}") from None
        rank = _read_join(sock, part_spec, assignment, peers)
        if rank is None:
            sock.close()
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peers[rank] = sock
    return peers


def _read_join(
    sock: socket.socket, part_spec: PartSpec, assignment: Assignment, peers: dict[int, socket.socket]
) -> int | None:
    """Returns the rank that opened this connection; None if it is not a rank of this epoch, or connected already."""
    sock.settimeout(JOIN_TIMEOUT_SECONDS)
    challenge = Challenge(read_secret(part_spec.config))
    try:
        sock.sendall(challenge.frame())
        frame_type, payload = recv_frame(sock, MAX_JOIN_BYTES)
        if frame_type != FrameType.JOIN:
            raise WireError(f"the peer sent {frame_type.name} instead of JOIN")
        message = json.loads(payload)
        challenge.check(message)
        if (message["incarnation"], message["epoch"]) != (assignment.incarnation, assignment.epoch):
            raise WireError(f"the peer is a rank of epoch {message['epoch']}, this is epoch {assignment.epoch}")
        rank = int(message["rank"])
        if rank in peers or not 0 < rank < part_spec.plan.world_size:
            raise WireError(f"the peer claims to be rank {rank}, which is already connected or does not exist")
        return rank
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("port for steps from rank 0: closed a connection that is not from a rank: %s", error)
    return None


def connect_to_leader(part_spec: PartSpec, check_aborted: Callable[[], None]) -> socket.socket:
    """Returns a connection to rank 0, retrying until it listens. `check_aborted`: called before each attempt; may raise
    an error to give up.

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
