"""Rejects requests that the served model's task (TASK_TYPE) does not allow, such as a chat with an embedding model."""

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import Request

from rtp_llm.config import TaskType
from rtp_llm.errors import RequestError, unsupported

# Routes, of those for text, that every model serves.
COMMON_PATHS = {"/v1/models", "/tokenize", "/detokenize", "/tokenizer/encode"}


def serves_text(served: TaskType) -> Any:
    """Returns a FastAPI dependency that rejects requests to generate text with 400 unless `served`, the TASK_TYPE of
    the server, is LANGUAGE_MODEL.
    """

    async def check(request: Request) -> None:
        is_common = request.method == "GET" or request.url.path in COMMON_PATHS
        if served != "LANGUAGE_MODEL" and not is_common:
            raise _wrong_task(request, "LANGUAGE_MODEL", served)

    return Depends(check)


def refusing_router(paths: Iterable[str], task: TaskType, served: TaskType) -> APIRouter:
    """Returns a router that rejects every POST to `paths` with 400: they need TASK_TYPE=`task`, but the server runs
    with `served`.
    """
    router = APIRouter()

    async def refuse(request: Request) -> None:
        raise _wrong_task(request, task, served)

    for path in paths:
        router.add_api_route(path, refuse, methods=["POST"], include_in_schema=False)
    return router


def _wrong_task(request: Request, task: TaskType, served: TaskType) -> RequestError:
    return unsupported(f"{request.url.path} needs TASK_TYPE={task}, but this server runs with TASK_TYPE={served}")
