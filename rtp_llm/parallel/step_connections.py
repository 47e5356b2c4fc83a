"""The connections over which rank 0 sends steps to the other ranks of an epoch."""

import socket
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

from rtp_llm.errors import CommunicationError
from rtp_llm.parallel.coordinator_connection import CONNECT_TIMEOUT_SECONDS, expect_challenge
from rtp_llm.parallel.gang_client import Assignment
from rtp_llm.parallel.gang_port import Connection, GangPort
from rtp_llm.parallel.handshake import Answer, read_secret
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.plan import STEP_PORT_OFFSET
from rtp_llm.parallel.ports import leader_host
from rtp_llm.parallel.wire import FrameType, WireError, connect, pack_json

CHALLENGE_TIMEOUT_SECONDS = 60.0


def accept_ranks(listener: socket.socket, part_spec: PartSpec, assignment: Assignment) -> dict[int, socket.socket]:
    """Accepts, on rank 0, the connections over which it sends the steps to the other ranks. Returns their sockets by
    rank.

    Raises CommunicationError if a rank does not connect within DIST_COMM_TIMEOUT, or if the listener is shut down.
    """
    timeout, size = part_spec.config.dist_comm_timeout, part_spec.plan.world_size
    deadline = time.monotonic() + timeout
    ranks: dict[int, socket.socket] = {}

    def on_frame(connection: Connection, frame_type: FrameType, message: dict[str, Any]) -> None:
        if frame_type != FrameType.JOIN:
            raise WireError(f"the peer sent {frame_type.name} first; allowed: JOIN, from ranks of the same release")
        connection.challenge.check(message)
        if (message["incarnation"], message["epoch"]) != (assignment.incarnation, assignment.epoch):
            raise WireError(
                f"the peer is a rank of another epoch ({message['epoch']}), or of another part 0 (before its restart,"
                f" or of another gang); allowed: ranks of this part 0's epoch {assignment.epoch} (the gang's starts so"
                " far)"
            )
        rank = int(message["rank"])
        if rank in ranks or not 0 < rank < size:
            raise WireError(f"the peer claims to be rank {rank}, which is already connected or does not exist")
        port.release(connection)
        ranks[rank] = connection.sock

    with closing(GangPort(listener, read_secret(part_spec.config), "port for steps from rank 0", on_frame)) as port:
        while len(ranks) < size - 1:
            if time.monotonic() >= deadline:
                missing = [r for r in range(1, size) if r not in ranks]
                raise CommunicationError(
                    f"ranks {missing} did not connect to rank 0 for scheduler steps within {timeout:.0f} s"
                )
            port.serve_once(deadline)
    return ranks


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
    """Sends rank 0 a JOIN frame with this rank's number and epoch, signed with GANG_SECRET.

    Raises CommunicationError if the connection fails, or rank 0 sends no CHALLENGE frame in time.
    """
    sock.settimeout(min(CHALLENGE_TIMEOUT_SECONDS, part_spec.config.dist_comm_timeout))
    try:
        answer = Answer(read_secret(part_spec.config), expect_challenge(sock))
        message = {"rank": assignment.rank, "epoch": assignment.epoch, "incarnation": assignment.incarnation}
        sock.sendall(pack_json(FrameType.JOIN, answer.sign(message)))
    except (OSError, ValueError, KeyError) as error:
        raise CommunicationError(f"rank 0 did not accept this rank's connection for steps: {error}") from error
    sock.settimeout(part_spec.config.dist_comm_timeout)
