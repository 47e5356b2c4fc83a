"""The bounded queue: sequences beyond its limits are rejected at once, and a slot (place in the engine or the queue) is
used again when its sequence ends."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.requests import ClientDisconnect, Request

from rtp_llm.api.disconnect import ClientDisconnected
from rtp_llm.api.service import SlotReservation
from rtp_llm.api.stream import EventStream, cancel_on_disconnect
from tests.api.api_server import ApiServer
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput, Submission
from tests.api.raw_http import RawHttpConnection
from tests.api.servers import ServerProcess
from tests.api.sse import payload, split_events

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
REJECTED = {"reason": "max_num_queued_reqs", "model_name": "fake"}


@pytest.fixture
def small_api(start_api: StartApi) -> ApiServer:
    """The API with one slot in the engine and one in the queue."""
    return start_api(concurrency_limit=1, queue_limit=1)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as workers:
        yield workers


def assert_rejected(response: httpx.Response) -> None:
    body = response.json()
    assert response.status_code == 429
    assert int(response.headers["Retry-After"]) >= 1
    assert (body["error_code"], body["error_code_str"]) == (409, "409_CONCURRENCY_LIMIT_ERROR")
    assert body["error"]["type"] == "rate_limit_error"
    assert "CONCURRENCY_LIMIT" in body["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", BODY),
        ("/v1/chat/completions", {**BODY, "stream": False}),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/", {"prompt": "Hi"}),
        ("/", {"prompt": "Hi", "yield_generator": True}),
        ("/batch_infer", {"prompt_batch": ["Hi"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-",
)
def test_a_third_sequence_is_rejected_and_the_first_two_finish(
    path: str, body: dict[str, Any], small_api: ApiServer, pool: ThreadPoolExecutor, byte_model: ByteModel
) -> None:
    responses = [pool.submit(small_api.post, path, body) for _ in range(2)]
    submissions = [small_api.engine.next_submission() for _ in responses]
    assert_rejected(small_api.post(path, body))
    for submission in submissions:
        small_api.engine.send_outputs(submission, ScriptedOutput(byte_model.tokens("done"), "length"))
    for response in responses:
        assert response.result().status_code == 200
        assert "done" in response.result().text
    assert small_api.metric("rtp_llm_admission_rejections_total", **REJECTED) == 1


def test_a_rejection_does_not_wait_for_the_body(small_api: ApiServer, byte_model: ByteModel) -> None:
    with ThreadPoolExecutor(2) as pool:
        responses = [pool.submit(small_api.post, "/v1/completions", {"prompt": "Hi"}) for _ in range(2)]
        submissions = [small_api.engine.next_submission() for _ in responses]
        with RawHttpConnection(small_api.url) as connection:
            assert connection.send("/v1/completions", b"{", content_length=1000).status() == 429
        assert small_api.post("/tokenize", {"prompt": "Hi"}).status_code == 200  # needs no slot
        labels = {"handler": "/v1/completions", "method": "POST", "status": "429"}
        assert small_api.metric("rtp_llm_http_requests_total", **labels) == 1
        for submission in submissions:
            small_api.engine.send_outputs(submission, ScriptedOutput(byte_model.tokens("done"), "length"))
        assert [response.result().status_code for response in responses] == [200] * 2


@pytest.mark.parametrize("body", [BODY, {**BODY, "stream": False}, {**BODY, "n": 2}], ids=["stream", "whole", "n=2"])
def test_a_burst_of_requests_does_not_exceed_the_slots(
    body: dict[str, Any], small_api: ApiServer, byte_model: ByteModel
) -> None:
    """Requests that arrive in one iteration of the event loop must not all get the two free slots."""
    with ExitStack() as exit_stack:
        connections = [exit_stack.enter_context(RawHttpConnection(small_api.url)) for _ in range(24)]
        small_api.wait_until(lambda: small_api.num_connections == len(connections))
        with small_api.blocked_event_loop():
            for connection in connections:
                connection.send("/v1/chat/completions", json.dumps(body).encode())
        submissions = [small_api.engine.next_submission() for _ in range(2)]
        accepted = 2 // body.get("n", 1)
        small_api.wait_until(
            lambda: small_api.metric("rtp_llm_admission_rejections_total", **REJECTED) >= 24 - accepted
        )
        for submission in submissions:
            small_api.engine.send_outputs(submission, ScriptedOutput(byte_model.tokens("done"), "length"))
        assert sorted(connection.status() for connection in connections) == [200] * accepted + [429] * (24 - accepted)
        assert small_api.engine.num_pending_submissions == 0


@pytest.mark.parametrize(
    ("settings", "headers", "status", "expected"),
    [
        ({}, {"X-Request-Id": "mine"}, 429, {"x-request-id": "mine", "retry-after": "1"}),
        ({}, {"Origin": "http://localhost:3000"}, 429, {"access-control-allow-origin": "http://localhost:3000"}),
        ({}, {"Origin": "http://evil.example"}, 403, {}),
        ({"host": "127.0.0.1"}, {"Host": "evil.example"}, 403, {}),
        ({"api_key": "alice:a"}, {"Authorization": "Bearer a"}, 429, {"retry-after": "1"}),
        ({"api_key": "alice:a"}, {"Authorization": "Bearer b"}, 401, {"www-authenticate": "Bearer"}),
    ],
    ids=["plain", "web page", "foreign page", "foreign host", "key", "wrong key"],
)
def test_a_full_server_refuses_by_the_same_rules(
    settings: dict[str, Any],
    headers: dict[str, str],
    status: int,
    expected: dict[str, str],
    start_api: StartApi,
    caplog: pytest.LogCaptureFixture,
) -> None:
    api = start_api(lambda submission: [], concurrency_limit=1, queue_limit=0, **settings)
    caplog.set_level("INFO", "rtp_llm.access")
    stream = {"prompt": "a", "stream": True}
    with api.client() as client, client.stream("POST", "/v1/completions", json=stream, headers={"x-api-key": "a"}):
        api.engine.next_submission()
        for path in ("/v1/chat/completions", "/v1/messages"):
            with api.client() as other:
                response = other.post(path, json=BODY, headers=headers)
            assert (response.status_code, expected.items() <= dict(response.headers).items()) == (status, True)
            assert ("error_code" in response.json()) == (path != "/v1/messages")
            assert response.headers["x-request-id"]
    key = "alice" if settings.get("api_key") and status == 429 else ""

    def lines() -> list[tuple[str, str]]:
        fields = [record.__dict__["fields"] for record in caplog.records if record.name == "rtp_llm.access"]
        return [(line["path"], line["key"]) for line in fields if line["status"] == status]

    api.wait_until(lambda: lines() == [("/v1/chat/completions", key), ("/v1/messages", key)])  # after the responses


def test_each_choice_needs_a_slot(small_api: ApiServer, byte_model: ByteModel) -> None:
    with small_api.open_stream("/v1/completions", {"prompt": "a", "stream": True}):
        submission = small_api.engine.next_submission()
        assert_rejected(small_api.post("/v1/chat/completions", {**BODY, "n": 2}))
        assert_rejected(small_api.post("/v1/completions", {"prompt": ["a", "b"]}))
        assert_rejected(small_api.post("/v1/completions", {"prompt": ["a"], "n": 2}))
        assert_rejected(small_api.post("/", {"prompt_batch": ["a", "b"]}))
        assert_rejected(small_api.post("/", {"prompt": ["a", "b"]}))
        assert_rejected(small_api.post("/", {"prompt": "a", "num_return_sequences": 2}))
        small_api.engine.send_outputs(submission, ScriptedOutput(byte_model.tokens("done"), "length"))
    assert small_api.engine.num_pending_submissions == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**BODY, "n": 3}),
        ("/v1/completions", {"prompt": ["a", "b", "c"]}),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2}),
        ("/", {"prompt_batch": ["a", "b", "c"]}),
        ("/", {"prompt": ["a", "b", "c"]}),
        ("/", {"prompt": "a", "num_return_sequences": 3}),
    ],
)
def test_more_sequences_than_ever_fit(path: str, body: dict[str, Any], small_api: ApiServer) -> None:
    """Such a request is told so, since it would be retried in vain."""
    response = small_api.post(path, body)
    assert response.status_code == 400
    assert "Retry-After" not in response.headers
    for substring in ("at most 2", "CONCURRENCY_LIMIT=1", "QUEUE_LIMIT=1"):
        assert substring in response.json()["message"]
    assert small_api.metric("rtp_llm_admission_rejections_total", **REJECTED) == 0


def test_slots_are_freed_after_every_outcome(small_api: ApiServer, byte_model: ByteModel) -> None:
    """All slots are free again after sequences that finish, are rejected, fail or lose their client, repeatedly."""
    small_api.engine.script = lambda submission: _script(submission, byte_model)
    for _ in range(3):
        assert small_api.post("/v1/completions", {"prompt": ["ok", "ok"]}).status_code == 200
        assert small_api.post("/v1/completions", {"prompt": ["ok", "fail"]}).status_code == 500
        assert small_api.post("/v1/completions", {"prompt": ["ok", "ok"], "logit_bias": {"9999": 1}}).status_code == 400
        assert small_api.post("/v1/completions", {"prompt": ["ok"] * 3}).status_code == 400
        assert b"[DONE]" in small_api.stream("/v1/completions", {"prompt": ["ok", "fail"], "stream": True})
        with small_api.open_stream("/v1/completions", {"prompt": ["silent", "silent"], "stream": True}):
            pass
        small_api.wait_until(lambda: small_api.get("/worker_status").json()["available_concurrency"] == 1)
        small_api.wait_until(lambda: small_api.post("/v1/completions", {"prompt": ["ok", "ok"]}).status_code == 200)


def _script(submission: Submission, model: ByteModel) -> list[ScriptedOutput]:
    text = model.tokenizer.decode(submission.prompt)
    if text == "silent":
        return []
    return (
        [ScriptedOutput([], "error", error="requested failure")]
        if text == "fail"
        else [ScriptedOutput(model.tokens("x"), "length")]
    )


def test_slots_of_sequences_that_never_start_are_released() -> None:
    """Slots are freed if the response ends before its sequences start: its first byte cannot be sent, or the client
    disconnected."""
    service: Any = SimpleNamespace(reserved_slots=0)

    async def events() -> AsyncGenerator[str]:
        yield "not read"

    async def receive_disconnect() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send_fails(message: Any) -> None:
        raise OSError("connection closed")

    async def never() -> None:
        await asyncio.Event().wait()

    scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
    with pytest.raises(ClientDisconnect):
        asyncio.run(EventStream(events(), SlotReservation(service, 2))(scope, receive_disconnect, send_fails))
    assert service.reserved_slots == 0
    with pytest.raises(ClientDisconnected):
        asyncio.run(cancel_on_disconnect(Request(scope, receive_disconnect), never(), SlotReservation(service, 3)))
    assert service.reserved_slots == 0


def test_a_real_engine_runs_one_and_queues_one(small_server: ServerProcess) -> None:
    """With a real engine: one sequence runs, one waits, the next is rejected."""
    body = {**BODY, "max_tokens": 200, "ignore_eos": True, "stream_options": {"include_usage": True}}
    for _ in range(5):  # until the third request arrives before the first two finish
        with ExitStack() as exit_stack:
            streams = []
            for _ in range(2):
                client = exit_stack.enter_context(small_server.client())
                response = exit_stack.enter_context(client.stream("POST", "/v1/chat/completions", json=body))
                streams.append(split_events(response.iter_raw()))
                next(streams[-1])  # the event with the role: the request is accepted
            rejected = exit_stack.enter_context(small_server.client()).post("/v1/chat/completions", json=body)
            events_by_stream = [[payload(event) for event in stream] for stream in streams]
        for events in events_by_stream:
            assert events[-1] == "[DONE]"
            assert events[-2]["usage"]["completion_tokens"] == 200
            assert [c["finish_reason"] for e in events[:-1] for c in e["choices"]][-1] == "length"
        if rejected.status_code == 429:
            assert_rejected(rejected)
            return
    raise AssertionError("the third request was never rejected")
