"""The engine's door: a unix socket where the API process submits requests and receives one frame of events per step."""

import json
import logging
import selectors
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtp_llm.parallel.wire import FrameBuffer, Kind, WireError, pack_json

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Connection:
    """One client; what it does not read yet waits in `outgoing`, so that it can never hold up a step."""

    sock: socket.socket
    incoming: FrameBuffer = field(default_factory=FrameBuffer)
    outgoing: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True)
class Message:
    """A frame from a client; `kind` None: it hung up."""

    connection: Connection
    kind: Kind | None
    body: dict[str, Any]


class Intake:
    """Accepts clients, greets them with `ready`, and never blocks longer than asked."""

    def __init__(self, path: Path, ready: dict[str, Any]):
        self._ready = ready
        self.connections: set[Connection] = set()
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen()
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)

    def poll(self, timeout: float) -> list[Message]:
        """What clients sent; waits up to `timeout` seconds for the first of it."""
        messages: list[Message] = []
        for key, events in self._selector.select(timeout):
            connection = key.data
            if connection is None:
                self._accept()
            elif events & selectors.EVENT_READ:
                messages += self._read(connection)
            elif events & selectors.EVENT_WRITE:
                self._flush(connection)
        return messages

    def send(self, connection: Connection, kind: Kind, body: dict[str, Any]) -> None:
        connection.outgoing += pack_json(kind, body)
        self._flush(connection)

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        sock.setblocking(False)
        connection = Connection(sock)
        self._selector.register(sock, selectors.EVENT_READ, connection)
        self.connections.add(connection)
        self.send(connection, Kind.READY, self._ready)

    def _read(self, connection: Connection) -> list[Message]:
        try:
            data = connection.sock.recv(1 << 20)
            if not data:
                raise WireError("closed")
            frames = list(connection.incoming.feed(data))
            return [Message(connection, kind, json.loads(payload)) for kind, payload in frames]
        except BlockingIOError:
            return []
        except (OSError, ValueError) as error:
            log.info("api connection ended: %s", error)
            self._selector.unregister(connection.sock)
            connection.sock.close()
            self.connections.discard(connection)
            return [Message(connection, None, {})]

    def _flush(self, connection: Connection) -> None:
        try:
            while connection.outgoing:
                sent = connection.sock.send(connection.outgoing)
                del connection.outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:
            connection.outgoing.clear()  # the next read sees the end and reports it
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.outgoing else 0)
        self._selector.modify(connection.sock, wanted, connection)
