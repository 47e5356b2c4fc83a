"""Client disconnects: the sequences are aborted in every state, and their slots are freed."""

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from rtp_llm.contract.engine_output import EngineOutput
from tests.api.api_server import ApiServer
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput, Submission
from tests.api.raw_http import RawHttpConnection
from tests.api.servers import ServerProcess
from tests.api.sse import split_events
from tests.quick import slow_except

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
STREAMS: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/chat/completions", {**CHAT, "stream": True}, 1),
    ("/v1/chat/completions", {**CHAT, "stream": True, "n": 3}, 3),
    ("/v1/completions", {"prompt": "Hi", "stream": True}, 1),
    ("/v1/completions", {"prompt": ["Hi", "Ho"], "stream": True}, 2),
    ("/v1/responses", {"input": "Hi", "stream": True}, 1),
    ("/v1/messages", {**CHAT, "max_tokens": 9, "stream": True}, 1),
    ("/", {"prompt": "Hi", "yield_generator": True}, 1),
    ("/", {"prompt_batch": ["Hi", "Ho"], "stream": True}, 2),
]
WHOLES: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/chat/completions", CHAT, 1),
    ("/v1/chat/completions", {**CHAT, "n": 3}, 3),
    ("/v1/completions", {"prompt": "Hi"}, 1),
    ("/v1/responses", {"input": "Hi"}, 1),
    ("/v1/messages", {**CHAT, "max_tokens": 9}, 1),
    ("/", {"prompt": "Hi"}, 1),
    ("/batch_infer", {"prompt_batch": ["Hi", "Ho"]}, 2),
]


def assert_all_aborted(api: ApiServer, submissions: list[Submission]) -> None:
    assert {api.engine.next_abort() for _ in submissions} == {s.id for s in submissions}
    aborted = {"finished_reason": "abort", "model_name": "fake"}
    api.wait_until(lambda: api.metric("rtp_llm_request_success_total", **aborted) == len(submissions))
    api.wait_until(lambda: api.metric("rtp_llm_http_requests_active") == 0)
    limit = api.part_spec.config.concurrency_limit
    assert api.get("/worker_status").json()["available_concurrency"] == limit


@pytest.mark.parametrize(("path", "body", "count"), STREAMS)
@pytest.mark.parametrize("after_text", [True, False], ids=["after text", "before text"])
def test_disconnect_during_a_stream_aborts_its_sequences(
    path: str, body: dict[str, Any], count: int, after_text: bool, start_api: StartApi
) -> None:
    """The client disconnects before any text: the server must listen for that, since it writes nothing yet."""
    api = start_api()
    with api.open_stream(path, body) as response:
        submissions = [api.engine.next_submission() for _ in range(count)]
        if after_text:
            api.engine.send_frame(*(EngineOutput(s.id, tokens=api.model.tokens("some text")) for s in submissions))
            stream = split_events(response.iter_raw())
            while b"some text" not in next(stream):
                pass
    assert_all_aborted(api, submissions)


@pytest.mark.parametrize(("path", "body", "count"), WHOLES)
def test_disconnect_before_a_whole_response_aborts_its_sequences(
    path: str, body: dict[str, Any], count: int, start_api: StartApi
) -> None:
    api = start_api()
    with RawHttpConnection(api.url).send(path, json.dumps(body).encode()):
        submissions = [api.engine.next_submission() for _ in range(count)]
        api.engine.send_frame(EngineOutput(submissions[0].id, tokens=api.model.tokens("some text")))
    assert_all_aborted(api, submissions)


@pytest.mark.parametrize(("path", "body", "count"), slow_except([*STREAMS, *WHOLES], *STREAMS[::3], *WHOLES[::3]))
def test_disconnect_before_the_sequences_start(
    path: str, body: dict[str, Any], count: int, start_api: StartApi
) -> None:
    """The client disconnects while its long prompt is encoded. Sequences that never start must not keep their slots,
    which ApiServer checks at its end.
    """
    api = start_api()
    api.engine.close()
    api.new_engine(max_seq_len=100_000)
    api.wait_until(lambda: api.get("/v1/models").json()["data"][0]["max_model_len"] == 100_000)
    body_bytes = json.dumps(body).replace('"Hi"', f'"{"x" * 20_000}"').encode()
    for _ in range(3):
        with RawHttpConnection(api.url) as connection:
            api.wait_until(lambda: api.num_connections == 1)
            with api.blocked_event_loop():
                connection.send(path, body_bytes).close()
        api.wait_until(lambda: api.num_connections == 0)
    assert api.metric("rtp_llm_http_requests_total", method="POST", handler=path, status="500") == 0


def test_disconnect_of_a_client_that_does_not_read(start_api: StartApi) -> None:
    """The client disconnects while the server waits for space in the socket's buffer, not for the engine."""
    api = start_api()
    with RawHttpConnection(api.url).send("/", json.dumps({"prompt": "Hi", "yield_generator": True}).encode()):
        submissions = api.engine.next_submission()
        for _ in range(400):  # each event repeats the text so far: some 40 MB
            api.engine.send_frame(EngineOutput(submissions.id, tokens=api.model.tokens("x" * 500)))
    assert_all_aborted(api, [submissions])


def test_disconnect_of_one_client_does_not_abort_another(start_api: StartApi) -> None:
    api = start_api()
    with api.open_stream(*STREAMS[0][:2]) as kept:
        first = api.engine.next_submission()
        with api.open_stream(*STREAMS[0][:2]):
            second = api.engine.next_submission()
        assert api.engine.next_abort() == second.id
        api.engine.send_outputs(first, ScriptedOutput(api.model.tokens("whole"), "length"))
        assert b"whole" in kept.read()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/", "/tokenize", "/set_log_level"])
def test_disconnect_within_the_body_is_not_an_error(path: str, start_api: StartApi) -> None:
    """A client that disconnects within its body causes no error in the server's log and no 500 in the metrics."""
    api = start_api()
    RawHttpConnection(api.url).send(path, b'{"prompt": "half', content_length=1000).close()
    labels = {"method": "POST", "handler": path}
    api.wait_until(lambda: api.metric("rtp_llm_http_request_duration_seconds_count", **labels) == 1)
    assert api.metric("rtp_llm_http_requests_total", status="500", **labels) == 0


def test_a_matched_stop_string_ends_the_sequence_in_the_engine(start_api: StartApi, byte_model: ByteModel) -> None:
    """The API must abort the sequence: the engine does not see the text, so it would continue."""
    api = start_api(lambda submission: [ScriptedOutput(byte_model.tokens("one END two"))])
    response = api.post("/v1/completions", {"prompt": "Hi", "stop": "END"})
    assert response.json()["choices"][0] == {"index": 0, "text": "one ", "logprobs": None, "finish_reason": "stop"}
    assert api.engine.next_abort() == api.engine.next_submission().id
    stopped = {"finished_reason": "stop", "model_name": "fake"}
    assert api.metric("rtp_llm_request_success_total", **stopped) == 1


# The real engine


@pytest.fixture
def wait_until_idle(http: httpx.Client) -> Callable[[], None]:
    """Returns a function that waits until no sequence runs and no KV block is in use."""

    def wait() -> None:
        values: dict[str, float] = {}
        for _ in range(300):
            lines = [
                connection.rsplit(" ", 1)
                for connection in http.get("/metrics").text.splitlines()
                if not connection.startswith("#")
            ]
            values = {name.split("{")[0]: float(value) for name, value in lines}
            gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "kv_cache_used_tokens")
            if not any(values[f"rtp_llm_{name}"] for name in gauges):
                return
            time.sleep(0.05)
        raise AssertionError(values)

    return wait


def tokens_generated(http: httpx.Client) -> float:
    text = http.get("/metrics").text
    return float(
        next(
            connection for connection in text.splitlines() if connection.startswith("rtp_llm_generation_tokens_total")
        ).split()[1]
    )


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_the_engine_stops_and_frees_its_blocks(
    stream: bool, server: ServerProcess, http: httpx.Client, wait_until_idle: Callable[[], None]
) -> None:
    wait_until_idle()
    before = tokens_generated(http)
    body = {**CHAT, "max_tokens": 1900, "ignore_eos": True, "stream": stream, "n": 8}
    with RawHttpConnection(server.url).send("/v1/chat/completions", json.dumps(body).encode()):
        for _ in range(200):
            if tokens_generated(http) - before > 8 * 20:
                break
            time.sleep(0.02)
    wait_until_idle()
    assert 8 * 20 < tokens_generated(http) - before < 8 * 1900
    assert http.get("/worker_status").json()["available_concurrency"] == 32
