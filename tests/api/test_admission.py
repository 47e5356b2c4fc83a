"""The bounded queue: what fits is served, what does not is told so at once, and room that is free again is used."""

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

from rtp_llm.api.service import SlotReservation
from rtp_llm.api.stream import ClientDisconnected, EventStream, cancel_on_disconnect
from tests.api.api_server import ApiServer
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput, Submission
from tests.api.raw_http import RawHttpConnection
from tests.api.servers import ServerProcess
from tests.api.sse import frames, payload

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
REJECTED = {"reason": "max_num_queued_reqs", "model_name": "fake"}


@pytest.fixture
def narrow(start_api: StartApi) -> ApiServer:
    """One sequence in the engine, one in the queue."""
    return start_api(concurrency_limit=1, queue_limit=1)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as workers:
        yield workers


def assert_refused(answer: httpx.Response) -> None:
    body = answer.json()
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) >= 1
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
def test_the_third_is_refused_and_the_first_two_finish(
    path: str, body: dict[str, Any], narrow: ApiServer, pool: ThreadPoolExecutor, byte_model: ByteModel
) -> None:
    answers = [pool.submit(narrow.post, path, body) for _ in range(2)]
    taken = [narrow.engine.next_submission() for _ in answers]
    assert_refused(narrow.post(path, body))
    for submission in taken:
        narrow.engine.send_outputs(submission, ScriptedOutput(byte_model.tokens("done"), "length"))
    for answer in answers:
        assert answer.result().status_code == 200
        assert "done" in answer.result().text
    assert narrow.metric("rtp_llm_admission_rejections_total", **REJECTED) == 1


@pytest.mark.parametrize("body", [BODY, {**BODY, "stream": False}, {**BODY, "n": 2}], ids=["stream", "whole", "n=2"])
def test_a_burst_is_bounded(body: dict[str, Any], narrow: ApiServer, byte_model: ByteModel) -> None:
    """Requests that arrive in one instant must not all see the room that only two sequences have."""
    with ExitStack() as opened:
        lines = [opened.enter_context(RawHttpConnection(narrow.url)) for _ in range(24)]
        narrow.wait_until(lambda: narrow.num_connections == len(lines))
        with narrow.blocked_event_loop():
            for line in lines:
                line.send("/v1/chat/completions", json.dumps(body).encode())
        taken = [narrow.engine.next_submission() for _ in range(2)]
        accepted = 2 // body.get("n", 1)
        narrow.wait_until(lambda: narrow.metric("rtp_llm_admission_rejections_total", **REJECTED) >= 24 - accepted)
        for submission in taken:
            narrow.engine.send_outputs(submission, ScriptedOutput(byte_model.tokens("done"), "length"))
        assert sorted(line.status() for line in lines) == [200] * accepted + [429] * (24 - accepted)
        assert narrow.engine.num_pending_submissions == 0


def test_each_choice_takes_its_place(narrow: ApiServer, byte_model: ByteModel) -> None:
    assert_refused(narrow.post("/v1/chat/completions", {**BODY, "n": 3}))
    assert_refused(narrow.post("/v1/completions", {"prompt": ["a", "b", "c"]}))
    assert_refused(narrow.post("/v1/completions", {"prompt": ["a", "b"], "n": 2}))
    assert_refused(narrow.post("/", {"prompt_batch": ["a", "b", "c"]}))
    assert_refused(narrow.post("/", {"prompt": "a", "num_return_sequences": 3}))
    assert narrow.engine.num_pending_submissions == 0


def test_room_comes_back(narrow: ApiServer, byte_model: ByteModel) -> None:
    """After an end, a refusal, an error and a hang-up, however often."""
    narrow.engine.script = lambda submission: _end(submission, byte_model)
    for _ in range(3):
        assert narrow.post("/v1/completions", {"prompt": ["ok", "ok"]}).status_code == 200
        assert narrow.post("/v1/completions", {"prompt": ["ok", "fail"]}).status_code == 500
        assert narrow.post("/v1/completions", {"prompt": ["ok", "ok"], "logit_bias": {"9999": 1}}).status_code == 400
        assert narrow.post("/v1/completions", {"prompt": ["ok"] * 3}).status_code == 429
        assert b"[DONE]" in narrow.stream("/v1/completions", {"prompt": ["ok", "fail"], "stream": True})
        with narrow.open_stream("/v1/completions", {"prompt": ["silent", "silent"], "stream": True}):
            pass
        narrow.wait_until(lambda: narrow.get("/worker_status").json()["available_concurrency"] == 1)
        narrow.wait_until(lambda: narrow.post("/v1/completions", {"prompt": ["ok", "ok"]}).status_code == 200)


def _end(submission: Submission, model: ByteModel) -> list[ScriptedOutput]:
    text = model.tokenizer.decode(submission.prompt)
    if text == "silent":
        return []
    return (
        [ScriptedOutput([], "error", error="as asked")]
        if text == "fail"
        else [ScriptedOutput(model.tokens("x"), "length")]
    )


def test_places_that_no_sequence_took_come_back() -> None:
    """Where the answer ends before its sequences have begun: the first byte cannot be sent, or nobody waits for it."""
    service: Any = SimpleNamespace(reserved_slots=0)

    async def events() -> AsyncGenerator[str]:
        yield "never asked for"

    async def hang_up() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def fail(message: Any) -> None:
        raise OSError("nobody is there")

    async def never() -> None:
        await asyncio.Event().wait()

    scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
    with pytest.raises(ClientDisconnect):
        asyncio.run(EventStream(events(), SlotReservation(service, 2))(scope, hang_up, fail))
    assert service.reserved_slots == 0
    with pytest.raises(ClientDisconnected):
        asyncio.run(cancel_on_disconnect(Request(scope, hang_up), never(), SlotReservation(service, 3)))
    assert service.reserved_slots == 0


def test_a_real_engine_runs_one_and_queues_one(small_server: ServerProcess) -> None:
    """As above, with nothing played."""
    long = {**BODY, "max_tokens": 200, "ignore_eos": True, "stream_options": {"include_usage": True}}
    for _ in range(5):  # until the first two were still at work when the third came
        with ExitStack() as opened:
            streams = []
            for _ in range(2):
                client = opened.enter_context(small_server.client())
                answer = opened.enter_context(client.stream("POST", "/v1/chat/completions", json=long))
                streams.append(frames(answer.iter_raw()))
                next(streams[-1])  # the role: it is accepted
            third = opened.enter_context(small_server.client()).post("/v1/chat/completions", json=long)
            read = [[payload(frame) for frame in stream] for stream in streams]
        for events in read:
            assert events[-1] == "[DONE]"
            assert events[-2]["usage"]["completion_tokens"] == 200
            assert [c["finish_reason"] for e in events[:-1] for c in e["choices"]][-1] == "length"
        if third.status_code == 429:
            assert_refused(third)
            return
    raise AssertionError("the third was never refused")
