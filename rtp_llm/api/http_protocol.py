"""uvicorn's HTTP protocol with limits on what a client may send, how slowly, and over how many connections."""

import asyncio
import json
import logging
import os
import resource
import time
from http import HTTPStatus
from typing import ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = logging.getLogger("rtp_llm.api")

MAX_HEADER_BYTES = 64 * 1024  # of the request line and all headers
MAX_HEADERS = 128
PROGRESS_SECONDS = 30.0  # for all headers, and between two pieces of a body
RESERVED_DESCRIPTORS = 32  # for probes, files and the engine's socket when clients use up the rest
MAX_DESCRIPTORS = 65_536
LOG_SECONDS = 60.0
PROBE_PATHS = {b"/liveness", b"/health"}


class ConnectionLimit:
    """The number of connections that the limit on open files allows, and one log line a minute about refusals."""

    def __init__(self, limit: int):
        self.limit = limit
        self._refused = 0
        self._logged_at = -LOG_SECONDS

    @classmethod
    def from_rlimit(cls) -> "ConnectionLimit":
        """Raises this process's limit on open files to what it may be, and leaves a reserve."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = max(soft, min(hard, MAX_DESCRIPTORS)) if hard != resource.RLIM_INFINITY else MAX_DESCRIPTORS
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return cls(max(8, wanted - len(os.listdir("/proc/self/fd")) - 2 * RESERVED_DESCRIPTORS))

    def log_refusal(self, action: str) -> None:
        self._refused += 1
        if time.monotonic() - self._logged_at >= LOG_SECONDS:
            text = "HTTP connections use up the limit on open files (%d connections): %s; %d times since the last line"
            log.warning(text, self.limit, action, self._refused)
            self._refused, self._logged_at = 0, time.monotonic()


class HttpProtocol(HttpToolsProtocol):
    """One connection. Beyond the limit of connections, the one that waits longest for a request is closed; if none
    waits, only probes are served.
    """

    limit = ConnectionLimit(MAX_DESCRIPTORS)  # of all connections; the API process sets it
    waiting: ClassVar[dict["HttpProtocol", None]] = {}  # connections without a request, the longest waiting first

    _timer: asyncio.TimerHandle | None = None
    _in_head = _in_body = False
    _head_bytes = _unparsed_bytes = 0
    _refusal: HTTPStatus | None = None

    # Connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.waiting[self] = None
        self._start_timer()
        if len(self.connections) > self.limit.limit:
            idle = next(iter(self.waiting))
            if idle is not self:
                self.limit.log_refusal("the ones that wait longest are closed")
                idle.transport.abort()
                idle.waiting.pop(idle, None)
            elif len(self.connections) > self.limit.limit + RESERVED_DESCRIPTORS:
                self.limit.log_refusal("new ones are closed")
                transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.waiting.pop(self, None)
        self._stop_timer()
        super().connection_lost(exc)

    # Limits on the headers

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._unparsed_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # answered as an ordinary request
        except httptools.HttpParserError:
            self._refuse(self._refusal or HTTPStatus.BAD_REQUEST, "the request is not valid HTTP")
            return
        if self._in_head and self._head_bytes + self._unparsed_bytes > MAX_HEADER_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _header_limits())
            return
        self._restart_timer()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.waiting.setdefault(self)
        self._in_head = True
        self._head_bytes = self._unparsed_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value))

    def _count(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        self._unparsed_bytes = 0
        if self._head_bytes > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADERS:
            self._refusal = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise ValueError(_header_limits())  # ends the parser

    def on_headers_complete(self) -> None:
        is_probe = self.url.partition(b"?")[0] in PROBE_PATHS
        if len(self.connections) > self.limit.limit and not is_probe:
            self.limit.log_refusal("requests other than probes get 503")
            self._refusal = HTTPStatus.SERVICE_UNAVAILABLE
            raise ValueError("too many connections")
        self.waiting.pop(self, None)
        self._in_head, self._in_body = False, True
        self._unparsed_bytes = 0
        self.scope["state"]["peer"] = self.client[0] if self.client else ""
        super().on_headers_complete()

    # Limits on the time

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if not self.pipeline:
            self.waiting[self] = None
        if self._in_body:  # an early answer such as 413: the rest is discarded, for a while, so that it arrives
            self._start_timer()

    def _restart_timer(self) -> None:
        """Starts the time anew for each piece of a body, but only once for all headers of a request."""
        is_answered = self.cycle is None or self.cycle.response_complete
        if self._in_body and not is_answered:
            self._start_timer()
        elif self._in_head or is_answered:
            if self._timer is None:
                self._start_timer()
        else:
            self._stop_timer()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(PROGRESS_SECONDS, self._time_out)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        is_answered = self.cycle is None or self.cycle.response_complete
        if self.flow.read_paused or not (is_answered or self._in_body):
            self._start_timer()  # the client waits for the server: for the reader of its body, or an earlier answer
        elif self._in_head or (self._in_body and not is_answered and not self.cycle.response_started):
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"the request made no progress for {PROGRESS_SECONDS:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Answers without the application and closes the connection. Closes it only, if an answer is under way."""
        is_answered = self.cycle is None or self.cycle.response_complete
        if is_answered or not self.cycle.response_started:
            if not is_answered:
                self.cycle.disconnected = True
            self.transport.write(_response(status, message if self._refusal is None else _reason(status)))
        self.transport.close()


def _reason(status: HTTPStatus) -> str:
    too_many = "too many connections are open (ulimit -n)"
    return too_many if status == HTTPStatus.SERVICE_UNAVAILABLE else _header_limits()


def _header_limits() -> str:
    return f"the headers are too large; allowed: {MAX_HEADERS} headers, {MAX_HEADER_BYTES >> 10} KiB together"


def _response(status: HTTPStatus, message: str) -> bytes:
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}})
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
