"""Reads and validates JSON request bodies. Ignores the declared content type (`curl -d` declares a form)."""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from pydantic_core import ErrorDetails
from starlette.requests import Request

from rtp_llm.api.fields import FieldPolicy, recording, set_fields
from rtp_llm.errors import RequestError, invalid_format
from rtp_llm.text.json_depth import MAX_DEPTH, TOO_DEEP, is_too_deep

Model = TypeVar("Model", bound=BaseModel)
MAX_SMALL_BYTES = 256 << 10  # of a body that is parsed on the event loop
REF = "#/components/schemas/{model}"


def json_body(model: type[Model], policy: FieldPolicy) -> Callable[[Request], Awaitable[Model]]:
    """Returns a FastAPI dependency that reads a small body as an instance of `model`.

    The dependency raises RequestError 400, which names the invalid field and its allowed values, or 413. Requests with
    prompts, which are large, go through `api.preparer` instead.
    """

    async def parse(request: Request) -> Model:
        raw = await request.body()
        if len(raw) > MAX_SMALL_BYTES:
            message = f"the body has {len(raw)} bytes; at most {MAX_SMALL_BYTES} are allowed for {request.url.path}"
            raise RequestError(413, 507, "ERROR_INPUT_FORMAT_ERROR", message)
        with recording() as record:
            body = parse_body(model, raw)
        policy.apply(record)
        return body

    return parse


def parse_object(raw: bytes) -> dict[str, Any]:
    """Returns the JSON object in `raw`. Raises RequestError 400.

    As in alibaba/rtp-llm, the object may itself be encoded as a JSON string.
    """
    if not raw.strip():
        raise invalid_format("the body is empty: send a JSON object")
    data = _parse_json(raw)
    if isinstance(data, str):
        if not data.strip():
            raise invalid_format("the body is an empty JSON string: send a JSON object")
        data = _parse_json(data.encode(errors="replace"))
    if not isinstance(data, dict):
        raise invalid_format(f"the body is a JSON {_json_type_name(data)}: send a JSON object")
    return data


def parse_body(model: type[Model], raw: bytes) -> Model:
    """Returns the JSON object in `raw` as an instance of `model`. Raises RequestError 400."""
    return validate(model, parse_object(raw))


def validate(model: type[Model], data: dict[str, Any]) -> Model:
    """Returns `data` as an instance of `model`. Ignores or rejects fields that `model` lacks, as `api.fields` defines.

    Raises RequestError 400, which names the first invalid field as the client sent it.
    """
    try:
        values = set_fields(model, data)
        return model.model_validate(values)
    except ValidationError as error:
        raise _invalid_field(error, values) from None
    except RecursionError:
        raise invalid_format("the body is JSON nested too deeply") from None


def _invalid_field(error: ValidationError, data: Mapping[str, Any]) -> RequestError:
    """Returns the error of the first invalid field. For a union, such as the four forms of `prompt`, names the item at
    which the closest form failed; if several forms failed there, what each would accept.
    """
    details = error.errors(include_url=False, include_context=False, include_input=False)
    paths = [_sent_path(detail, data) for detail in details]
    candidates = [(path, d["msg"]) for path, d in zip(paths, details, strict=True) if path[:1] == paths[0][:1]]
    furthest = max((path for path, _ in candidates), key=lambda path: (len(path), [str(p) for p in path]))
    messages = list(dict.fromkeys(message for path, message in candidates if path == furthest))
    message = messages[0] + "".join(f" or {text.removeprefix('Input should be ')}" for text in messages[1:])
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in furthest).removeprefix(".")
    return invalid_format(f"{name}: {message}" if name else message, param=name or None)


def _sent_path(detail: ErrorDetails, data: Any) -> tuple[int | str, ...]:
    """Returns pydantic's path without the names that it gives to the members of unions."""
    path: list[Any] = []
    part: Any
    for part in detail["loc"]:
        if (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int)):
            path.append(part)
            data = data[part]
    return (*path, detail["loc"][-1]) if detail["type"] == "missing" else tuple(path)


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
    _, schema = models_json_schema([(model, "validation") for model in models], ref_template=REF)
    components: dict[str, Any] = schema["$defs"]
    return components


def _parse_json(raw: bytes) -> Any:
    try:
        value = json.loads(raw, parse_constant=_reject_constant)
    except UnicodeDecodeError:
        raise invalid_format("the body is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise invalid_format(f"the body is malformed JSON at {position}: {error.msg}") from None
    except RecursionError:
        raise invalid_format(f"the body is {TOO_DEEP}") from None
    except ValueError as error:  # int() rejects thousands of digits
        raise invalid_format(f"the body is malformed JSON: {error}") from None
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and is_too_deep(value):
        raise invalid_format(f"the body is {TOO_DEEP}")
    return value


def _reject_constant(name: str) -> NoReturn:
    raise invalid_format(f"the body is malformed JSON: {name} is not a JSON number")


def _json_type_name(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), "value")
