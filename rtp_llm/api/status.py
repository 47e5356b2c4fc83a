"""Health, metrics and the status endpoints of alibaba/rtp-llm, which its routers and probes call."""

import asyncio
import itertools
import logging
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from rtp_llm import log as logs
from rtp_llm.api.auth import require_admin
from rtp_llm.api.body import body_schema, json_body
from rtp_llm.api.chat_page import chat_page
from rtp_llm.api.part_state import Health, PartState
from rtp_llm.api.schema import LogLevelRequest
from rtp_llm.api.service import Service
from rtp_llm.metrics import Metrics

log = logging.getLogger(__name__)

HEALTH_PATHS = ("/health", "/status", "/health_check", "/GraphService/cm2_status", "/SearchService/cm2_status")
LIVENESS_PATHS = ("/liveness", "/frontend_health")
_METHODS = ["GET", "POST"]
ADMIN = [Depends(require_admin)]


class HasHealth(Protocol):
    """Interface of what /health and /doctor report on: the part (`PartState`) or, before that starts, the download of
    its model (`DownloadState`).
    """

    def health(self) -> Health: ...

    def doctor_report(self) -> dict[str, Any] | None: ...


def status_router(state: HasHealth, metrics: Metrics, *, hides_detail: bool) -> APIRouter:
    """Returns the router of the endpoints that every part serves.

    `hides_detail`: whether /health returns only the phase to clients without a key.
    """
    router = APIRouter()

    async def health(request: Request) -> Response:
        """Returns `"ok"` if the server is ready, otherwise 503 with the phase, the progress and the reason. Clients
        without a key get only the phase if the server has keys.
        """
        current = state.health()
        if current.is_ready:
            return JSONResponse("ok")
        if hides_detail and not request.state.key_name:
            return JSONResponse({"phase": current.phase}, status_code=503, headers={"Retry-After": "1"})
        body = {"detail": current.detail, "phase": current.phase, "progress": round(current.progress, 3)}
        return JSONResponse(body, status_code=503, headers={"Retry-After": "1"})

    async def liveness() -> Response:
        """Returns `"ok"` while the API process responds, whatever the ranks do, so that a liveness probe does not
        restart a server that is loading.
        """
        return JSONResponse("ok")

    scrape_lock = asyncio.Lock()

    async def scrape() -> Response:
        """Returns the metrics in Prometheus format."""
        async with scrape_lock:  # in a thread, since collecting them takes longer than generating a token
            text = await run_in_threadpool(generate_latest, metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def doctor() -> Response:
        """Returns the report of the doctor that ran when this part started, including the checks that compare the parts
        of the gang. 404 if RTP_DOCTOR=off.
        """
        report = state.doctor_report()
        if report is None:
            return JSONResponse({"detail": "the doctor has not run: RTP_DOCTOR=off"}, status_code=404)
        return JSONResponse(report)

    router.add_api_route("/doctor", doctor, methods=["GET"], dependencies=ADMIN)
    for method in _METHODS:  # one route per method, since OpenAPI needs a unique operation id for each
        for path in HEALTH_PATHS:
            router.add_api_route(path, health, methods=[method], include_in_schema=path == "/health")
        for path in LIVENESS_PATHS:
            router.add_api_route(path, liveness, methods=[method], include_in_schema=path == "/liveness")
    router.add_api_route("/metrics", scrape, methods=["GET"], response_class=PlainTextResponse)
    return router


def engine_router(service: Service, state: PartState) -> APIRouter:
    """Returns the router of the endpoints that report the engine's state, which only part 0 serves."""
    router = APIRouter()
    page, policy = chat_page()

    async def home(request: Request) -> Response:
        """Returns the page for chatting with the model to browsers, and {"status": "home"} to other clients, as
        alibaba/rtp-llm does.
        """
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(page, headers={"Content-Security-Policy": policy})
        return JSONResponse({"status": "home"})

    async def worker_status() -> dict[str, Any]:
        return _worker_status(service, state)

    async def cache_status() -> dict[str, Any]:
        return _cache_status(service)

    log_level_body = Depends(json_body(LogLevelRequest, service.field_policy))

    async def set_log_level(body: Annotated[LogLevelRequest, log_level_body]) -> dict[str, str]:
        """Sets the log level of the API process."""
        logs.set_level(body.log_level)
        return {"status": "ok"}

    router.add_api_route("/", home, methods=["GET"])
    for method, prefix in itertools.product(_METHODS, ("", "/rtp_llm")):
        router.add_api_route(f"{prefix}/worker_status", worker_status, methods=[method], include_in_schema=not prefix)
        router.add_api_route(f"{prefix}/cache_status", cache_status, methods=[method], include_in_schema=not prefix)
    extra = body_schema(LogLevelRequest)
    router.add_api_route("/set_log_level", set_log_level, methods=["POST"], openapi_extra=extra, dependencies=ADMIN)
    return router


def _worker_status(service: Service, state: PartState) -> dict[str, Any]:
    plan, config, stats = state.part_spec.plan, service.config, service.client.stats
    engine = service.client.info
    limit = config.concurrency_limit
    return {
        "role": "RoleType.PDFUSION",
        "server_port": plan.start_port,
        "http_port": plan.start_port,
        "grpc_port": 0,
        "alive": state.health().is_ready,
        "tp_size": plan.tp_size,
        "dp_size": 1,
        "dp_rank": 0,
        "precision": engine.dtype if engine else "",
        "max_seq_len": engine.max_seq_len if engine else 0,
        "running_task_info": [],
        "finished_task_list": [],
        "running_query_len": stats.get("running", 0),
        "waiting_query_len": stats.get("waiting", 0),
        "iterate_count": stats.get("steps", 0),
        "step_latency_ms": stats.get("step_seconds", 0.0) * 1000,
        "available_concurrency": max(0, limit - service.client.num_in_flight),
        "frontend_available_concurrency": max(0, limit - service.client.num_in_flight),
        "frontend_concurrency_limit": limit,
        "status_version": stats.get("steps", 0),
        **_cache_tokens(service),
    }


def _cache_status(service: Service) -> dict[str, Any]:
    engine = service.client.info
    return {
        **_cache_tokens(service),
        "block_size": engine.block_size if engine else 0,
        "version": service.client.stats.get("steps", 0),
        "dp_size": 1,
        "frontend_available_concurrency": max(0, service.config.concurrency_limit - service.client.num_in_flight),
    }


def _cache_tokens(service: Service) -> dict[str, int]:
    """Returns the size of the KV cache and its free part, in tokens."""
    engine = service.client.info
    total = engine.num_blocks * engine.block_size if engine else 0
    used = service.client.stats.get("kv_used", 0) * engine.block_size if engine else 0
    return {"available_kv_cache": total - used, "total_kv_cache": total}
