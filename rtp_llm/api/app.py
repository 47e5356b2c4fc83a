"""The FastAPI application: routers, error answers, middleware."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from rtp_llm import __version__
from rtp_llm.api import schema
from rtp_llm.api.body import component_schemas
from rtp_llm.api.middleware import BodySizeMiddleware, MetricsMiddleware
from rtp_llm.api.native import native_router
from rtp_llm.api.openai import openai_router
from rtp_llm.api.params import StopWords
from rtp_llm.api.part_state import PartState
from rtp_llm.api.service import Service
from rtp_llm.api.status import engine_router, status_router
from rtp_llm.api.stream import ClientDisconnected
from rtp_llm.config import Config
from rtp_llm.errors import RequestError, invalid_format
from rtp_llm.metrics import Metrics

log = logging.getLogger(__name__)

BODIES: list[type[BaseModel]] = [
    schema.ChatRequest,
    schema.CompletionRequest,
    schema.NativeRequest,
    schema.BatchInferRequest,
    schema.TokenizeRequest,
    schema.EncodeRequest,
    schema.LogLevelRequest,
]

ERROR_SCHEMA = {
    "title": "Error",
    "type": "object",
    "required": ["error_code", "error_code_str", "message", "error"],
    "properties": {
        "error_code": {"type": "integer"},
        "error_code_str": {"type": "string"},
        "message": {"type": "string"},
        "error": {"type": "object", "required": ["message", "type", "param", "code"]},
    },
}
ERROR_RESPONSE = {
    "description": "What was wrong, in one sentence; `error` is OpenAI's object",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}


def create_app(config: Config, state: PartState, metrics: Metrics, service: Service | None) -> FastAPI:
    """`service`: the model on part 0; None on other parts, which answer health and metrics only."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if service:
            service.client.start()
        yield
        if service:
            await service.client.stop()

    app = FastAPI(title="rtp-llm", version=__version__, lifespan=lifespan)
    app.include_router(status_router(state, metrics))
    if service:
        stop_words = StopWords.read(config, service.tokenizer)
        app.include_router(engine_router(service, state))
        app.include_router(openai_router(service, stop_words))
        app.include_router(native_router(service, stop_words))
    _answer_errors(app, config)
    _describe_bodies(app)
    app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])  # as upstream
    app.add_middleware(BodySizeMiddleware, limit=int(config.max_body_mb * 2**20))
    app.add_middleware(MetricsMiddleware, metrics=metrics, access_log=not config.disable_access_log)
    return app


def _answer_errors(app: FastAPI, config: Config) -> None:
    """One shape for every error, and never a traceback."""

    def answer(error: RequestError) -> JSONResponse:
        status = 500 if config.legacy_http_status else error.status
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body(), status_code=status, headers=headers)

    async def request_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return answer(error)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        name = {404: "no such path", 405: "method not allowed"}.get(error.status_code, str(error.detail))
        made = RequestError(
            error.status_code, 507, "ERROR_INPUT_FORMAT_ERROR", f"{name}: {request.method} {request.url.path}"
        )
        response = answer(made)
        response.headers.update(error.headers or {})
        return response

    async def validation_error(request: Request, error: Exception) -> Response:
        return answer(invalid_format(str(error)))

    async def disconnected(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; the number is for the log

    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return answer(RequestError(500, 514, "UNKNOWN_ERROR", "internal error; the server's log has the details"))

    app.add_exception_handler(RequestError, request_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    for gone in (ClientDisconnected, ClientDisconnect):
        app.add_exception_handler(gone, disconnected)
    app.add_exception_handler(Exception, unexpected)


def _describe_bodies(app: FastAPI) -> None:
    """Adds the schemas of the bodies that `json_body` reads and of errors, which FastAPI does not see by itself."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = get_openapi(title=app.title, version=app.version, routes=app.routes)
            components = described.setdefault("components", {}).setdefault("schemas", {})
            components.update(component_schemas(BODIES))
            components["Error"] = ERROR_SCHEMA
            for operation in (o for path in described["paths"].values() for o in path.values()):
                if "requestBody" in operation:
                    operation["responses"]["default"] = ERROR_RESPONSE
            app.openapi_schema = described
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it
