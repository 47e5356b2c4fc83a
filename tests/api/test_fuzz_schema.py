"""Sends valid and invalid requests that schemathesis generates from the server's OpenAPI document.

No request may cause a server error, and every response must conform to the document. Examples are few and
deterministic, so that failures can be reproduced and the duration is known.
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
    *("/chat/render", "/v1/chat/render", "/tokenize", "/detokenize", "/tokenizer/encode"),
    *("/v1/responses", "/v1/messages", "/v1/messages/count_tokens"),
]
WITHOUT_BODY = [
    *(f"GET {path}" for path in ("/", "/v1/models", "/v1/models/{name}", "/doctor", "/metrics")),
    *(f"{m} /v1/responses/{{response_id}}" for m in ("GET", "DELETE")),
    *("GET /v1/responses/{response_id}/input_items", "POST /v1/responses/{response_id}/cancel"),
    *(f"{m} {p}" for m in ("GET", "POST") for p in ("/health", "/liveness", "/worker_status", "/cache_status")),
]
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
LIMITS = (
    *("max_tokens", "max_completion_tokens", "max_output_tokens"),
    *("max_new_tokens", "gen_length", "min_tokens", "min_new_tokens"),
)
MAX_TOKENS = 3
TIMEOUTS = ("timeout_ms", "ttft_timeout_ms")  # a request that allows one millisecond rightly gets 504
LONG_TIMEOUT_MS = 60_000


@pytest.fixture(scope="module")
def document(small_server: ServerProcess) -> BaseSchema:
    with small_server.client() as client:
        raw = client.get("/openapi.json").json()
    openapi = schemathesis.openapi.from_dict(raw, config=schemathesis.Config())  # ignores a local schemathesis.toml
    openapi.config.update(base_url=small_server.url)
    return openapi


def shorten(body: Any) -> Any:
    """Limits the generated tokens of a request body, and makes timeouts long."""
    if not isinstance(body, dict):
        return body
    shortened = {key: _shorten_field(key, value) for key, value in body.items()}
    for name in ("max_tokens", "max_new_tokens", "max_output_tokens"):
        shortened.setdefault(name, MAX_TOKENS)
    return shortened


def _shorten_field(key: str, value: Any) -> Any:
    if key in LIMITS and isinstance(value, int) and value > MAX_TOKENS:
        return MAX_TOKENS
    if key in TIMEOUTS and isinstance(value, int) and 0 < value < LONG_TIMEOUT_MS:
        return LONG_TIMEOUT_MS
    is_nested = key in ("generate_config", "generation_config", "extra_configs")
    return shorten(value) if is_nested else value


def check_operation(document: BaseSchema, operation: str, mode: GenerationMode, examples: int) -> None:
    """Sends generated requests to one operation (method and path of the OpenAPI schema), and checks every response."""
    method, path = operation.split()

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=document[path][method].as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        case.body = shorten(case.body)
        response = case.call(timeout=60)
        case.validate_response(response, checks=CHECKS)
        assert "Traceback" not in response.text

    send()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
@pytest.mark.parametrize("path", WITH_BODY)
def test_bodies(path: str, mode: GenerationMode, document: BaseSchema) -> None:
    check_operation(document, f"POST {path}", mode, EXAMPLES)


@pytest.mark.parametrize("operation", WITHOUT_BODY)
def test_without_a_body(operation: str, document: BaseSchema) -> None:
    check_operation(document, operation, GenerationMode.POSITIVE, 1)


def test_the_document_names_every_endpoint(small_server: ServerProcess) -> None:
    """The tests above cover every operation, and operation ids are unique."""
    with small_server.client() as client:
        paths: dict[str, dict[str, Any]] = client.get("/openapi.json").json()["paths"]
    operations = {(method, path): op for path, methods in paths.items() for method, op in methods.items()}
    assert {f"{method.upper()} {path}" for method, path in operations} == {
        *WITHOUT_BODY,
        *(f"POST {p}" for p in WITH_BODY),
    }
    operation_ids = [operation["operationId"] for operation in operations.values()]
    assert len(operation_ids) == len(set(operation_ids))


def test_the_engine_still_serves_afterwards(small_server: ServerProcess) -> None:
    with small_server.client() as client:
        client.post("/set_log_level", json={"log_level": "INFO"})
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3}).status_code == 200
