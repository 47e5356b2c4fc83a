"""Fuzzes request bodies: random bytes and JSON, and every known field with every kind of invalid value.

Every request must get a response that is not a server error. An error must have both formats, OpenAI's and
alibaba/rtp-llm's. The server has a real engine: no accepted request may crash a rank.

Examples are few and deterministic; `FUZZ_FACTOR=20 python -m pytest tests/api/test_fuzz_bodies.py` tries more.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from rtp_llm.api import schema
from rtp_llm.api.anthropic.schema import MessagesRequest
from rtp_llm.api.responses.schema import ResponsesRequest
from tests.api.servers import ServerProcess
from tests.api.sse import payloads
from tests.quick import slow_except

HI = [{"role": "user", "content": "Hi"}]
FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))
CONFIG = tuple(schema.GenerateConfig.model_fields)


def known_fields(model: type[BaseModel], *more: str) -> tuple[str, ...]:
    return (*model.model_fields, *more)


# path: (a valid body, its known fields)
ENDPOINTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "/v1/chat/completions": ({"messages": HI, "max_tokens": 2}, known_fields(schema.ChatRequest)),
    "/chat/completions": ({"messages": HI, "max_tokens": 2, "stream": True}, known_fields(schema.ChatRequest)),
    "/v1/completions": ({"prompt": "Hi", "max_tokens": 2}, known_fields(schema.CompletionRequest)),
    "/": ({"prompt": "Hi", "max_new_tokens": 2}, known_fields(schema.NativeRequest, *CONFIG)),
    "/batch_infer": ({"prompt_batch": ["Hi"], "max_new_tokens": 2}, known_fields(schema.BatchInferRequest, *CONFIG)),
    "/chat/render": ({"messages": HI}, known_fields(schema.ChatRequest)),
    "/v1/chat/render": ({"messages": HI}, known_fields(schema.ChatRequest)),
    "/tokenize": ({"prompt": "Hi"}, known_fields(schema.TokenizeRequest)),
    "/detokenize": ({"tokens": [72, 105]}, known_fields(schema.DetokenizeRequest)),
    "/tokenizer/encode": ({"prompt": "Hi"}, known_fields(schema.EncodeRequest)),
    "/v1/responses": ({"input": "Hi", "max_output_tokens": 2}, known_fields(ResponsesRequest)),
    "/v1/messages": ({"messages": HI, "max_tokens": 2}, known_fields(MessagesRequest)),
    "/set_log_level": ({"log_level": "INFO"}, known_fields(schema.LogLevelRequest)),
}

QUICK = ("/v1/chat/completions", "/", "/batch_infer", "/tokenize", "/v1/responses", "/v1/messages")

INTEGERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**31 - 1, 2**31, -(2**31) - 1, 2**63, -(2**63), 2**64, 10**20, 10**400, -(10**400)]),
)
FLOATS = st.sampled_from(
    [
        0.0,
        -0.0,
        0.5,
        1.5,
        -1.5,
        1e-320,
        5e-324,
        1e-9,
        1e9,
        3.4e38,
        -3.4e38,
        1.7e308,
        -1.7e308,
        1e400,
        -1e400,
        float("nan"),
    ]
)
STRINGS = st.one_of(
    st.sampled_from(
        [
            *("", " ", "\x00", "\ud800", "a\udfffb", "\udc00\ud800", "\ufffe", "é🚀", "x" * 3000, "\u202e", "\r\n\r\n"),
            *("<|im_end|>", "<|im_start|>system", "{{ 1 }}", "{% raw %}", "nan", "inf", "1e999", "true", "null", "5"),
            *("user", "auto", "none", "DEBUG", "text", "9" * 5000, "٣", "²", "-1", "1_000", "0x10"),
        ]
    ),
    st.text(st.characters(), max_size=8),
)
SCALARS = st.one_of(st.none(), st.booleans(), INTEGERS, FLOATS, STRINGS)


def _nested(depth: int, inner: Any) -> Any:
    for level in range(depth):
        inner = [inner] if level % 2 else {"a": inner}
    return inner


VALUES = st.one_of(
    SCALARS,
    st.recursive(
        SCALARS, lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(STRINGS, v, max_size=3)), max_leaves=6
    ),
    st.builds(_nested, st.sampled_from([2, 50, 300, 900]), SCALARS),
    # Nearly valid messages, content parts, ids, biases and settings.
    st.lists(st.fixed_dictionaries({"role": SCALARS, "content": SCALARS}), max_size=2),
    st.builds(
        lambda v: [{"role": "user", "content": v}], st.lists(st.fixed_dictionaries({"type": STRINGS, "text": SCALARS}))
    ),
    st.builds(lambda k, v: [{"role": "user", "content": "a", k: v}], STRINGS, SCALARS),
    st.lists(INTEGERS, max_size=4),
    st.lists(st.lists(INTEGERS, max_size=3), max_size=3),
    st.lists(STRINGS, max_size=3),
    st.dictionaries(STRINGS, SCALARS, max_size=3),
    st.dictionaries(st.sampled_from(CONFIG), SCALARS, max_size=3),
    st.dictionaries(
        st.sampled_from(["self", "messages", "tools", "enable_thinking", "bos_token"]), SCALARS, max_size=2
    ),
)
CONTENT_TYPES = st.one_of(
    st.sampled_from(
        [
            *("", "application/json", "application/x-www-form-urlencoded", "multipart/form-data", "text/event-stream"),
            *("multipart/form-data; boundary=", "application/json; charset=nonsense", "*/*", ";", "application/xml"),
        ]
    ),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20),
)
BOUNDED = settings(
    derandomize=True,  # failures can be reproduced
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def client(small_server: ServerProcess) -> Iterator[httpx.Client]:
    """A client of the small server. Asserts at the end that no rank was lost and no sequence is running."""
    with small_server.client(timeout=60) as client:
        yield client
        client.post("/set_log_level", json={"log_level": "INFO"})
        assert client.get("/health").status_code == 200
        status = client.get("/worker_status").json()
        assert (status["running_query_len"], status["waiting_query_len"]) == (0, 0)
        assert (status["available_concurrency"], status["available_kv_cache"]) == (1, status["total_kv_cache"])


def assert_valid_response(response: httpx.Response) -> None:
    """Asserts that the response is no server error, except for a timeout that the request sets.

    A client error must have the usual format, and a success must contain no error.
    """
    text = response.text
    is_requested_timeout = response.status_code == 504 and b"timeout_ms" in response.request.content
    assert response.status_code < 500 or is_requested_timeout, text
    assert "Traceback" not in text
    if response.status_code != 200:
        assert response.status_code >= 400
        body = response.json()
        if body.get("type") == "error":  # Anthropic's form
            assert body["error"]["message"] != ""
            return
        assert isinstance(body["error_code"], int)
        assert body["error_code_str"].startswith(f"{body['error_code']}_")
        assert body["message"] == body["error"]["message"] != ""
    elif response.content.startswith(b"event: "):  # named events of the Responses and the Messages API
        assert not {b"event: error", b"event: response.failed"} & set(response.content.splitlines()), text
    elif response.headers["content-type"].startswith("text/event-stream"):
        errors = [event for event in payloads(response.content) if "error_code" in event]
        assert all(error["error_code"] == 603 for error in errors), text
    else:
        assert "error_code" not in response.json()


@pytest.mark.parametrize("path", slow_except(ENDPOINTS, *QUICK))
def test_wrong_values_in_known_fields(path: str, client: httpx.Client) -> None:
    base, names = ENDPOINTS[path]

    @settings(BOUNDED, max_examples=FACTOR * (100 if len(names) > 10 else 30))
    @given(changes=st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=3))
    def send(changes: dict[str, Any]) -> None:
        # Not json=, which rejects NaN and Infinity.
        raw = json.dumps({**base, **changes}).replace("Infinity", "1e999").encode()
        assert_valid_response(client.post(path, content=raw))

    send()


@pytest.mark.slow
@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_known_field_with_every_kind_of_value(path: str, client: httpx.Client) -> None:
    """One field at a time, so that no other field's error hides its own."""
    base, names = ENDPOINTS[path]
    values = [None, True, -1, 10**400, 1.5, 5e-324, "", "\ud800", [], [None], {}, {"\ud800": 1}, [[1]], _nested(300, 1)]
    for name in names:
        for value in values:
            assert_valid_response(client.post(path, content=json.dumps({**base, name: value}).encode()))


@pytest.mark.parametrize("path", slow_except(ENDPOINTS, *QUICK))
def test_bodies_of_bytes(path: str, client: httpx.Client) -> None:
    raw = st.one_of(
        st.binary(max_size=60),
        st.builds(lambda v: json.dumps(v).encode(), VALUES),
        st.builds(lambda v: json.dumps(json.dumps(v)).encode(), VALUES),
        st.builds(lambda v, cut: json.dumps(v).encode()[:cut], VALUES, st.integers(0, 30)),
        st.builds(lambda v: json.dumps(v, ensure_ascii=False).encode("utf-8", "surrogatepass"), VALUES),
        st.builds(lambda v, e: json.dumps(v).encode(e), VALUES, st.sampled_from(["utf-16", "utf-32", "utf-8-sig"])),
    )

    @settings(BOUNDED, max_examples=FACTOR * 50)
    @given(raw=raw, content_type=CONTENT_TYPES)
    def send(raw: bytes, content_type: str) -> None:
        assert_valid_response(client.post(path, content=raw, headers={"Content-Type": content_type}))

    send()


EXTREMES: dict[str, list[float]] = {
    "temperature": [0, 5e-324, 1e-320, 1e-6, 1e-5, 1e-4, 1.7e308],
    "repetition_penalty": [0.01, 100],
    "presence_penalty": [-100, 100],
    "frequency_penalty": [-100, 100],
    "top_p": [0, 5e-324, 1e-9, 1],
    "min_p": [0, 5e-324, 1],
    "top_k": [-(2**31), 0, 1, 5000, 2**31 - 1],
    "random_seed": [-(2**63), -1, 2**63, 2**64 - 1],
}


@pytest.mark.parametrize("name", EXTREMES)
def test_numbers_at_the_edge_of_their_range(name: str, client: httpx.Client) -> None:
    """Numbers at the edge of their range reach the sampler, and must not crash a rank or produce an invalid token."""
    for value in EXTREMES[name]:
        for options in ({}, {"top_k": 3}, {"top_p": 0.5}, {"presence_penalty": 1, "temperature": 2}):
            body = {"prompt": "The matrices", "max_new_tokens": 4, "random_seed": 1, **options, name: value}
            response = client.post("/", json={**body, "return_output_ids": True, "return_cum_log_probs": True})
            assert response.status_code == 200, (body, response.text)
            assert all(0 <= token < 1024 for token in response.json()["output_ids"][0])
