"""A connection to the coordinator (the process of part 0 that forms the gang), for workers and guards."""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rtp_llm.parallel.coordinator import HEARTBEAT_INTERVAL_SECONDS
from rtp_llm.parallel.handshake import Answer, read_secret
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.plan import RENDEZVOUS_PORT_OFFSET
from rtp_llm.parallel.ports import leader_host
from rtp_llm.parallel.wire import FrameType, WireError, connect, pack_json, recv_frame

CONNECT_TIMEOUT_SECONDS = 3.0
CONNECT_RETRY_SECONDS = 0.1
FROZEN_SECONDS = 3.0
REFUSED_RETRY_SECONDS = 1.0  # after a connection that was not accepted


class CoordinatorConnection:
    """The connection of a worker or guard to the coordinator. Any thread may send; only one thread may receive."""

    def __init__(self, part_spec: PartSpec):
        """Connects and reads the CHALLENGE frame. Raises OSError."""
        plan, self._part_spec = part_spec.plan, part_spec
        self._lock = threading.Lock()
        self._sock = connect(leader_host(plan), plan.leader_port(RENDEZVOUS_PORT_OFFSET), CONNECT_TIMEOUT_SECONDS)
        try:
            self._answer = Answer(read_secret(part_spec.config), expect_challenge(self._sock))
        except BaseException:
            self._sock.close()
            raise
        self._sock.settimeout(part_spec.config.heartbeat_timeout)
        self.is_accepted = False
        self.local_address = str(self._sock.getsockname()[0])

    def say_hello(self, kind: str, **message: Any) -> None:
        """Sends a HELLO frame, with which a worker asks for a rank, or a guard for the status of all ranks. Adds this
        part's number and fingerprint, and signs it with GANG_SECRET. Raises OSError.

        `kind`: "worker" or "guard". `message`: further fields, such as the index and pid of a worker.
        """
        part = self._part_spec.plan.part
        hello = {"kind": kind, "part": part, "fingerprint": self._part_spec.fingerprint, **message}
        self.send(FrameType.HELLO, self._answer.sign(hello))

    def send(self, frame_type: FrameType, message: dict[str, Any]) -> None:
        """Sends a frame to the coordinator; any thread may call it. Raises OSError if the connection is lost."""
        with self._lock:
            self._sock.sendall(pack_json(frame_type, message))

    def receive(self) -> tuple[FrameType, dict[str, Any]]:
        """Returns (type, JSON body) of the next frame from the coordinator. Before the first one, checks that the
        coordinator has accepted HELLO and proves that it knows GANG_SECRET.

        Raises OSError if that fails, the connection is lost, or no frame arrives within HEARTBEAT_TIMEOUT.
        """
        while True:
            try:
                frame_type, payload = recv_frame(self._sock)
            except TimeoutError:
                timeout = self._sock.gettimeout()
                raise WireError(f"the coordinator sent no message for {timeout:g} s (HEARTBEAT_TIMEOUT)") from None
            except ConnectionError as error:
                raise error if self.is_accepted else self._answer.explain(error) from None
            message: dict[str, Any] = json.loads(payload)
            if frame_type == FrameType.ACCEPTED:
                self._answer.check_proof(str(message["proof"]))
                self.is_accepted = True
            elif self.is_accepted:
                return frame_type, message
            else:
                raise WireError(
                    f"the coordinator sent {frame_type.name} instead of ACCEPTED; do all parts run the same release?"
                )

    def close(self) -> None:
        self._sock.close()


class Heartbeats:
    """A thread that sends heartbeats (a rank's or guard's status) to the coordinator over the current connection."""

    def __init__(
        self, content: Callable[[], dict[str, Any]], due: threading.Event, on_thaw: Callable[[], None] = lambda: None
    ):
        """`content`: returns the body of a heartbeat. `due`: event that makes the thread send a heartbeat at once.

        `on_thaw`: called before the first heartbeat after this process, perhaps the whole machine, was paused.
        """
        self.connection: CoordinatorConnection | None = None
        self._content, self._due, self._on_thaw = content, due, on_thaw
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def _run(self) -> None:
        sent_at = time.monotonic()
        while True:
            connection, now = self.connection, time.monotonic()
            if now - sent_at > FROZEN_SECONDS:
                self._on_thaw()
            sent_at = now
            if connection:
                with suppress(OSError):  # the thread that receives gets the same error
                    connection.send(FrameType.HEARTBEAT, self._content())
            self._due.wait(HEARTBEAT_INTERVAL_SECONDS)
            self._due.clear()


def expect_challenge(sock: socket.socket) -> dict[str, Any]:
    """Reads the CHALLENGE frame, the first frame that the listening side of a gang port sends; it begins the
    authentication with GANG_SECRET. Returns its JSON body. Raises WireError if another frame comes first.
    """
    frame_type, payload = recv_frame(sock)
    if frame_type != FrameType.CHALLENGE:
        raise WireError(
            f"the coordinator or rank 0 sent {frame_type.name} instead of CHALLENGE; do all parts run the same release?"
        )
    challenge: dict[str, Any] = json.loads(payload)
    return challenge
