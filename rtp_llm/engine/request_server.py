"""Unix socket server of the engine: the API process submits requests and receives one frame of outputs per step."""

import json
import logging
import selectors
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtp_llm.parallel.wire import FrameBuffer, FrameType, WireError, pack_json

log = logging.getLogger(__name__)


@dataclass(eq=False)
class ClientConnection:
    """Connection to one client, an API process.

    `outgoing`: bytes that the socket has not accepted yet, buffered so that a slow client does not block a step.
    """

    sock: socket.socket
    incoming: FrameBuffer = field(default_factory=FrameBuffer)
    outgoing: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True)
class ClientMessage:
    """A frame from a client (API process). `frame_type`: None if the client disconnected. `body`: the JSON payload."""

    connection: ClientConnection
    frame_type: FrameType | None
    body: dict[str, Any]


class RequestServer:
    """Rank 0's server for requests. Accepts clients (API processes), sends each a READY frame with the engine's
    properties (`EngineInfo`: maximum sequence length, number of KV blocks, …), and does all I/O without blocking.
    """

    def __init__(self, path: Path, engine_info: dict[str, Any]):
        """`path`: path of the socket; an existing file is replaced.

        `engine_info`: body of the READY frame, which every client receives first.
        """
        self._engine_info = engine_info
        self.connections: set[ClientConnection] = set()
        self._launched_ids: set[str] = set()
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen()
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)

    def close(self) -> None:
        """Closes the socket and all connections. Clients keep their requests, and submit them again once the ranks have
        formed their next communicator.
        """
        self._selector.close()
        for sock in (self._listener, *(connection.sock for connection in self.connections)):
            sock.close()

    def poll(self, timeout: float) -> list[ClientMessage]:
        """Accepts clients, sends buffered bytes, and returns the received frames.

        Waits up to `timeout` seconds until a socket is ready.
        """
        messages: list[ClientMessage] = []
        for key, events in self._selector.select(timeout):
            connection = key.data
            if connection is None:
                self._accept()
            elif events & selectors.EVENT_READ:
                messages += self._read(connection)
            elif events & selectors.EVENT_WRITE:
                self._flush(connection)
        return messages

    def send(self, connection: ClientConnection, frame: bytes) -> None:
        """Sends as much of a frame as the socket accepts; `poll` sends the rest."""
        connection.outgoing += frame
        self._flush(connection)

    def disconnect(self, connection: ClientConnection, reason: str) -> None:
        log.info("the connection of an API process was closed: %s", reason)
        self._selector.unregister(connection.sock)
        connection.sock.close()
        self.connections.discard(connection)

    def announce_launch(self, request_ids: set[str]) -> None:
        """Tells the clients which requests the steps in flight compute, if not the same as those last announced.

        If this process dies in a step, the clients then know which requests may be the cause.
        """
        if request_ids == self._launched_ids:
            return
        self._launched_ids = request_ids
        for connection in self.connections:
            self.send(connection, pack_json(FrameType.LAUNCH, {"ids": sorted(request_ids)}))

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        sock.setblocking(False)
        connection = ClientConnection(sock)
        self._selector.register(sock, selectors.EVENT_READ, connection)
        self.connections.add(connection)
        self.send(connection, pack_json(FrameType.READY, self._engine_info))
        self._launched_ids = set()  # announced again, since this client does not know them

    def _read(self, connection: ClientConnection) -> list[ClientMessage]:
        try:
            data = connection.sock.recv(1 << 20)
            if not data:
                raise WireError("the API process closed the connection")
            frames = list(connection.incoming.feed(data))
            return [ClientMessage(connection, frame_type, json.loads(payload)) for frame_type, payload in frames]
        except BlockingIOError:
            return []
        except (OSError, ValueError, RecursionError) as error:
            self.disconnect(connection, str(error))
            return [ClientMessage(connection, None, {})]

    def _flush(self, connection: ClientConnection) -> None:
        try:
            while connection.outgoing:
                sent = connection.sock.send(connection.outgoing)
                del connection.outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:
            connection.outgoing.clear()  # the next read reports the disconnect
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.outgoing else 0)
        self._selector.modify(connection.sock, events, connection)
