"""Server-sent events, several sequences merged into one stream, and the client that hangs up."""

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


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class EventStream(StreamingResponse):
    """`events` are complete frames, separators included. However the response ends, they end with it, and what they
    did not take of `admission` is free again.
    """

    def __init__(self, events: AsyncGenerator[str], admission: SlotReservation):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no proxy may buffer them
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._admission = events, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events):
                await super().__call__(scope, receive, send)
        finally:
            self._admission.release()


async def merge(sequences: Sequence[AsyncGenerator[OutputChunk]]) -> AsyncGenerator[tuple[int, OutputChunk]]:
    """Chunks of all sequences as they come, each with its sequence's number. Leaving early, or one failing, ends
    all.
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
    """The client has gone; nobody reads the answer."""


async def cancel_on_disconnect(request: Request, work: Awaitable[T], admission: SlotReservation) -> T:
    """The result of `work`, which is cancelled when the client hangs up first. Raises Disconnected then. What it did
    not take of `admission` is free again afterwards.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
        admission.release()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
