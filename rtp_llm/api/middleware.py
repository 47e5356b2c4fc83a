"""ASGI middleware: body size limit, HEAD requests, closing connections while draining, access log and HTTP metrics."""

import time
from functools import cache
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rtp_llm.api import access_log
from rtp_llm.api.part_state import PartState
from rtp_llm.errors import RequestError
from rtp_llm.metrics import Metrics

UNMEASURED_PATHS = {"/metrics", "/health", "/liveness"}


class BodySizeMiddleware:
    """Rejects request bodies of more than `limit` bytes with 413 as they arrive, whatever Content-Length says."""

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


class HeadMiddleware:
    """Handles HEAD like GET on every route. The HTTP protocol class sees the original method and omits the body."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") != "HEAD":
            await self.app(scope, receive, send)
            return
        as_get = {**scope, "method": "GET"}
        await self.app(as_get, receive, send)
        scope["route"] = as_get.get("route")  # for the metrics


class DrainMiddleware:
    """While the part drains (stops after its open requests), closes each connection after its response instead of
    keeping it alive, so that connection pools switch to another server.
    """

    def __init__(self, app: ASGIApp, state: PartState):
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self.state.is_draining:
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        await self.app(scope, receive, send_closing)


class MetricsMiddleware:
    """Counts and times requests, and writes the access log. The `handler` label is the route template, since a label
    per raw path would create unbounded time series.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, access_log: bool):
        self.app, self.metrics, self.access_log = app, metrics, access_log
        # To look them up takes longer than to count.
        self._series = cache(
            lambda method, handler, status: (
                metrics.http_requests.labels(method, handler, str(status)),
                metrics.http_seconds.labels(method, handler),
            )
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNMEASURED_PATHS:
            await self.app(scope, receive, send)
            return
        status = 500
        record = access_log.start(Headers(scope=scope).get("x-request-id"))

        async def send_recorded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = record.request_id
                if record.ignored_fields:
                    headers["X-Ignored-Fields"] = record.ignored_fields
            await send(message)

        self.metrics.http_active.inc()
        try:
            await self.app(scope, receive, send_recorded)
        finally:
            self.metrics.http_active.dec()
            self._record(scope, status, record)

    def _record(self, scope: dict[str, Any] | Any, status: int, record: access_log.AccessRecord) -> None:
        handler = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE") else "other"
        requests, seconds = self._series(method, handler, status)
        requests.inc()
        seconds.observe(time.monotonic() - record.started)
        if self.access_log:
            request = {
                "client": scope["client"][0] if scope.get("client") else "",
                "key": scope.get("state", {}).get("key_name", ""),
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
            }
            access_log.write(record, request)
