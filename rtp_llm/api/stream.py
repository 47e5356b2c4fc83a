"""Server-sent events, merging of several sequences into one stream, and cancellation when the client disconnects."""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from rtp_llm.api.compact_json import compact_json
from rtp_llm.api.disconnect import until_disconnect
from rtp_llm.api.service import SlotReservation
from rtp_llm.api.text_stream import OutputChunk

T = TypeVar("T")
PIECE_CHARACTERS = 1 << 16
BATCH_ITEMS = 64  # of an array that are encoded at once
PING = b": ping\n\n"  # a comment, which clients ignore


def coalesced(parts: Iterable[str]) -> Iterator[str]:
    """Yields the same text as `parts`, joined to pieces of about PIECE_CHARACTERS characters, to save writes."""
    pending: list[str] = []
    size = 0
    for part in parts:
        if size >= PIECE_CHARACTERS:
            yield "".join(pending)
            pending, size = [], 0
        pending.append(part)
        size += len(part)
    yield "".join(pending)


def json_parts(value: Any) -> Iterator[str]:
    """Yields the JSON of `value`, without spaces, in parts. An iterator in `value` becomes a JSON array, whose elements
    are computed and encoded a batch at a time; so are those of a list of numbers.
    """
    if isinstance(value, list) and value and isinstance(value[0], int | float):
        value = iter(value)
    is_array = isinstance(value, list | Iterator)
    if is_array and not isinstance(value, list):
        separator = "["
        while batch := list(itertools.islice(value, BATCH_ITEMS)):
            yield separator + compact_json(batch)[1:-1]
            separator = ","
        yield "[]" if separator == "[" else "]"
    elif is_array or isinstance(value, dict):
        items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
        opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
        yield opening
        for index, (key, item) in enumerate(items):
            yield ("," if index else "") + (f"{compact_json(key)}:" if key is not None else "")
            yield from json_parts(item)
        yield closing
    else:
        yield compact_json(value)


def json_response(value: Any) -> Response:
    """Returns an HTTP response with `value` as JSON. Encodes a large value piece by piece while it is sent, so that it
    does not block the event loop or need memory for the whole text. Iterators in `value` become arrays.
    """
    pieces = coalesced(json_parts(value))
    first, second = next(pieces), next(pieces, None)
    if second is None:
        return Response(first, media_type="application/json")
    return StreamingResponse(_with_pauses(itertools.chain((first, second), pieces)), media_type="application/json")


async def _with_pauses(pieces: Iterable[str]) -> AsyncGenerator[str]:
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)  # others run


class EventStream(StreamingResponse):
    """A response of server-sent events. `events` yields the text of the events, whole or in pieces, including the blank
    line that ends each event.

    While `events` yields nothing, sends `ping` every `ping_seconds` (0: never), so that proxies do not time out. When
    the response ends, even early, closes `events` and releases the unused slots of `reservation`.
    """

    def __init__(
        self,
        events: AsyncGenerator[str],
        reservation: SlotReservation | None,
        ping_seconds: float = 0.0,
        ping: bytes = PING,
    ):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not buffer the events
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._reservation, self._ping_seconds, self._ping = events, reservation, ping_seconds, ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)
        finally:
            if self._reservation:
                self._reservation.release()

    async def stream_response(self, send: Send) -> None:
        if not self._ping_seconds:
            await super().stream_response(send)
            return
        last_message: Message = {"type": ""}
        sent_at = time.monotonic()

        async def send_recorded(message: Message) -> None:
            nonlocal last_message, sent_at
            last_message = {"type": ""}  # no ping may overtake this message
            await send(message)
            last_message, sent_at = message, time.monotonic()

        async def ping() -> None:
            while True:
                await asyncio.sleep(max(0.0, sent_at + self._ping_seconds - time.monotonic()) or self._ping_seconds)
                is_silent = time.monotonic() - sent_at >= self._ping_seconds
                if is_silent and _is_between_events(last_message):
                    await send_recorded({"type": "http.response.body", "body": self._ping, "more_body": True})

        pings = asyncio.create_task(ping(), name="ping")
        try:
            await super().stream_response(send_recorded)
        finally:
            pings.cancel()


def _is_between_events(last_message: Message) -> bool:
    if last_message["type"] == "http.response.body":
        return bool(last_message["more_body"] and last_message["body"].endswith((b"\n\n", b"\r\n\r\n")))
    return bool(last_message["type"] == "http.response.start")


async def merge(sequences: Sequence[AsyncGenerator[OutputChunk]]) -> AsyncGenerator[tuple[int, OutputChunk]]:
    """Runs several sequences at once. Yields (index of the sequence, chunk) in the order in which chunks arrive.
    Closing the generator, or an error in one sequence, ends all of them. If the consumer is slow, reads no more.
    """
    if len(sequences) == 1:
        async with aclosing(sequences[0]) as chunks:
            async for chunk in chunks:
                yield 0, chunk
        return
    queue: asyncio.Queue[tuple[int, OutputChunk] | Exception | None] = asyncio.Queue(len(sequences))

    async def pump(index: int, chunks: AsyncGenerator[OutputChunk]) -> None:
        try:
            async for chunk in chunks:
                await queue.put((index, chunk))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pump(i, chunks)) for i, chunks in enumerate(sequences)]
    try:
        for _ in sequences:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def cancel_on_disconnect(request: Request, work: Awaitable[T], reservation: SlotReservation) -> T:
    """Returns the result of `work` and releases the unused slots of `reservation`. If the client disconnects first,
    cancels `work` and raises ClientDisconnected.
    """
    try:
        return await until_disconnect(request, work)
    finally:
        reservation.release()
