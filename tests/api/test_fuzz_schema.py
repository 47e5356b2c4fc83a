"""schemathesis: requests made from the server's own OpenAPI document, valid ones and spoiled ones.

No request may end in a server error, and every answer must look as the document says. Examples are few and always the
same, so that a failure can be repeated and the time is known.
"""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.api.servers import ServerProcess

EXAMPLES = 30  # per operation and kind
WITH_BODY = [
    *("/v1/chat/completions", "/chat/completions", "/v1/completions", "/", "/batch_infer", "/set_log_level"),
    *("/chat/render", "/v1/chat/render", "/tokenize", "/tokenizer/encode"),
]
PLAIN = [
    *(f"GET {path}" for path in ("/", "/v1/models", "/doctor", "/metrics")),
    *(f"{m} {p}" for m in ("GET", "POST") for p in ("/health", "/liveness", "/worker_status", "/cache_status")),
]
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
LIMITS = ("max_tokens", "max_completion_tokens", "max_new_tokens", "gen_length", "min_tokens", "min_new_tokens")
SHORT = 3  # tokens


@pytest.fixture(scope="module")
def document(small_server: ServerProcess) -> BaseSchema:
    with small_server.client() as client:
        raw = client.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(raw, config=schemathesis.Config())  # no file that lies about is read
    schema.config.update(base_url=small_server.url)
    return schema


def shorten(body: Any) -> Any:
    """Answers of a few tokens where a number was made that asks for many, or none that limits them."""
    if not isinstance(body, dict):
        return body
    made = {key: _short(key, value) for key, value in body.items()}
    for name in ("max_tokens", "max_new_tokens"):
        made.setdefault(name, SHORT)
    return made


def _short(key: str, value: Any) -> Any:
    if key in LIMITS and isinstance(value, int) and value > SHORT:
        return SHORT
    nested = key in ("generate_config", "generation_config", "extra_configs")
    return shorten(value) if nested else value


def hold(document: BaseSchema, operation: str, mode: GenerationMode, examples: int) -> None:
    """Every check on every answer to what is made for one operation."""
    method, path = operation.split()

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=document[path][method].as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        case.body = shorten(case.body)
        response = case.call(timeout=60)
        case.validate_response(response, checks=CHECKS)
        assert "Traceback" not in response.text

    ask()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "spoiled"])
@pytest.mark.parametrize("path", WITH_BODY)
def test_bodies(path: str, mode: GenerationMode, document: BaseSchema) -> None:
    hold(document, f"POST {path}", mode, EXAMPLES)


@pytest.mark.parametrize("operation", PLAIN)
def test_without_a_body(operation: str, document: BaseSchema) -> None:
    hold(document, operation, GenerationMode.POSITIVE, 1)


def test_the_document_names_every_endpoint(small_server: ServerProcess) -> None:
    """What is fuzzed above is what there is; each operation by a name of its own."""
    with small_server.client() as client:
        paths: dict[str, dict[str, Any]] = client.get("/openapi.json").json()["paths"]
    operations = {(method, path): o for path, methods in paths.items() for method, o in methods.items()}
    assert {f"{method.upper()} {path}" for method, path in operations} == {*PLAIN, *(f"POST {p}" for p in WITH_BODY)}
    names = [operation["operationId"] for operation in operations.values()]
    assert len(names) == len(set(names))


def test_the_engine_has_survived(small_server: ServerProcess) -> None:
    with small_server.client() as client:
        client.post("/set_log_level", json={"log_level": "INFO"})
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3}).status_code == 200
