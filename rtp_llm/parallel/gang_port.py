"""A TCP port of the gang that authenticates its clients with GANG_SECRET (see `handshake`).

A client that does not show in time that it belongs to the gang (a stranger) is disconnected, and delays no others.
"""

import errno
import json
import logging
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rtp_llm.errors import CommunicationError
from rtp_llm.parallel.handshake import Challenge
from rtp_llm.parallel.wire import FrameBuffer, FrameType, WireError

log = logging.getLogger(__name__)

STRANGER_SECONDS = 5.0  # from accept to the frame that shows who has connected
SEND_TIMEOUT_SECONDS = 5.0
MAX_STRANGERS = 256
MAX_MESSAGE_BYTES = 1 << 16  # a heartbeat has a few hundred bytes
ACCEPT_RETRY_SECONDS = 0.1
LOG_AGAIN_SECONDS = 60.0
MAX_LOGGED_REASONS = 1000


@dataclass(eq=False)
class Connection:
    """A connection to the port.

    is_known: the client has shown that it belongs to the gang; until then it is called a stranger, and is disconnected
    at `expires_at`. connected_at, expires_at: monotonic seconds.
    """

    sock: socket.socket
    address: str
    challenge: Challenge
    connected_at: float = field(default_factory=time.monotonic)
    expires_at: float = field(default_factory=lambda: time.monotonic() + STRANGER_SECONDS)
    buffer: FrameBuffer = field(default_factory=lambda: FrameBuffer(MAX_MESSAGE_BYTES))
    has_sent_data: bool = False
    is_known: bool = False


class GangPort:
    """A listening port for processes of the gang. Reads the frames of all connections concurrently, so that a slow
    client that has not shown yet who it is (a stranger) does not delay others.
    """

    def __init__(
        self,
        listener: socket.socket,
        gang_secret: bytes,
        name: str,
        on_frame: Callable[[Connection, FrameType, Any], None],
        on_lost: Callable[[Connection, str], None] = lambda connection, reason: None,
    ):
        """`name`: of the port, for messages. `on_frame`: called with each frame and its JSON; any error that it raises
        closes the connection. `on_lost`: called with the reason after a known connection was closed.
        """
        self._listener, self._secret, self._name = listener, gang_secret, name
        self._on_frame, self._on_lost = on_frame, on_lost
        self._connections: dict[Connection, None] = {}  # in the order of their arrival
        self._logged_at: dict[tuple[str, str], float] = {}  # by host and reason: a stranger may come often
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, None)

    def serve_once(self, wake_at: float) -> None:
        """Waits for connections and data, at most until `wake_at` (monotonic seconds), and handles them.

        Raises CommunicationError if another thread has shut down the listening socket.
        """
        wake_at = min([wake_at, *(stranger.expires_at for stranger in self._strangers())])
        for key, _ in self._selector.select(max(0.0, wake_at - time.monotonic())):
            if key.data is None:
                self._accept()
            elif key.data in self._connections:
                self._read(key.data)
        for stranger in self._strangers():
            if stranger.expires_at <= time.monotonic():
                self.drop(stranger, f"it did not show within {STRANGER_SECONDS:g} s who it is")

    def send(self, connection: Connection, frame: bytes) -> None:
        """Sends a frame. Closes the connection with `drop` if that fails."""
        try:
            connection.sock.sendall(frame)
        except OSError as error:
            self.drop(connection, str(error))

    def drop(self, connection: Connection, reason: str) -> None:
        """Closes a connection, unless it is closed already. Reports the reason to `on_lost` if the client is known;
        otherwise logs it, if the client has sent data.
        """
        if connection not in self._connections:
            return
        self.release(connection)
        connection.sock.close()
        if connection.is_known:
            self._on_lost(connection, reason)
        elif connection.has_sent_data:  # the doctor probes ports: it connects, sends nothing and closes the connection
            self._log(connection, reason)

    def release(self, connection: Connection) -> None:
        """Hands an open connection over to the caller: this port no longer reads or closes it."""
        del self._connections[connection]
        self._selector.unregister(connection.sock)

    def close(self) -> None:
        """Closes all connections, but not the listener."""
        for connection in self._connections:
            connection.sock.close()
        self._selector.close()

    def _strangers(self) -> list[Connection]:
        return [connection for connection in self._connections if not connection.is_known]

    def _accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise CommunicationError(f"{self._name}: {error}") from None
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(ACCEPT_RETRY_SECONDS)  # the listener stays readable: avoid a busy loop
            return  # the peer has closed the connection, or a later call accepts it
        sock.settimeout(SEND_TIMEOUT_SECONDS)  # frames to peers are small: a full send buffer means a lost peer
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        strangers = self._strangers()
        if len(strangers) >= MAX_STRANGERS:
            self.drop(strangers[0], f"more than {MAX_STRANGERS} connections did not show who they are")
        connection = Connection(sock, f"{address[0]}:{address[1]}", Challenge(self._secret))
        self._connections[connection] = None
        self._selector.register(sock, selectors.EVENT_READ, connection)
        self.send(connection, connection.challenge.frame())

    def _read(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(MAX_MESSAGE_BYTES)
            if not data:
                raise WireError("the peer closed the connection")
            connection.has_sent_data = True
            for frame_type, payload in connection.buffer.feed(data):
                self._on_frame(connection, frame_type, json.loads(payload))
                if connection not in self._connections:
                    return
        except Exception as error:  # any program can connect to this port and send arbitrary data
            self.drop(connection, str(error) or type(error).__name__)

    def _log(self, stranger: Connection, reason: str) -> None:
        host, now = stranger.address.rpartition(":")[0], time.monotonic()
        is_new = now - self._logged_at.get((host, reason), -LOG_AGAIN_SECONDS) >= LOG_AGAIN_SECONDS
        if is_new and len(self._logged_at) < MAX_LOGGED_REASONS:
            self._logged_at[host, reason] = now
            log.warning("%s: closed the connection from %s: %s", self._name, stranger.address, reason)
