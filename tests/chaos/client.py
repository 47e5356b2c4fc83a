"""An HTTP client that records what a request's client sees: when each piece arrives, and how the response ends."""

import http.client
import json
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

JSON_TYPE = {"Content-Type": "application/json"}
REQUEST_SECONDS = 240.0  # silence after which a client gives up: five times the longest allowed pause and more


@dataclass(frozen=True)
class Request:
    """What is sent: a path and a JSON body. `name` is unique within the load."""

    name: str
    path: str
    body: Mapping[str, Any]

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))


@dataclass
class Response:
    """What came back. Times are monotonic seconds."""

    sent_at: float
    status: int = 0  # 0: no status line arrived
    headers: dict[str, str] = field(default_factory=dict)  # names in lower case
    ended_at: float = 0.0  # 0: still open
    text: dict[int, str] = field(default_factory=dict)  # by index of the choice
    finishes: list[int] = field(default_factory=list)  # indices of the choices that ended, in order
    num_done: int = 0  # events [DONE]
    errors: list[dict[str, Any]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)  # of pieces of text
    broken: str = ""  # why the connection ended early, or what could not be parsed

    @property
    def is_open(self) -> bool:
        return not self.ended_at

    def add(self, message: dict[str, Any]) -> None:
        """Adds one event of a stream, or the only message of another response."""
        if "choices" not in message:
            self.errors.append(message)
            return
        for choice in message["choices"]:
            index = int(choice["index"])
            piece = choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") or ""
            if piece:
                self.arrivals.append(time.monotonic())
                self.text[index] = self.text.get(index, "") + piece
            if choice["finish_reason"]:
                self.finishes.append(index)


@dataclass(frozen=True)
class Endpoint:
    """The address of a part's HTTP server. `network`: enters the namespace in which the address is reachable."""

    host: str
    port: int
    network: AbstractContextManager[object] = field(default_factory=nullcontext)

    def fetch(self, path: str, body: Any = None, timeout: float = 10.0) -> tuple[int, str]:
        """Sends GET, or POST if there is a body. Returns (status, text), or (0, reason) without a response."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            self._send(connection, path, body)
            with connection.getresponse() as response:
                return response.status, response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            return 0, str(error) or type(error).__name__
        finally:
            connection.close()

    def open(self, request: Request) -> Response:
        """Sends a request and reads its response in a thread."""
        response = Response(time.monotonic())
        threading.Thread(target=self._read, args=(request, response), name=request.name, daemon=True).start()
        return response

    def _send(self, connection: http.client.HTTPConnection, path: str, body: Any) -> None:
        with self.network:  # a socket stays in the namespace in which it was created
            connection.connect()
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), JSON_TYPE)

    def _read(self, request: Request, response: Response) -> None:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=REQUEST_SECONDS)
        try:
            self._send(connection, request.path, request.body)
            with connection.getresponse() as http_response:
                response.status = http_response.status
                response.headers = {name.lower(): value for name, value in http_response.getheaders()}
                if request.is_stream and response.status == http.client.OK:
                    _read_events(http_response, response)
                else:
                    response.add(json.loads(http_response.read()))
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            response.broken = f"{type(error).__name__}: {error}"
        finally:
            response.ended_at = time.monotonic()
            connection.close()


def _read_events(http_response: http.client.HTTPResponse, response: Response) -> None:
    """Reads server-sent events to the end of the response. Raises ValueError at anything that is no event."""
    for raw in http_response:
        line = raw.decode().rstrip("\r\n")
        if not line or line.startswith(":"):  # a separator, or a comment that keeps the connection open
            continue
        data = line.removeprefix("data: ")
        if data == line:
            raise ValueError(f"not an event: {line[:100]!r}")
        if data == "[DONE]":
            response.num_done += 1
        else:
            response.add(json.loads(data))
