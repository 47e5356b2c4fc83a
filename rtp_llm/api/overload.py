"""Rejects generation requests before their bodies are read if the server is full, so that a rejection is cheap.

The server is full if CONCURRENCY_LIMIT + QUEUE_LIMIT sequences, its slots, are running or waiting.

Otherwise the bodies of clients that retry at once would keep the event loop busy and delay the running streams.
"""

from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from rtp_llm.api import embeddings, rerank
from rtp_llm.errors import RequestError, overloaded

GENERATION_PATHS = {
    *("/", "/batch_infer", "/v1/completions", "/v1/chat/completions", "/chat/completions"),
    *("/v1/messages", "/v1/responses"),
    *(*embeddings.PATHS, *rerank.PATHS),
}


class OverloadMiddleware:
    """ASGI middleware that rejects generation requests with 429 while the server has no free slot for a sequence, and
    with 503 while it is stopping.
    """

    def __init__(
        self, app: ASGIApp, check_capacity: Callable[[int], None], respond: Callable[[str, RequestError], Response]
    ):
        """`check_capacity`: raises RequestError if this number of sequences does not fit."""
        self.app, self.check_capacity, self.respond = app, check_capacity, respond
        self._rejection = lru_cache(maxsize=256)(self._make_rejection)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in GENERATION_PATHS:
            try:
                self.check_capacity(1)
            except RequestError as error:
                scope["route"] = SimpleNamespace(path=scope["path"])  # for the metrics, as the router would set it
                await self._reject(error, scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def _reject(self, error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
        if error.status != 429:
            await self.respond(scope["path"], error)(scope, receive, send)
            return
        response = self._rejection(scope["path"], error.message)
        headers = list(response.raw_headers)  # the middleware in front adds others
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": response.body})

    def _make_rejection(self, path: str, message: str) -> Response:
        return self.respond(path, overloaded(message))
