"""ASGI middleware: body size limit, access log and HTTP metrics."""

import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rtp_llm.errors import RequestError
from rtp_llm.metrics import Metrics

log = logging.getLogger("rtp_llm.access")

UNMEASURED_PATHS = {"/metrics", "/health", "/liveness"}


class BodySizeMiddleware:
    """Rejects bodies of more than `limit` bytes while they arrive, with or without a Content-Length."""

    def __init__(self, app: ASGIApp, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        content_length = dict(scope["headers"]).get(b"content-length", b"0")
        total = 0

        async def receive_limited() -> Message:
            nonlocal total
            if content_length.isdigit() and int(content_length) > self.limit:
                raise self._error()
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.limit:
                raise self._error()
            return message

        await self.app(scope, receive_limited, send)

    def _error(self) -> RequestError:
        message = f"the body is larger than {self.limit / 2**20:g} MiB (MAX_BODY_MB)"
        return RequestError(413, 507, "ERROR_INPUT_FORMAT_ERROR", message)


class MetricsMiddleware:
    """Counts and times requests and writes the access log. The `handler` label is the route template, since each raw
    path would create a time series.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, access_log: bool):
        self.app, self.metrics, self.access_log = app, metrics, access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNMEASURED_PATHS:
            await self.app(scope, receive, send)
            return
        status = 500
        started = time.monotonic()

        async def send_recorded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.metrics.http_active.inc()
        try:
            await self.app(scope, receive, send_recorded)
        finally:
            self.metrics.http_active.dec()
            self._record(scope, status, time.monotonic() - started)

    def _record(self, scope: dict[str, Any] | Any, status: int, seconds: float) -> None:
        handler = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE") else "other"
        self.metrics.http_requests.labels(method, handler, str(status)).inc()
        self.metrics.http_seconds.labels(method, handler).observe(seconds)
        if self.access_log:
            client = scope["client"][0] if scope.get("client") else "-"
            log.info("%s %s %s %d %.3f s", client, scope["method"], scope["path"], status, seconds)
