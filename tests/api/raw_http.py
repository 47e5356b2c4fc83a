"""An HTTP connection on a raw socket, for requests that HTTP libraries do not send, such as incomplete ones."""

import socket
from contextlib import suppress
from types import TracebackType
from typing import Self

SOCKET_TIMEOUT_SECONDS = 20.0


class RawHttpConnection:
    """Connects in the constructor; `close` or the end of the context disconnects."""

    def __init__(self, url: str):
        self._host, port = url.removeprefix("http://").split(":")
        self._sock = socket.create_connection((self._host, int(port)), timeout=SOCKET_TIMEOUT_SECONDS)

    def send(self, path: str, body: bytes, content_length: int | None = None, content_type: str | None = None) -> Self:
        """Sends a POST; `content_length` may differ from the body's length."""
        length = len(body) if content_length is None else content_length
        head = f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Length: {length}\r\n"
        head += f"Content-Type: {content_type}\r\n" if content_type else ""
        self._sock.sendall(f"{head}\r\n".encode() + body)
        return self

    def status(self) -> int:
        """Reads the response's status line and returns the status; the rest stays unread."""
        received = b""
        while b"\r\n" not in received:
            data = self._sock.recv(4096)
            assert data, f"closed after {received!r}"
            received += data
        return int(received.split()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
