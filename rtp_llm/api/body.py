"""Request bodies: read whatever the content type says (`curl -d` sends a form's), checked by a schema, refused with
a sentence.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from rtp_llm.errors import invalid_format

Model = TypeVar("Model", bound=BaseModel)
REF = "#/components/schemas/{model}"


def json_body(model: type[Model], *, optional: bool = False) -> Callable[[Request], Awaitable[Model]]:
    """A FastAPI dependency that gives the body as `model`. Raises RequestError 400 with the field and what it takes."""

    async def parse(request: Request) -> Model:
        raw = await request.body()
        return validate(model, {} if optional and not raw.strip() else parse_object(raw))

    return parse


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object, or (as upstream takes it) a JSON string that holds one. Raises RequestError 400."""
    if not raw.strip():
        raise invalid_format("the body is empty: send a JSON object")
    data = _loads(raw)
    if isinstance(data, str):
        data = _loads(data.encode(errors="replace"))
    if not isinstance(data, dict):
        raise invalid_format(f"the body is a JSON {_json_name(data)}: send a JSON object")
    return data


def validate(model: type[Model], data: dict[str, Any]) -> Model:
    """Raises RequestError 400 naming the first field at fault."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        path = ".".join(str(p) for p in first["loc"])
        raise invalid_format(f"{path}: {first['msg']}" if path else first["msg"], param=path) from None


def body_schema(model: type[BaseModel], *, streams: bool = False) -> dict[str, Any]:
    """`openapi_extra` for a route whose body `json_body` reads; `streams`: it can answer with events."""
    schema = {"$ref": REF.format(model=model.__name__)}
    extra: dict[str, Any] = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    if streams:
        extra["responses"] = {"200": {"content": {"text/event-stream": {}}}}
    return extra


def component_schemas(models: list[type[BaseModel]]) -> dict[str, Any]:
    """The schemas of these models and of all they refer to, by name."""
    components: dict[str, Any] = {}
    for model in models:
        schema = model.model_json_schema(ref_template=REF)
        components |= schema.pop("$defs", {})
        components[model.__name__] = schema
    return components


def _loads(raw: bytes) -> Any:
    try:
        return json.loads(raw, parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise invalid_format("the body is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise invalid_format(f"the body is malformed JSON at {where}: {error.msg}") from None
    except RecursionError:
        raise invalid_format("the body is JSON nested too deeply") from None
    except ValueError as error:  # an integer with thousands of digits
        raise invalid_format(f"the body is malformed JSON: {error}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise invalid_format(f"the body is malformed JSON: {name} is no JSON number")


def _json_name(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), "value")
