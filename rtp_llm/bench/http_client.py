"""A minimal client of /v1/completions: HTTP/1.1 and server-sent events, with a few microseconds of work per token.

The load generator shares its cores with the server that it measures, so it parses JSON only where needed: the last
events of a response, which have the token counts. See docs/performance for the cost of a general client.
"""

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from rtp_llm.bench.record import Record
from rtp_llm.bench.workload import Request
from rtp_llm.errors import ConfigError

KEPT_EVENTS = 3  # the last ones of a response: its last token, its usage, its end


class AnswerError(Exception):
    """The server did not send a complete response."""


class StaleConnectionError(AnswerError):
    """The server closed a keep-alive connection instead of answering a further request on it (RFC 9112, 9.3.1). The
    request can be sent again on a new connection.
    """


@dataclass(frozen=True)
class Endpoint:
    """A model that a server at a URL serves.

    model    name of the model in requests
    as_text  send prompts as text, for servers that accept no token ids: one made-up word (`word`) per token
    """

    url: str
    model: str
    api_key: str = ""
    as_text: bool = False
    timeout: float = 600.0  # seconds that one request may take

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError(
                f"--url {self.url}: is not an http:// URL with a host; allowed: http://HOST:PORT or"
                " http://HOST:PORT/PATH, with or without /v1 at the end"
            )
        return parts.hostname, parts.port or 80

    def post(self, path: str, content: dict[str, Any]) -> bytes:
        """Returns the bytes of an HTTP POST request to `path`, with `content` as its JSON body. Does not send it."""
        body = json.dumps(content, separators=(",", ":")).encode()
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        host, port = self.address
        prefix = urlsplit(self.url).path.rstrip("/").removesuffix("/v1")  # clients of OpenAI name it in their URL
        head = (
            f"POST {prefix}{path} HTTP/1.1\r\nHost: {host}:{port}\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def completion(self, request: Request) -> bytes:
        """Returns the bytes of an HTTP request for a streamed completion of exactly `request.output_tokens` tokens."""
        prompt = " ".join(word(token) for token in request.prompt) if self.as_text else request.prompt
        return self.post(
            "/v1/completions",
            {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": request.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        )


def word(token: int) -> str:
    """Returns a made-up word of lower-case letters, different for each token id. The word stands for the token in a
    prompt that must be text. The server's tokenizer may split the word into several tokens.
    """
    letters = ""
    while token or not letters:
        token, letter = divmod(token, 26)
        letters += chr(ord("a") + letter)
    return letters


class Connection(asyncio.Protocol):
    """One keep-alive connection, which carries requests one after another."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._is_closed = True
        self._num_requests = 0

    @property
    def is_open(self) -> bool:
        return not self._is_closed

    @classmethod
    async def connect(cls, address: tuple[str, int]) -> "Connection":
        """Returns a new connection to `address` (host, port). Raises AnswerError if it cannot be opened."""
        try:
            _, connection = await asyncio.get_running_loop().create_connection(cls, *address)
        except OSError as error:
            raise AnswerError(f"no connection to {address[0]}:{address[1]}: {error.strerror or error}") from None
        return connection

    def close(self) -> None:
        self._is_closed = True
        if self._transport:
            self._transport.abort()

    async def stream(self, request: bytes) -> "Answer":
        """Sends a request and returns its complete response.

        Raises AnswerError if the response is not valid HTTP or the server closes the connection before its end. Raises
        StaleConnectionError, a subclass, if the caller should send the request again on a new connection.
        """
        assert self._transport
        self._num_requests += 1
        self._answer = Answer(asyncio.get_running_loop().create_future())
        self._transport.write(request)
        await self._answer.end
        if not self._answer.keeps_connection:
            self.close()
        return self._answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass.
        self._transport, self._is_closed = cast(asyncio.Transport, transport), False

    def data_received(self, data: bytes) -> None:
        self._answer.feed(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._is_closed = True
        if answer := getattr(self, "_answer", None):
            is_stale = self._num_requests > 1 and not answer.has_begun
            kind = StaleConnectionError if is_stale else AnswerError
            answer.fail(kind("the server closed the connection before the end of its answer"))


class Answer:
    """The server-sent events of one HTTP response and the time at which each arrived. Implements the callbacks of
    httptools' parser.
    """

    def __init__(self, end: "asyncio.Future[None]"):
        """`end`: set when the response is complete, or when it can no longer be completed."""
        self.end = end
        self.keeps_connection = False  # after the answer; known at its end
        self.has_begun = False  # a byte has arrived
        self._status = 0
        self._now = 0.0  # time of the last bytes
        self._times: list[float] = []  # of the events
        self._last_events: list[bytes] = []
        self._rest = b""  # of an event that is not complete
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Parses bytes of the response that have just arrived."""
        self._now, self.has_begun = time.perf_counter(), True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(AnswerError(f"invalid HTTP: {error}"))

    def fail(self, error: AnswerError) -> None:
        if not self.end.done():
            self.end.set_exception(error)

    def on_body(self, body: bytes) -> None:
        if b"\r" in body:
            body = body.replace(b"\r\n", b"\n")
        *events, self._rest = (self._rest + body).split(b"\n\n")
        for event in events:
            if event.startswith(b"data:") and event != b"data: [DONE]":
                self._times.append(self._now)
                self._last_events = [*self._last_events[1 - KEPT_EVENTS :], event]

    def on_message_complete(self) -> None:
        self._status, self.keeps_connection = self._parser.get_status_code(), self._parser.should_keep_alive()
        if not self.end.done():
            self.end.set_result(None)

    def record(self, request: Request, origin: float, start: float) -> Record:
        """Returns the times and the token counts of this response to `request`.

        start: when the request was sent or due; origin: when the run began. Both are values of time.perf_counter(); the
        times in the record are relative to `origin`. Raises AnswerError if the response is an error or incomplete.
        """
        if self._status != 200:
            raise AnswerError(f"HTTP {self._status}: {self._rest[:300].decode(errors='replace')}")
        times, last = self._times, [_parse_event(event) for event in self._last_events]
        count = next((event["usage"].get("completion_tokens") for event in reversed(last) if event.get("usage")), None)
        while last and not _is_output(last[-1], len(times), count):
            if "error" in last[-1]:
                raise AnswerError(f"error in the stream: {json.dumps(last[-1]['error'])[:300]}")
            last.pop()
            times = times[:-1]
        if count is None or not times:
            raise AnswerError(
                "the stream has no event with token counts (usage), or none with a token; the server must support"
                " stream_options.include_usage"
            )
        if count != request.output_tokens:
            raise AnswerError(
                f"the server sent {count} tokens instead of {request.output_tokens}; it must support ignore_eos"
            )
        return Record(len(request.prompt), start - origin, [at - origin for at in times], count)


def _parse_event(data: bytes) -> dict[str, Any]:
    """Returns the JSON of an event. Raises AnswerError if it is not the kind of object that completions consist of."""
    try:
        event: dict[str, Any] = json.loads(data.removeprefix(b"data:"))
        objects = [event.get("usage") or {}, *(event.get("choices") or ())]
    except (AttributeError, TypeError, ValueError):
        objects = [None]
    if not all(isinstance(item, dict) for item in objects):
        raise AnswerError(f"an event of the stream is not part of a completion: {data[:300].decode(errors='replace')}")
    return event


def _is_output(event: dict[str, Any], num_events: int, num_tokens: int | None) -> bool:
    """Returns whether the last of `num_events` events carries a token. `num_tokens`: of the response; None: unknown.

    Some servers add an event with only `usage`, or one with only a `finish_reason` behind that of the last token. An
    event without text may still carry a token: the first half of a character.
    """
    choices = event.get("choices")
    has_text = any(choice.get("text") for choice in choices or ())
    return bool(choices) and (has_text or num_tokens is None or num_events <= num_tokens)
