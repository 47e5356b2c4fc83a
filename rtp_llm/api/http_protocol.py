"""uvicorn's HTTP protocol with limits on what a client may send, how slowly, and over how many connections."""

import asyncio
import json
from http import HTTPStatus
from typing import NoReturn, cast

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from rtp_llm.api.client_transport import PROGRESS_SECONDS, ClientTransport
from rtp_llm.api.connection_limit import MAX_DESCRIPTORS, ConnectionLimit

MAX_HEADER_BYTES = 64 * 1024  # of the request line and all headers
MAX_HEADERS = 128
PROBE_PATHS = {b"/liveness", b"/health"}


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol object of one HTTP connection. Beyond `limit` open connections, the one that has waited
    longest for a request is closed. If all have requests, new requests other than health probes get 503.
    """

    limit = ConnectionLimit(MAX_DESCRIPTORS)  # of all connections; the API process sets it

    _client: ClientTransport
    _served: RequestResponseCycle | None = None  # the request that the application has; `cycle` is the last one read
    _timer: asyncio.TimerHandle | None = None
    _in_head = _in_body = False
    _head_bytes = _unparsed_bytes = 0
    _error: tuple[HTTPStatus, str] | None = None  # why a callback ended the parser
    _last_answer = b""  # an error response that waits until earlier requests have their responses

    # Connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._client = ClientTransport(transport, self.loop)
        super().connection_made(cast(asyncio.Transport, self._client))
        self._start_timer()
        self.limit.admit(self, len(self.connections))

    def connection_lost(self, exc: Exception | None) -> None:
        self.limit.waiting.pop(self, None)
        self._stop_timer()
        self._client.on_lost()
        super().connection_lost(exc)
        self._disconnect(self._served)

    def shutdown(self) -> None:
        self._client.expects_input = False  # nobody waits for a client that is still sending
        super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._client.watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._client.stop_watching()

    # Limits on the headers

    def data_received(self, data: bytes) -> None:
        if self._client.is_lingering:
            self._client.discard_input()
        if self.transport.is_closing() or self._last_answer:
            return
        self._unset_keepalive_if_required()
        self._unparsed_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self._refuse(*(self._error or (HTTPStatus.BAD_REQUEST, "the request is not valid HTTP")))
            return
        if self._in_head and self._head_bytes + self._unparsed_bytes > MAX_HEADER_BYTES:
            self._refuse(*_too_large())
            return
        self._restart_timer()

    def _parse(self, data: bytes) -> None:
        """Parses data. A request that offers another protocol (curl --http2 does) is parsed again without the offer,
        because the parser ends at an offer and takes the request's body for data of that protocol.
        """
        rest = memoryview(data)
        while rest:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                rest = rest[upgrade.args[0] :]
            version = self.parser.get_http_version().encode()
            lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
            lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.limit.waiting.setdefault(self)
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
            self._end_parser(*_too_large())

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            self._end_parser(HTTPStatus.METHOD_NOT_ALLOWED, "CONNECT: this server is no proxy")
        if self.parser.should_upgrade():
            return  # see _parse
        is_probe = self.url.partition(b"?")[0] in PROBE_PATHS
        if len(self.connections) > self.limit.limit and not is_probe:
            self.limit.log_refusal("requests other than probes get 503")
            self._end_parser(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections are open (ulimit -n)")
        self.scope["state"]["peer"] = self.client[0] if self.client else ""
        super().on_headers_complete()
        self.limit.waiting.pop(self, None)
        self._in_head, self._in_body = False, True
        self._client.expects_input = True
        self._unparsed_bytes = 0

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_body = self._client.expects_input = False
        super().on_message_complete()

    def _end_parser(self, status: HTTPStatus, message: str) -> NoReturn:
        self._error = status, message
        raise ValueError(message)

    # Answers, one after another

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._served = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self.limit.waiting[self] = None  # a connection that lingers makes room for others
            return
        if self._last_answer and not self._is_serving:
            self._end_with(self._last_answer)
            return
        if not self.pipeline:
            self.limit.waiting[self] = None
        if self._in_body:  # an early response, such as 413, arrives only if the rest of the body is read and discarded
            self._start_timer()

    @property
    def _is_serving(self) -> bool:
        return self._served is not None and not self._served.response_complete

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Sends an error response without calling the application, and closes the connection.

        Responses to earlier requests are sent first. If this response has already begun, only closes the connection.
        """
        if self._in_body and self.cycle is not self._served:
            self.pipeline.popleft()
        elif self._in_body:
            if self.cycle.response_started:
                self.transport.close()
                return
            self._disconnect(self.cycle)
            self._served = None
        self._last_answer = _response(status, message)
        if not self._is_serving:
            self._end_with(self._last_answer)

    def _end_with(self, answer: bytes) -> None:
        self._stop_timer()
        self._unset_keepalive_if_required()
        self.limit.waiting[self] = None
        self.transport.write(answer)
        self._client.expects_input = True
        self.transport.close()

    def _disconnect(self, cycle: RequestResponseCycle | None) -> None:
        """Tells the application that the client has disconnected."""
        if cycle and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()

    # Limits on the time

    def _restart_timer(self) -> None:
        """Restarts the timeout at each piece of a body, but only once for all headers of a request."""
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
            self._start_timer()  # the client waits for the server to read its body, or for an earlier response
        elif self._in_head or (self._in_body and not is_answered and not self.cycle.response_started):
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"the request made no progress for {PROGRESS_SECONDS:g} s")
        else:
            self.transport.close()


def _too_large() -> tuple[HTTPStatus, str]:
    message = f"the headers are too large; allowed: {MAX_HEADERS} headers, {MAX_HEADER_BYTES >> 10} KiB together"
    return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message


def _response(status: HTTPStatus, message: str) -> bytes:
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}})
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
