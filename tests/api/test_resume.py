"""The engine is lost between two tokens and returns: the client sees a pause, not an error."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.api.api_server import ApiServer
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput, Submission
from tests.api.sse import payloads, split_events

CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}],
    "stream": True,
    "seed": 7,
    "stream_options": {"include_usage": True},
}


def text_of(events: list[Any]) -> str:
    return "".join(c["delta"].get("content", "") for e in events if e != "[DONE]" for c in e["choices"])


def num_resumed(api: ApiServer) -> float:
    return api.metric("rtp_llm_requests_resumed_total", model_name="fake")


def restart_engine(api: ApiServer, epoch: int = 2) -> Submission:
    """Replaces the engine and returns the sequence that is submitted to the new one."""
    api.engine.close()
    api.new_engine(epoch=epoch)
    return api.engine.next_submission()


def test_a_stream_resumes_without_lost_or_repeated_text(start_api: StartApi, byte_model: ByteModel) -> None:
    """The engine is lost twice within a character."""
    api = start_api()
    tokens = byte_model.tokens("a🚀é")
    with api.open_stream("/v1/chat/completions", CHAT) as response:
        first = api.engine.next_submission()
        assert first.output == []
        api.engine.send_outputs(first, ScriptedOutput(tokens[:3]))
        stream = split_events(response.iter_raw())
        received = [next(stream), next(stream)]  # the role, and the "a" before the incomplete character
        second = restart_engine(api)
        assert second == Submission(first.id, first.prompt, tokens[:3], first.params)
        api.engine.send_outputs(second, ScriptedOutput(tokens[3:6]))
        received.append(next(stream))
        third = restart_engine(api, epoch=3)
        assert third.output == tokens[:6]
        api.engine.send_outputs(third, ScriptedOutput(tokens[6:]), ScriptedOutput([byte_model.end], "stop"))
        received += stream
    events = payloads(b"".join(received))
    assert text_of(events) == "a🚀é"
    assert events[-1] == "[DONE]"
    assert events[-2]["usage"]["completion_tokens"] == len(tokens) + 1
    assert events[-2]["usage"]["prompt_tokens"] == len(first.prompt)
    assert num_resumed(api) == 2


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/"])
def test_a_whole_response_resumes(path: str, start_api: StartApi, byte_model: ByteModel) -> None:
    api = start_api()
    body = {"messages": CHAT["messages"]} if "chat" in path else {"prompt": "Hi"}
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(api.post, path, body)
        first = api.engine.next_submission()
        api.engine.send_outputs(first, ScriptedOutput(byte_model.tokens("one ")))
        api.wait_until(lambda: api.metric("rtp_llm_generation_tokens_total", model_name="fake") == 4)
        second = restart_engine(api)
        assert second.output == byte_model.tokens("one ")
        api.engine.send_outputs(second, ScriptedOutput(byte_model.tokens("two"), "length"))
        assert "one two" in response.result().text
        assert response.result().status_code == 200


def test_sequences_accepted_without_an_engine_are_submitted_once(start_api: StartApi, byte_model: ByteModel) -> None:
    api = start_api()
    api.engine.close()
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(api.post, "/v1/completions", {"prompt": p}) for p in ("one", "two")]
        api.wait_until(lambda: api.get("/worker_status").json()["available_concurrency"] == 30)
        api.new_engine(lambda submission: [ScriptedOutput(submission.prompt, "length")])
        texts = {a.result().json()["choices"][0]["text"] for a in answers}
    assert texts == {"one", "two"}
    assert api.engine.num_pending_submissions == 2


def test_a_request_between_connection_and_ready_is_submitted_once(start_api: StartApi, byte_model: ByteModel) -> None:
    """A request that arrives between the engine's connection and its READY message is submitted once. Submitted twice,
    it would get the outputs of two sequences under one id."""
    api = start_api()
    api.engine.close()
    api.new_engine(sends_ready=False)
    api.engine.wait_for_connection()
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(api.post, "/v1/completions", {"prompt": "one"})
        api.wait_until(lambda: api.get("/worker_status").json()["available_concurrency"] == 31)
        api.engine.send_ready()
        submission = api.engine.next_submission()
        # A second request: a repeated submission of the first would arrive before it.
        second = pool.submit(lambda: None)
        second.cancel()
        with api.open_stream("/v1/completions", {"prompt": "two", "stream": True}):
            assert byte_model.tokenizer.decode(api.engine.next_submission().prompt) == "two"
        api.engine.send_outputs(submission, ScriptedOutput(byte_model.tokens("done"), "length"))
        assert response.result().json()["choices"][0]["text"] == "done"


def test_an_aborted_sequence_is_not_submitted_again(start_api: StartApi) -> None:
    api = start_api()
    with api.open_stream("/v1/chat/completions", CHAT):
        api.engine.next_submission()
        api.engine.close()
    api.wait_until(lambda: api.get("/worker_status").json()["available_concurrency"] == 32)
    api.new_engine()
    api.engine.wait_for_connection()
    with api.open_stream("/v1/completions", {"prompt": "other", "stream": True}):
        assert api.model.tokenizer.decode(api.engine.next_submission().prompt) == "other"


def test_sequences_fail_if_the_engine_does_not_return(start_api: StartApi) -> None:
    """A stream that has started ends with an error event, another response with 503."""
    api = start_api(resume_timeout=0.5)
    with ThreadPoolExecutor(1) as pool, api.open_stream("/v1/chat/completions", CHAT) as response:
        whole = pool.submit(api.post, "/v1/completions", {"prompt": "Hi"})
        for _ in range(2):
            api.engine.next_submission()
        api.engine.close()
        events = payloads(response.read())
        response = whole.result()
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) >= 1
    for error in (response.json(), events[-2]):
        assert error["error_code"] == 606
        assert "did not come back" in error["error"]["message"]
    assert events[-1] == "[DONE]"
    api.wait_until(lambda: api.get("/worker_status").json()["available_concurrency"] == 32)
    assert any("no engine for" in line for line in api.errors.lines)
    api.errors.lines.clear()  # the expected error


def test_requests_before_the_first_engine_are_rejected(start_api: StartApi) -> None:
    """Before the first engine, the maximum prompt length is unknown, so requests get 503."""
    api = start_api(sends_ready=False)
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "Hi"}), ("/", {"prompt": "Hi"})):
        response = api.post(path, body)
        assert (response.status_code, response.json()["error_code"]) == (503, 606)
        assert "loading" in response.json()["message"]
    assert api.engine.num_pending_submissions == 0
    api.engine.send_ready()


def test_the_log_counts_the_sequences_that_a_lost_engine_was_computing(
    start_api: StartApi, byte_model: ByteModel, caplog: pytest.LogCaptureFixture
) -> None:
    api = start_api()
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(api.post, "/v1/completions", {"prompt": prompt}) for prompt in ("one", "two", "three")]
        first, second, third = submissions = [api.engine.next_submission() for _ in answers]
        api.engine.send_launch(*submissions)
        api.engine.send_launch(first, second)  # the third one waits
        api.engine.send_outputs(second, ScriptedOutput(byte_model.tokens("done"), "length"))
        api.wait_until(lambda: any(answer.done() for answer in answers))
        assert restart_engine(api).id == first.id  # which runs alone first
        assert "2 sequences wait for it, 1 of them were in its last step" in caplog.text
        restart_engine(api, epoch=3)  # lost before its first step
        assert "2 sequences wait for it, 0 of them were in its last step" in caplog.text
        for submission in (first, third):
            api.engine.send_outputs(submission, ScriptedOutput(byte_model.tokens("done"), "length"))
            if submission is first:
                assert api.engine.next_submission().id == third.id
        assert {answer.result().status_code for answer in answers} == {200}
