"""Reads and validates JSON request bodies, whatever content type the client declares (`curl -d` declares a form)."""

import json
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from rtp_llm.errors import RequestError, invalid_format

Model = TypeVar("Model", bound=BaseModel)
MAX_SMALL_BYTES = 256 << 10  # of a body that is parsed on the event loop
REF = "#/components/schemas/{model}"


def json_body(model: type[Model], *, optional: bool = False) -> Callable[[Request], Awaitable[Model]]:
    """Returns a FastAPI dependency that reads a small body as an instance of `model`; `optional` accepts an empty one.

    The dependency raises RequestError 400, which names the invalid field and what it accepts, or 413. Requests with
    prompts, which are large, go through `api.preparer` instead.
    """

    async def parse(request: Request) -> Model:
        raw = await request.body()
        if len(raw) > MAX_SMALL_BYTES:
            message = f"the body has {len(raw)} bytes; at most {MAX_SMALL_BYTES} are allowed for {request.url.path}"
            raise RequestError(413, 507, "ERROR_INPUT_FORMAT_ERROR", message)
        return validate(model, {} if optional and not raw.strip() else parse_object(raw))

    return parse


def parse_object(raw: bytes) -> dict[str, Any]:
    """Returns the JSON object in `raw`. Raises RequestError 400.

    The object may be wrapped in a JSON string, as alibaba/rtp-llm accepts it.
    """
    if not raw.strip():
        raise invalid_format("the body is empty: send a JSON object")
    data = _parse_json(raw)
    if isinstance(data, str):
        data = _parse_json(data.encode(errors="replace"))
    if not isinstance(data, dict):
        raise invalid_format(f"the body is a JSON {_json_type_name(data)}: send a JSON object")
    return data


def validate(model: type[Model], data: dict[str, Any]) -> Model:
    """Returns `data` as an instance of `model`. Raises RequestError 400, which names the first invalid field."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        path = ".".join(str(p) for p in first["loc"])
        raise invalid_format(f"{path}: {first['msg']}" if path else first["msg"], param=path) from None


def body_schema(model: type[BaseModel], *, streams: bool = False) -> dict[str, Any]:
    """Returns FastAPI's argument `openapi_extra` for a route that uses `json_body`.

    `streams`: whether to document a text/event-stream response.
    """
    schema = {"$ref": REF.format(model=model.__name__)}
    extra: dict[str, Any] = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    if streams:
        extra["responses"] = {"200": {"content": {"text/event-stream": {}}}}
    return extra


def component_schemas(models: list[type[BaseModel]]) -> dict[str, Any]:
    """Returns the JSON schemas of `models` and of the models that they reference, by name."""
    components: dict[str, Any] = {}
    for model in models:
        schema = model.model_json_schema(ref_template=REF)
        components |= schema.pop("$defs", {})
        components[model.__name__] = schema
    return components


def _parse_json(raw: bytes) -> Any:
    try:
        return json.loads(raw, parse_constant=_reject_constant)
    except UnicodeDecodeError:
        raise invalid_format("the body is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise invalid_format(f"the body is malformed JSON at {position}: {error.msg}") from None
    except RecursionError:
        raise invalid_format("the body is JSON nested too deeply") from None
    except ValueError as error:  # int() rejects thousands of digits
        raise invalid_format(f"the body is malformed JSON: {error}") from None


def _reject_constant(name: str) -> NoReturn:
    raise invalid_format(f"the body is malformed JSON: {name} is not a JSON number")


def _json_type_name(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), "value")
