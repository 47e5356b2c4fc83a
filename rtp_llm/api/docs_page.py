"""The page /docs: the OpenAPI document as HTML without scripts, so that it loads nothing from other hosts."""

import json
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse

POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
STYLE = """:root { color-scheme: light dark } body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem;
margin: 0 auto; padding: 1rem } h2 { font-size: 1rem; font-family: monospace } table { border-collapse: collapse }
td { padding: .1rem .8rem .1rem 0; vertical-align: top; border-top: 1px solid #8884 } code { font-size: .9em }"""


def docs_router(app: FastAPI) -> APIRouter:
    router = APIRouter()

    async def docs() -> HTMLResponse:
        return HTMLResponse(render(app.openapi()), headers={"Content-Security-Policy": POLICY})

    router.add_api_route("/docs", docs, methods=["GET"], include_in_schema=False)
    return router


def render(document: dict[str, Any]) -> str:
    """Returns an OpenAPI document as an HTML page: each operation with the fields of its body."""
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>",
        f'<h1>{title}</h1><p>As data: <a href="/openapi.json">/openapi.json</a></p>',
    ]
    schemas = document.get("components", {}).get("schemas", {})
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2>{escape(method.upper())} {escape(path)}</h2><p>{escape(_text(operation))}</p>")
            parts.append(_fields(operation, schemas))
    return "\n".join(parts) + "\n</html>\n"


def _text(operation: dict[str, Any]) -> str:
    return operation.get("description") or operation.get("summary") or ""


def _fields(operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    schema = schemas.get(content.get("schema", {}).get("$ref", "").rpartition("/")[2], {})
    required = schema.get("required", [])
    rows = [
        f"<tr><td><code>{escape(name)}</code><td>{escape(_type(field))}"
        f"<td>{'required' if name in required else escape(json.dumps(field.get('default')))}"
        f"<td>{escape(field.get('description', ''))}"
        for name, field in schema.get("properties", {}).items()
    ]
    return f"<table>{''.join(rows)}</table>" if rows else ""


def _type(field: dict[str, Any]) -> str:
    """Returns the type of a field as text, such as "string | array of integer"."""
    if "anyOf" in field:
        return " | ".join(_type(option) for option in field["anyOf"])
    if "enum" in field:
        return " | ".join(json.dumps(value) for value in field["enum"])
    if field.get("type") == "array":
        return f"array of {_type(field.get('items', {}))}"
    return str(field.get("type") or field.get("$ref", "any").rpartition("/")[2])
