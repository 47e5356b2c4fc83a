"""Server-sent events, merging of several sequences into one stream, and cancellation when the client disconnects."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from rtp_llm.api.service import OutputChunk, SlotReservation

T = TypeVar("T")


def compact_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class EventStream(StreamingResponse):
    """A response of server-sent events; `events` yields whole events, each with its final blank line.

    Closes `events` when the response ends, also early, and releases the unused slots of `reservation`.
    """

    def __init__(self, events: AsyncGenerator[str], reservation: SlotReservation):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not buffer the events
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._reservation = events, reservation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)
        finally:
            self._reservation.release()


async def merge(sequences: Sequence[AsyncGenerator[OutputChunk]]) -> AsyncGenerator[tuple[int, OutputChunk]]:
    """Yields (index of the sequence, chunk) for all sequences as their chunks arrive. Closing the generator, or an
    error in one sequence, ends all of them.
    """
    if len(sequences) == 1:
        async with aclosing(sequences[0]) as chunks:
            async for chunk in chunks:
                yield 0, chunk
        return
    queue: asyncio.Queue[tuple[int, OutputChunk] | Exception | None] = asyncio.Queue()

    async def pump(index: int, chunks: AsyncGenerator[OutputChunk]) -> None:
        try:
            async for chunk in chunks:
                queue.put_nowait((index, chunk))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

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


class ClientDisconnected(Exception):
    """The client disconnected before the response was complete."""


async def cancel_on_disconnect(request: Request, work: Awaitable[T], reservation: SlotReservation) -> T:
    """Returns the result of `work` and releases the unused slots of `reservation`. If the client disconnects first,
    cancels `work` and raises ClientDisconnected.
    """
    task = asyncio.ensure_future(work)
    disconnect = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        for pending in (task, disconnect):
            pending.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)
        reservation.release()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
