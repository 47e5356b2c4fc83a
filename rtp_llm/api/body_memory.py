"""Bounds the memory of all bodies that are being read or prepared at the same time."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from rtp_llm.errors import overloaded

BODIES = 16  # of the maximum size that fit


class BodyMemory:
    """Reader of request bodies that limits the memory of all bodies together to `BODIES` times MAX_BODY_MB.

    starlette's `Request.body` would keep a body until the response ends; `read` frees it as soon as it is tokenized.
    """

    def __init__(self, max_body_mb: float):
        self.limit = int(BODIES * max_body_mb * 2**20)
        self.used = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Context manager that reads the whole body and returns it. The body counts towards the limit on memory until
        the context exits.

        Raises RequestError 429 if this body and those in other contexts exceed the limit, ClientDisconnect if the
        client disconnects.
        """
        size, pieces = 0, []
        try:
            async for piece in request.stream():
                if self.used + len(piece) > self.limit:
                    used, limit = (f"{num_bytes / 2**20:.0f} MiB" for num_bytes in (self.used, self.limit))
                    raise overloaded(
                        f"the bodies of open requests take {used}; allowed: {limit}, which is {BODIES} x MAX_BODY_MB:"
                        " try again later"
                    )
                size, self.used = size + len(piece), self.used + len(piece)
                pieces.append(piece)
            yield b"".join(pieces)
        finally:
            self.used -= size
