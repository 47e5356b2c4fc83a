"""Builds the FastAPI application: routers, error handlers, middleware."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from rtp_llm import __version__
from rtp_llm.api import pooling_schema, schema
from rtp_llm.api.anthropic.endpoints import anthropic_router
from rtp_llm.api.anthropic.errors import PATH_PREFIX as ANTHROPIC_PREFIX
from rtp_llm.api.anthropic.errors import error_body as anthropic_error_body
from rtp_llm.api.anthropic.schema import CountTokensRequest, MessagesRequest
from rtp_llm.api.auth import AuthMiddleware, Keyring
from rtp_llm.api.body import component_schemas
from rtp_llm.api.disconnect import ClientDisconnected
from rtp_llm.api.docs_page import docs_router
from rtp_llm.api.embeddings import PATHS as EMBEDDING_PATHS
from rtp_llm.api.embeddings import embeddings_router
from rtp_llm.api.middleware import BodySizeMiddleware, DrainMiddleware, HeadMiddleware, MetricsMiddleware
from rtp_llm.api.native import native_router
from rtp_llm.api.openai import openai_router
from rtp_llm.api.origins import OriginMiddleware, OriginPolicy
from rtp_llm.api.overload import OverloadMiddleware
from rtp_llm.api.params import StopWords
from rtp_llm.api.part_state import PartState
from rtp_llm.api.rerank import PATHS as RERANK_PATHS
from rtp_llm.api.rerank import rerank_router
from rtp_llm.api.responses.endpoints import responses_router
from rtp_llm.api.responses.schema import ResponsesRequest
from rtp_llm.api.service import Service
from rtp_llm.api.status import HEALTH_PATHS, LIVENESS_PATHS, engine_router, status_router
from rtp_llm.api.tasks import refusing_router, serves_text
from rtp_llm.config import Config
from rtp_llm.errors import RequestError, invalid_format
from rtp_llm.metrics import Metrics
from rtp_llm.parallel.part_spec import ModelInfo
from rtp_llm.text.rerank_format import RerankFormat

log = logging.getLogger(__name__)

BODY_MODELS: list[type[BaseModel]] = [
    schema.ChatRequest,
    schema.CompletionRequest,
    ResponsesRequest,
    MessagesRequest,
    CountTokensRequest,
    schema.NativeRequest,
    schema.BatchInferRequest,
    schema.TokenizeRequest,
    schema.DetokenizeRequest,
    schema.EncodeRequest,
    schema.LogLevelRequest,
    pooling_schema.EmbeddingRequest,
    pooling_schema.SimilarityRequest,
    pooling_schema.RerankRequest,
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
ANTHROPIC_ERROR_SCHEMA = {
    "title": "AnthropicError",
    "type": "object",
    "required": ["type", "error"],
    "properties": {"type": {"const": "error"}, "error": {"type": "object", "required": ["type", "message"]}},
}
ERROR_RESPONSE = {
    "description": "The error in one sentence; `error` has OpenAI's format",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}
ANTHROPIC_ERROR_RESPONSE = {
    "description": "The error in one sentence",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/AnthropicError"}}},
}


def create_app(config: Config, state: PartState, metrics: Metrics, service: Service | None) -> FastAPI:
    """Returns the FastAPI application of one part.

    `service` generates text. It is None on parts other than 0, which serve only health and metrics.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if service:
            service.client.start()
        yield
        if service:
            service.preparer.close()
            service.grammar_checker.close()
            await service.client.stop()

    keyring = Keyring.from_config(config)
    app = FastAPI(title="rtp-llm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(status_router(state, metrics, hides_detail=bool(keyring.api)))
    app.include_router(docs_router(app))
    if service:
        model = state.part_spec.model
        for_text = [serves_text(model.task)]
        stop_words = StopWords.from_config(config, service.tokenizer)
        app.include_router(engine_router(service, state))
        app.include_router(_pooling_router(service, model))
        app.include_router(openai_router(service, stop_words), dependencies=for_text)
        app.include_router(responses_router(service, stop_words), dependencies=for_text)
        app.include_router(anthropic_router(service, stop_words), dependencies=for_text)
        app.include_router(native_router(service, stop_words), dependencies=for_text)
    _add_error_handlers(app, config)
    _extend_openapi(app)
    _add_middleware(app, config, state, metrics, keyring, service)
    return app


def _pooling_router(service: Service, model: ModelInfo) -> APIRouter:
    """Returns the routes of embedding and reranking models."""
    router = APIRouter()
    if model.task == "DENSE_EMBEDDING":
        router.include_router(embeddings_router(service, model.embedding))
    else:
        router.include_router(refusing_router(EMBEDDING_PATHS, "DENSE_EMBEDDING", model.task))
    if model.task == "RERANKER":
        router.include_router(rerank_router(service, RerankFormat.of(service.tokenizer)))
    else:
        router.include_router(refusing_router(RERANK_PATHS, "RERANKER", model.task))
    return router


def _add_middleware(
    app: FastAPI, config: Config, state: PartState, metrics: Metrics, keyring: Keyring, service: Service | None
) -> None:
    """Adds the middleware, the innermost first."""
    respond = partial(_error_response, config)
    open_paths = {*HEALTH_PATHS, *LIVENESS_PATHS} | ({"/metrics"} if config.metrics_open else set())
    policy = OriginPolicy(config)
    app.add_middleware(HeadMiddleware)
    if service:
        app.add_middleware(OverloadMiddleware, check_capacity=service.check_capacity, respond=respond)
    app.add_middleware(BodySizeMiddleware, limit=int(config.max_body_mb * 2**20))
    app.add_middleware(AuthMiddleware, keyring=keyring, open_paths=open_paths, respond=respond)
    app.add_middleware(OriginMiddleware, policy=None if keyring.api else policy, respond=respond)
    app.add_middleware(DrainMiddleware, state=state)
    app.add_middleware(MetricsMiddleware, metrics=metrics, access_log=not config.disable_access_log)


def _error_response(config: Config, path: str, error: RequestError) -> JSONResponse:
    """Returns the error in the format that clients of this path know."""
    if path.startswith(ANTHROPIC_PREFIX):
        return JSONResponse(anthropic_error_body(error), status_code=error.status, headers=error.headers())
    status = 500 if config.legacy_http_status else error.status
    return JSONResponse(error.body(), status_code=status, headers=error.headers())


def _add_error_handlers(app: FastAPI, config: Config) -> None:
    """Registers handlers that return every error in one JSON format, without tracebacks."""

    error_response = partial(_error_response, config)

    async def known_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return error_response(request.url.path, error)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        reason = {404: "no such path", 405: "method not allowed"}.get(error.status_code, str(error.detail))
        message = f"{reason}: {request.method} {request.url.path}"
        response = error_response(
            request.url.path, RequestError(error.status_code, 507, "ERROR_INPUT_FORMAT_ERROR", message)
        )
        response.headers.update(error.headers or {})
        return response

    async def validation_error(request: Request, error: Exception) -> Response:
        return error_response(request.url.path, invalid_format(str(error)))

    async def disconnected(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nginx's "client closed request", for the access log only

    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("unexpected error in request %s %s (status 500)", request.method, request.url.path, exc_info=error)
        message = "internal error; the server's log has the details"
        return error_response(request.url.path, RequestError(500, 514, "UNKNOWN_ERROR", message))

    app.add_exception_handler(RequestError, known_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    for error_type in (ClientDisconnected, ClientDisconnect):
        app.add_exception_handler(error_type, disconnected)
    app.add_exception_handler(Exception, unexpected)


def _extend_openapi(app: FastAPI) -> None:
    """Adds the schemas of bodies and errors to the OpenAPI document, since `json_body` reads the raw request."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            components = document.setdefault("components", {}).setdefault("schemas", {})
            components.update(component_schemas(BODY_MODELS))
            components |= {"Error": ERROR_SCHEMA, "AnthropicError": ANTHROPIC_ERROR_SCHEMA}
            for path, operations in document["paths"].items():
                error = ANTHROPIC_ERROR_RESPONSE if path.startswith(ANTHROPIC_PREFIX) else ERROR_RESPONSE
                for operation in operations.values():
                    if "requestBody" in operation or "parameters" in operation:
                        operation["responses"]["default"] = error
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it
