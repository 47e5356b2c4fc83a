"""Rejects generation requests before their bodies are read if no slot is free, so that a rejection is cheap.

Otherwise the bodies of clients that retry at once would keep the event loop busy and delay the running streams.
"""

from collections.abc import Callable
from types import SimpleNamespace

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from rtp_llm.api import embeddings, rerank
from rtp_llm.errors import RequestError

GENERATION_PATHS = {
    *("/", "/batch_infer", "/v1/completions", "/v1/chat/completions", "/chat/completions"),
    *("/v1/messages", "/v1/responses"),
    *(*embeddings.PATHS, *rerank.PATHS),
}


class OverloadMiddleware:
    """Rejects generation requests with 429 while the server has no free slot, not even for one more sequence."""

    def __init__(
        self, app: ASGIApp, check_capacity: Callable[[int], None], respond: Callable[[str, RequestError], Response]
    ):
        """`check_capacity`: raises RequestError if this number of sequences does not fit."""
        self.app, self.check_capacity, self.respond = app, check_capacity, respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in GENERATION_PATHS:
            try:
                self.check_capacity(1)
            except RequestError as error:
                scope["route"] = SimpleNamespace(path=scope["path"])  # for the metrics, as the router would set it
                await self.respond(scope["path"], error)(scope, receive, send)
                return
        await self.app(scope, receive, send)
