"""Errors that clients receive: a status, a message and the error_code of alibaba/rtp-llm."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from rtp_llm.api.schema import BatchInferRequest, ChatRequest, CompletionRequest, GenerateConfig, NativeRequest
from tests.api.api_server import ApiServer
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput
from tests.api.raw_http import RawHttpConnection

CHAT, COMPLETION, NATIVE, BATCH = "/v1/chat/completions", "/v1/completions", "/", "/batch_infer"
POSTS = (
    *(CHAT, "/chat/completions", COMPLETION, "/chat/render", "/v1/chat/render"),
    *(NATIVE, BATCH, "/tokenize", "/tokenizer/encode", "/set_log_level"),
)
OPENAI_CODES = {511: "context_length_exceeded"}  # error codes that clients know by OpenAI's name
HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def api(byte_model: ByteModel) -> Iterator[ApiServer]:
    with ApiServer(byte_model, lambda submission: [ScriptedOutput([], "length")], max_body_mb=0.25) as api:
        yield api


@pytest.fixture(scope="module")
def client(api: ApiServer) -> Iterator[httpx.Client]:
    with api.client() as client:
        yield client


def assert_error(response: httpx.Response, status: int, code: int, *substrings: str) -> dict[str, Any]:
    """Asserts that the body has the error in OpenAI's format ("error") and in alibaba/rtp-llm's ("error_code"), with
    the same message, which shows no internals such as a traceback."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body: dict[str, Any] = response.json()
    assert body["error_code"] == code
    assert body["error_code_str"].startswith(f"{code}_")
    assert body["error_code_str"].split("_", 1)[1].isupper()
    assert body["error"]["message"] == body["message"]
    assert body["error"]["code"] == OPENAI_CODES.get(code, body["error_code_str"].split("_", 1)[1].lower())
    assert body["error"]["type"] in ("invalid_request_error", "rate_limit_error", "server_error")
    for substring in substrings:
        assert substring in body["message"], body["message"]
    for substring in ("Traceback", 'File "', "pydantic", "rtp_llm.", "Exception", "object at 0x"):
        assert substring not in body["message"]
    assert 0 < len(body["message"]) < 500
    return body


# (path, body, code, substrings of the message); the status is 400
REJECTED_REQUESTS: list[tuple[str, dict[str, Any], int, tuple[str, ...]]] = [
    # No prompt, or an empty one
    (CHAT, {}, 507, ("messages",)),
    (CHAT, {"messages": []}, 507, ("messages",)),
    (COMPLETION, {}, 507, ("prompt",)),
    (COMPLETION, {"prompt": ""}, 510, ("empty",)),
    (COMPLETION, {"prompt": []}, 510, ("empty",)),
    (COMPLETION, {"prompt": [""]}, 510, ("empty",)),
    (COMPLETION, {"prompt": ["a", ""]}, 510, ("empty",)),
    (COMPLETION, {"prompt": [[]]}, 510, ("empty",)),
    (NATIVE, {}, 509, ("prompt",)),
    (NATIVE, {"prompt": None, "text": None}, 509, ("prompt",)),
    (NATIVE, {"messages": []}, 509, ("prompt",)),
    (NATIVE, {"prompt": ""}, 510, ("empty",)),
    (NATIVE, {"text": []}, 510, ("empty",)),
    (NATIVE, {"prompt_batch": []}, 510, ("empty",)),
    (NATIVE, {"prompt_batch": ["a", ""]}, 510, ("empty",)),
    (BATCH, {}, 507, ("prompt_batch",)),
    (BATCH, {"prompt_batch": []}, 507, ("prompt_batch",)),
    ("/tokenize", {}, 509, ("prompt",)),
    ("/tokenizer/encode", {}, 507, ("prompt",)),
    # Too long a prompt
    (CHAT, {"messages": [{"role": "user", "content": "x" * 3000}]}, 511, ("2047", "MAX_SEQ_LEN")),
    (COMPLETION, {"prompt": "x" * 2048}, 511, ("2048", "2047")),
    (COMPLETION, {"prompt": [1] * 2048}, 511, ("2048", "2047")),
    (NATIVE, {"prompt": "x" * 50_000}, 511, ("50000",)),
    (BATCH, {"prompt_batch": ["a", "x" * 3000]}, 511, ("3000",)),
    # No tokens left to generate
    (CHAT, {"messages": HI, "max_tokens": 0}, 605, ("max_tokens",)),
    (CHAT, {"messages": HI, "max_completion_tokens": 0}, 605, ("max_tokens",)),
    (COMPLETION, {"prompt": "a", "max_tokens": 0}, 605, ("max_tokens", "echo")),
    (CHAT, {"messages": HI, "min_tokens": 5, "max_tokens": 3}, 605, ("min_tokens",)),
    (NATIVE, {"prompt": "a", "min_new_tokens": 5, "max_new_tokens": 3}, 605, ("min_tokens",)),
    # Known fields, wrong values
    (CHAT, {"messages": HI, "temperature": -1}, 507, ("temperature", "0")),
    (CHAT, {"messages": HI, "temperature": "hot"}, 507, ("temperature",)),
    (CHAT, {"messages": HI, "top_p": 1.5}, 507, ("top_p",)),
    (CHAT, {"messages": HI, "n": 0}, 507, ("n",)),
    (CHAT, {"messages": HI, "n": 1.5}, 507, ("n",)),
    (CHAT, {"messages": HI, "max_tokens": -2}, 507, ("max_tokens",)),
    (CHAT, {"messages": HI, "max_tokens": True}, 507, ("max_tokens", "boolean")),
    (CHAT, {"messages": HI, "temperature": False}, 507, ("temperature", "boolean")),
    (CHAT, {"messages": HI, "max_tokens": 2**40}, 507, ("max_tokens",)),
    (CHAT, {"messages": HI, "top_logprobs": 21, "logprobs": True}, 507, ("top_logprobs",)),
    (CHAT, {"messages": HI, "logprobs": 5}, 507, ("logprobs",)),
    (CHAT, {"messages": HI, "top_logprobs": 3}, 605, ("top_logprobs", "logprobs")),
    (CHAT, {"messages": HI, "prompt_logprobs": 1, "stream": True}, 605, ("prompt_logprobs", "stream")),
    (COMPLETION, {"prompt": "a", "prompt_logprobs": 1, "stream": True}, 605, ("prompt_logprobs", "stream")),
    (COMPLETION, {"prompt": "a", "prompt_logprobs": -1}, 507, ("prompt_logprobs",)),
    (CHAT, {"messages": HI, "stop": ["a", ""]}, 507, ("stop",)),
    (CHAT, {"messages": HI, "stop": 5}, 507, ("stop",)),
    (CHAT, {"messages": HI, "seed": 2**64}, 507, ("seed",)),
    (CHAT, {"messages": HI, "presence_penalty": 3}, 507, ("presence_penalty",)),
    (CHAT, {"messages": HI, "logit_bias": {"a": 1}}, 605, ("logit_bias", "'a'")),
    (CHAT, {"messages": HI, "logit_bias": {"-1": 1}}, 605, ("logit_bias",)),
    (CHAT, {"messages": HI, "logit_bias": {"258": 1}}, 605, ("logit_bias", "258")),
    (CHAT, {"messages": HI, "logit_bias": {"9" * 5000: 1}}, 605, ("logit_bias",)),
    (CHAT, {"messages": HI, "logit_bias": {"1": 101}}, 507, ("logit_bias",)),
    (CHAT, {"messages": HI, "stop_token_ids": [258]}, 605, ("stop_token_ids", "258")),
    (CHAT, {"messages": HI, "stop_token_ids": [-1]}, 507, ("stop_token_ids",)),
    (CHAT, {"messages": "Hi"}, 507, ("messages",)),
    (CHAT, {"messages": [{"role": "unknown", "content": "a"}]}, 507, ("role",)),
    (CHAT, {"messages": [{"content": "a"}]}, 507, ("role",)),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 507, ("content",)),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 605, ("image_url",)),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 605, ("text",)),
    (CHAT, {"messages": HI, "chat_template_kwargs": {"messages": []}}, 605, ("chat_template_kwargs", "messages")),
    (CHAT, {"messages": HI, "chat_template_kwargs": {"tools": []}}, 605, ("chat_template_kwargs", "tools")),
    (CHAT, {"messages": HI, "extra_configs": {"top_k": "many"}}, 507, ("extra_configs", "top_k")),
    (CHAT, {"messages": HI, "stream_options": 5, "stream": True}, 507, ("stream_options",)),
    (COMPLETION, {"prompt": {"a": 1}}, 507, ("prompt",)),
    (COMPLETION, {"prompt": [-1]}, 507, ("prompt",)),
    (COMPLETION, {"prompt": [258]}, 605, ("258", "vocabulary")),
    (COMPLETION, {"prompt": [[5], [258]]}, 605, ("258", "vocabulary")),
    (COMPLETION, {"prompt": ["a", [5]]}, 507, ("prompt",)),
    (COMPLETION, {"prompt": "a", "logprobs": 21}, 507, ("logprobs",)),
    (NATIVE, {"prompt": 5}, 507, ("prompt",)),
    (NATIVE, {"prompt_batch": "a"}, 507, ("prompt_batch",)),
    (NATIVE, {"prompt": "a", "generate_config": []}, 507, ("generate_config",)),
    (NATIVE, {"prompt": "a", "generate_config": {"top_k": "many"}}, 507, ("top_k",)),
    (NATIVE, {"prompt": "a", "top_p": 2}, 507, ("top_p",)),
    (NATIVE, {"prompt": "a", "timeout_ms": 10**400}, 507, ("timeout_ms",)),
    (NATIVE, {"prompt": "a", "return_incremental": True}, 507, ("return_incremental",)),
    (NATIVE, {"prompt": "a", "stop_words_list": [[300]]}, 605, ("300",)),
    ("/tokenize", {"prompt": 5}, 507, ("prompt",)),
    ("/tokenizer/encode", {"prompt": ["a"]}, 507, ("prompt",)),
    ("/set_log_level", {"log_level": "LOUD"}, 507, ("log_level", "DEBUG")),
    ("/set_log_level", {}, 507, ("log_level",)),
    # Known features that are not supported are rejected, not ignored
    (COMPLETION, {"prompt": "a", "suffix": "b"}, 515, ("suffix",)),
    (COMPLETION, {"prompt": "a", "best_of": 2}, 515, ("best_of",)),
    (NATIVE, {"prompt": "a", "num_beams": 2}, 515, ("num_beams", "beam search")),
    (NATIVE, {"prompt": "a", "urls": ["http://x"]}, 515, ("urls",)),
    (NATIVE, {"prompt": "a", "return_hidden_states": True}, 515, ("return_hidden_states",)),
    (NATIVE, {"prompt": "a", "output_logits": True}, 515, ("return_logits",)),
    (NATIVE, {"prompt": "a", "adapter_name": "lora"}, 515, ("adapter_name",)),
    (NATIVE, {"prompt": "a", "select_tokens_id": [0]}, 515, ("select_tokens_id",)),
    (NATIVE, {"prompt": "a", "bad_words_list": [[0]]}, 515, ("bad_words_list",)),
]


@pytest.mark.parametrize(("path", "body", "code", "substrings"), REJECTED_REQUESTS, ids=lambda value: str(value)[:60])
def test_invalid_and_unsupported_requests(
    path: str, body: dict[str, Any], code: int, substrings: tuple[str, ...], client: httpx.Client
) -> None:
    assert_error(client.post(path, json=body), 400, code, *substrings)


def test_no_new_tokens(client: httpx.Client) -> None:
    """Upstream's code of a prompt that leaves no room; no OpenAI client may take it for that and shorten the prompt."""
    body = client.post(NATIVE, json={"prompt": "a", "max_new_tokens": 0}).json()
    assert (body["error_code"], body["error"]["code"]) == (511, "long_prompt_error")
    assert body["error"]["param"] == "max_new_tokens"


@pytest.mark.parametrize("path", [CHAT, COMPLETION, NATIVE])
def test_a_stream_is_rejected_with_a_status_too(path: str, client: httpx.Client) -> None:
    """An error before the first event of a stream is an HTTP response with an error status, not an event."""
    body = {"messages": [{"role": "user", "content": "x" * 3000}], "prompt": "x" * 3000, "stream": True}
    assert_error(client.post(path, json=body), 400, 511)


# Bodies that are not a JSON object

RAW: list[tuple[bytes, tuple[str, ...]]] = [
    (b"", ("empty",)),
    (b"  \n", ("empty",)),
    (b"{", ("malformed", "column")),
    (b'{"prompt": "a"', ("malformed",)),
    (b"{'prompt': 'a'}", ("malformed",)),
    (b"[1, 2]", ("array",)),
    (b"5", ("number",)),
    (b"true", ("boolean",)),
    (b"null", ("null",)),
    (b'"not json"', ("malformed",)),
    (b'"[1]"', ("array",)),
    (b'""', ("empty", "string")),
    (b'"\\ud800"', ("malformed",)),
    (b"\xff\xff\xff", ("UTF-8",)),
    (b'{"prompt": NaN}', ("NaN",)),
    (b'{"prompt": -Infinity}', ("Infinity",)),
    (b'{"prompt": ' + b"9" * 5000 + b"}", ("malformed",)),
    (b"[" * 50_000, ("nested",)),
    (b'{"a":' * 20_000, ("nested",)),
]


@pytest.mark.parametrize("path", POSTS)
def test_a_body_that_is_not_an_object(path: str, client: httpx.Client) -> None:
    for raw, substrings in RAW:
        assert_error(client.post(path, content=raw), 400, 507, *substrings)


@pytest.mark.parametrize("path", POSTS)
def test_a_body_that_is_too_large(path: str, client: httpx.Client, api: ApiServer) -> None:
    """A too large body is rejected with and without a Content-Length, before all of it has arrived."""
    large = b'{"prompt": "' + b"x" * 300_000 + b'"}'
    assert_error(client.post(path, content=large), 413, 507, "0.25 MiB", "MAX_BODY_MB")
    in_chunks = (large[i : i + 50_000] for i in range(0, len(large), 50_000))
    assert_error(client.post(path, content=in_chunks), 413, 507, "0.25 MiB")
    with RawHttpConnection(api.url).send(path, b"{", content_length=10**12) as connection:
        assert connection.status() == 413


# (path, text before the items, one item, text after the items); the status is 400 or 429
FLOODS: list[tuple[str, str, str, str]] = [
    (COMPLETION, '{"prompt": [', "{}", "]}"),
    (COMPLETION, '{"prompt": [', "[1]", "]}"),
    (COMPLETION, '{"prompt": [[', '"a"', "]]}"),
    (COMPLETION, '{"prompt": [', '"a"', "]}"),
    (COMPLETION, '{"prompt": "a", "stop": [', '"b"', "]}"),
    (COMPLETION, '{"prompt": "a", "stop_token_ids": [', '"b"', "]}"),
    (CHAT, '{"messages": [', "{}", "]}"),
    (CHAT, '{"messages": [', '{"role": "user", "content": "a"}', "]}"),
    (CHAT, '{"messages": [{"role": "user", "content": [', "{}", "]}]}"),
    (CHAT, '{"messages": [{"role": "user", "content": "a"}], "tools": [', "5", "]}"),
    (NATIVE, '{"prompt": [', "{}", "]}"),
    (NATIVE, '{"prompt_batch": [', '"a"', "]}"),
    (NATIVE, '{"prompt": "a", "stop_words_list": [[', '"b"', "]]}"),
    (BATCH, '{"prompt_batch": [', '"a"', "]}"),
]


MODELS: dict[str, type[BaseModel]] = {
    CHAT: ChatRequest,
    COMPLETION: CompletionRequest,
    NATIVE: NativeRequest,
    BATCH: BatchInferRequest,
}


@pytest.mark.slow
@pytest.mark.parametrize(("path", "before", "item", "after"), FLOODS, ids=lambda value: value[:50])
def test_a_body_full_of_items_is_rejected_early(
    path: str, before: str, item: str, after: str, start_api: StartApi
) -> None:
    """The largest possible number of items is rejected before each is checked, which would block the event loop."""
    api = start_api()
    items = ", ".join([item] * min(1_000_000, 2**23 // len(item)))
    with api.client() as client:
        response = client.post(path, content=f"{before}{items}{after}".encode())
        assert_error(response, response.status_code, response.json()["error_code"])
    assert response.status_code in (400, 429)
    assert api.engine.num_pending_submissions == 0


@pytest.mark.parametrize(("path", "before", "item", "after"), FLOODS, ids=lambda value: value[:50])
def test_validation_stops_at_the_first_invalid_item(path: str, before: str, item: str, after: str) -> None:
    """Millions of errors would take a minute. The test counts errors, so it does not depend on the machine's speed."""
    body = json.loads(f"{before}{', '.join([item] * 50_000)}{after}")
    count = 0
    try:
        model = MODELS[path].model_validate(body)
        if isinstance(model, NativeRequest):
            GenerateConfig.model_validate(model.model_extra)
    except ValidationError as error:
        count = error.error_count()
    assert count <= 6  # a prompt has four formats, each with its own error


def test_too_many_biases(start_api: StartApi) -> None:
    for value in ('"x"', "1"):
        biases = ", ".join(f'"{i}": {value}' for i in range(300_000))
        with start_api().client() as client:
            raw = f'{{"prompt": "a", "logit_bias": {{{biases}}}}}'
            assert_error(client.post(COMPLETION, content=raw.encode()), 400, 507, "logit_bias", "4096")


@pytest.mark.parametrize("text", ["\ud800", "a\udfff"], ids=["high", "low"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "?"}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}]}]}),
        (CHAT, {"messages": HI, "stop": "?"}),
        (CHAT, {"messages": HI, "logit_bias": {"?": 1}}),
        (CHAT, {"messages": [{"role": "?", "content": "a"}]}),
        (COMPLETION, {"prompt": "?"}),
        (COMPLETION, {"prompt": ["a", "?"]}),
        (NATIVE, {"prompt": "?"}),
        (NATIVE, {"prompt_batch": ["?"]}),
        (NATIVE, {"messages": [{"role": "user", "content": "?"}]}),
        (BATCH, {"prompt_batch": ["?"]}),
        ("/chat/render", {"messages": [{"role": "user", "content": "?"}]}),
        ("/tokenize", {"prompt": "?"}),
        ("/tokenizer/encode", {"prompt": "?"}),
        ("/set_log_level", {"log_level": "?"}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_unpaired_surrogate_is_rejected(path: str, body: dict[str, Any], text: str, client: httpx.Client) -> None:
    """JSON can represent an unpaired surrogate, UTF-8 cannot: the request is rejected, and the response is valid."""
    raw = json.dumps(body).replace("?", json.dumps(text)[1:-1])
    response = client.post(path, content=raw.encode())
    assert_error(response, 400, response.json()["error_code"])
    assert response.json()["error_code"] in (507, 605)


def test_template_variables_of_any_name(client: httpx.Client) -> None:
    """chat_template_kwargs reach the template, even if they have the names of parameters of Jinja's `render`."""
    kwargs = {"self": 1, "options": 2, "template": 3, "kwargs": 4, "name": 5}
    assert client.post(CHAT, json={"messages": HI, "chat_template_kwargs": kwargs}).status_code == 200


def test_deep_extra_fields(client: httpx.Client) -> None:
    """Unknown fields may have any value, up to the nesting depth of 128 that a body may have."""
    for depth, status in ((120, 200), (200, 400), (300, 400), (900, 400)):
        deep = json.loads("[" * depth + "]" * depth)
        chat = {"messages": [{"role": "user", "content": "a", "x": deep}]}
        assert client.post(CHAT, json=chat).status_code == status
        assert client.post(BATCH, json={"prompt_batch": ["a"], "x": deep}).status_code == status
        assert client.post(NATIVE, json={"prompt": "a", "x": deep}).status_code == status


# Paths and methods


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    assert_error(client.get("/nothing"), 404, 507, "/nothing")
    assert_error(client.post("/v1/nothing/%ff%00"), 404, 507)
    response = client.put(CHAT, json={})
    assert_error(response, 405, 507, "PUT")
    assert response.headers["allow"] == "POST"


# Upstream's statuses


def test_legacy_status(start_api: StartApi, byte_model: ByteModel) -> None:
    """With LEGACY_HTTP_STATUS every error has status 500 and the same body as without."""
    api = start_api(legacy_http_status=True, concurrency_limit=1, queue_limit=0)
    with api.open_stream(CHAT, {"messages": HI, "stream": True}), api.client() as client:
        assert_error(client.post(CHAT, json={"messages": HI}), 500, 409)
    api.wait_until(lambda: api.post(CHAT, {"messages": HI, "n": 2}).json()["error_code"] == 605)
    with api.client() as client:
        for path, body, code, substrings in REJECTED_REQUESTS[::9]:
            assert_error(client.post(path, json=body), 500, code, *substrings)
        assert_error(client.post(CHAT, content=b"{"), 500, 507)
        assert_error(client.get("/nothing"), 500, 507)
        assert_error(client.put(CHAT), 500, 507)
        api.engine.script = lambda submission: [ScriptedOutput([], "error", error="the engine fell over")]
        failed = client.post(CHAT, json={"messages": HI})
        assert_error(failed, 500, 606, "the engine fell over")
        api.engine.script = lambda submission: [ScriptedOutput(byte_model.tokens("a"), "length")]
        assert client.post(CHAT, json={"messages": HI}).status_code == 200


# Timeouts


def test_a_timeout_aborts_the_request(start_api: StartApi, byte_model: ByteModel) -> None:
    """At the timeout the client gets status 504, or an error event if its stream has started."""
    api = start_api(lambda submission: [ScriptedOutput(byte_model.tokens("some"))])
    with api.client() as client:
        assert_error(client.post(NATIVE, json={"prompt": "a", "timeout_ms": 50}), 504, 603, "0.05 s")
        assert api.engine.next_abort() == api.engine.next_submission().id
        body = {"messages": HI, "extra_configs": {"timeout_ms": 50}}
        assert_error(client.post(CHAT, json=body), 504, 603)
        assert api.engine.next_abort() == api.engine.next_submission().id
        stream = client.post(NATIVE, json={"prompt": "a", "timeout_ms": 50, "yield_generator": True})
        assert stream.status_code == 200
        events = stream.text.split("\r\n\r\n")
        assert json.loads(events[0].removeprefix("data:"))["response"] == "some"
        assert json.loads(events[1].removeprefix("data:"))["error_code"] == 603
        assert events[2:] == ["data:[done]", ""]
        assert api.engine.next_abort() == api.engine.next_submission().id


def test_a_timeout_until_the_first_token(start_api: StartApi, byte_model: ByteModel) -> None:
    """It does not count once a token has come; each endpoint has it, and the server's own applies to the others."""
    api = start_api(lambda submission: [])
    limit = {"ttft_timeout_ms": 50}
    bodies = [
        (NATIVE, {"prompt": "a", **limit}),
        (CHAT, {"messages": HI, **limit}),
        (COMPLETION, {"prompt": "a", **limit}),
    ]
    bodies.append((CHAT, {"messages": HI, "extra_configs": limit}))
    bodies.append((NATIVE, {"prompt": "a", "generate_config": limit}))
    with api.client() as client:
        for path, body in bodies:
            assert_error(client.post(path, json=body), 504, 603, "no token within 0.05 s")
            assert api.engine.next_abort() == api.engine.next_submission().id
        api.engine.script = lambda submission: [ScriptedOutput(byte_model.tokens("a"))]
        body = {"messages": HI, "ttft_timeout_ms": 5000, "timeout_ms": 50}
        assert_error(client.post(CHAT, json=body), 504, 603, "not finished within 0.05 s")
    api = start_api(lambda submission: [], ttft_timeout_ms=50)
    assert_error(api.post(COMPLETION, {"prompt": "a"}), 504, 603, "no token within 0.05 s")


def test_the_timeout_of_the_server(start_api: StartApi) -> None:
    api = start_api(lambda submission: [], max_rpc_timeout_ms=50)
    with api.client() as client:
        assert_error(client.post(COMPLETION, json={"prompt": "a"}), 504, 603)
        assert_error(client.post(COMPLETION, json={"prompt": ["a", "b"], "n": 2}), 504, 603)
