"""Server-sent events, several sequences merged into one stream, and the client that hangs up."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse

from rtp_llm.api.service import Chunk

T = TypeVar("T")


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def sse(events: AsyncIterator[str]) -> StreamingResponse:
    """`events` are complete frames, separators included. No proxy may buffer them."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def merge(sequences: Sequence[AsyncIterator[Chunk]]) -> AsyncIterator[tuple[int, Chunk]]:
    """Chunks of all sequences as they come, each with its sequence's number. Leaving early, or one failing, ends
    all.
    """
    if len(sequences) == 1:
        async for chunk in sequences[0]:
            yield 0, chunk
        return
    queue: asyncio.Queue[tuple[int, Chunk] | Exception | None] = asyncio.Queue()

    async def pump(index: int, chunks: AsyncIterator[Chunk]) -> None:
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


class Disconnected(Exception):
    """The client has gone; nobody reads the answer."""


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up first. Raises Disconnected then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_hangs_up(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Disconnected
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hangs_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
