"""The engine is lost between two tokens and comes back: the client sees a pause, not an error."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rtp_llm.api.client import MAX_ENGINE_LOSSES
from tests.api.api_server import ApiServer
from tests.api.byte_model import ByteModel
from tests.api.conftest import Stacks
from tests.api.fake_engine import ScriptedOutput, Submission
from tests.api.sse import frames, payloads

CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}],
    "stream": True,
    "seed": 7,
    "stream_options": {"include_usage": True},
}


def text_of(events: list[Any]) -> str:
    return "".join(c["delta"].get("content", "") for e in events if e != "[DONE]" for c in e["choices"])


def resumed(stack: ApiServer) -> float:
    return stack.metric("rtp_llm_requests_resumed_total", model_name="fake")


def begin_again(stack: ApiServer, epoch: int = 2) -> Submission:
    """A new engine, and the one sequence that it is given."""
    stack.engine.close()
    stack.new_engine(epoch=epoch)
    return stack.engine.take()


def test_a_stream_goes_on_where_it_was(stacks: Stacks, byte_model: ByteModel) -> None:
    """Lost in the middle of a character, twice: neither a byte too few nor one too many."""
    stack = stacks()
    tokens = byte_model.tokens("a🚀é")
    with stack.open_stream("/v1/chat/completions", CHAT) as response:
        first = stack.engine.take()
        assert first.output == []
        stack.engine.send_outputs(first, ScriptedOutput(tokens[:3]))
        stream = frames(response.iter_raw())
        read = [next(stream), next(stream)]  # the role, and the "a" before the half character
        second = begin_again(stack)
        assert second == Submission(first.id, first.prompt, tokens[:3], first.params)
        stack.engine.send_outputs(second, ScriptedOutput(tokens[3:6]))
        read.append(next(stream))
        third = begin_again(stack, epoch=3)
        assert third.output == tokens[:6]
        stack.engine.send_outputs(third, ScriptedOutput(tokens[6:]), ScriptedOutput([byte_model.end], "stop"))
        read += stream
    events = payloads(b"".join(read))
    assert text_of(events) == "a🚀é"
    assert events[-1] == "[DONE]"
    assert events[-2]["usage"]["completion_tokens"] == len(tokens) + 1
    assert events[-2]["usage"]["prompt_tokens"] == len(first.prompt)
    assert resumed(stack) == 2


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/"])
def test_a_whole_answer_goes_on(path: str, stacks: Stacks, byte_model: ByteModel) -> None:
    stack = stacks()
    body = {"messages": CHAT["messages"]} if "chat" in path else {"prompt": "Hi"}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stack.post, path, body)
        first = stack.engine.take()
        stack.engine.send_outputs(first, ScriptedOutput(byte_model.tokens("one ")))
        stack.until(lambda: stack.metric("rtp_llm_generation_tokens_total", model_name="fake") == 4)
        second = begin_again(stack)
        assert second.output == byte_model.tokens("one ")
        stack.engine.send_outputs(second, ScriptedOutput(byte_model.tokens("two"), "length"))
        assert "one two" in answer.result().text
        assert answer.result().status_code == 200


def test_sequences_wait_for_an_engine_that_is_away(stacks: Stacks, byte_model: ByteModel) -> None:
    """Accepted while there is none, and submitted once."""
    stack = stacks()
    stack.engine.close()
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(stack.post, "/v1/completions", {"prompt": p}) for p in ("one", "two")]
        stack.until(lambda: stack.get("/worker_status").json()["available_concurrency"] == 30)
        stack.new_engine(lambda submission: [ScriptedOutput(submission.prompt, "length")])
        texts = {a.result().json()["choices"][0]["text"] for a in answers}
    assert texts == {"one", "two"}
    assert stack.engine.num_unread == 2


def test_a_request_between_connection_and_greeting_is_submitted_once(stacks: Stacks, byte_model: ByteModel) -> None:
    """Twice under one id, and the engine would compute it twice and hand out both streams as one."""
    stack = stacks()
    stack.engine.close()
    stack.new_engine(greets=False)
    stack.engine.wait_for_connection()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stack.post, "/v1/completions", {"prompt": "one"})
        stack.until(lambda: stack.get("/worker_status").json()["available_concurrency"] == 31)
        stack.engine.greet()
        submission = stack.engine.take()
        # One more behind it: had the first been sent twice, it would have come in between.
        second = pool.submit(lambda: None)
        second.cancel()
        with stack.open_stream("/v1/completions", {"prompt": "two", "stream": True}):
            assert byte_model.tokenizer.decode(stack.engine.take().prompt) == "two"
        stack.engine.send_outputs(submission, ScriptedOutput(byte_model.tokens("done"), "length"))
        assert answer.result().json()["choices"][0]["text"] == "done"


def test_an_aborted_sequence_is_not_submitted_again(stacks: Stacks) -> None:
    stack = stacks()
    with stack.open_stream("/v1/chat/completions", CHAT):
        stack.engine.take()
        stack.engine.close()
    stack.until(lambda: stack.get("/worker_status").json()["available_concurrency"] == 32)
    stack.new_engine()
    stack.engine.wait_for_connection()
    with stack.open_stream("/v1/completions", {"prompt": "other", "stream": True}):
        assert stack.model.tokenizer.decode(stack.engine.take().prompt) == "other"


def test_an_engine_that_does_not_come_back_ends_all(stacks: Stacks) -> None:
    """A stream that has begun ends with an error event, an answer that has not with 503."""
    stack = stacks(resume_timeout=0.5)
    with ThreadPoolExecutor(1) as pool, stack.open_stream("/v1/chat/completions", CHAT) as response:
        whole = pool.submit(stack.post, "/v1/completions", {"prompt": "Hi"})
        for _ in range(2):
            stack.engine.take()
        stack.engine.close()
        events = payloads(response.read())
        answer = whole.result()
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    for error in (answer.json(), events[-2]):
        assert error["error_code"] == 606
        assert "did not come back" in error["error"]["message"]
    assert events[-1] == "[DONE]"
    stack.until(lambda: stack.get("/worker_status").json()["available_concurrency"] == 32)
    assert any("no engine for" in line for line in stack.errors.lines)
    stack.errors.lines.clear()  # the one error that belongs here


def test_before_the_first_engine_requests_are_refused(stacks: Stacks) -> None:
    """There is no telling when it will come, nor how long a prompt it takes."""
    stack = stacks(greets=False)
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "Hi"}), ("/", {"prompt": "Hi"})):
        answer = stack.post(path, body)
        assert (answer.status_code, answer.json()["error_code"]) == (503, 606)
        assert "loading" in answer.json()["message"]
    assert stack.engine.num_unread == 0
    stack.engine.greet()


def test_a_sequence_that_ends_every_engine_is_given_up(stacks: Stacks, byte_model: ByteModel) -> None:
    """It may be what kills them. Others that came later go on."""
    stack = stacks()
    with ThreadPoolExecutor(2) as pool:
        poison = pool.submit(stack.post, "/v1/completions", {"prompt": "poison"})
        submission = stack.engine.take()
        for epoch in range(2, 2 + MAX_ENGINE_LOSSES - 1):
            assert begin_again(stack, epoch).id == submission.id
        other = pool.submit(stack.post, "/v1/completions", {"prompt": "other"})
        stack.engine.take()
        last = begin_again(stack, 9)
        assert byte_model.tokenizer.decode(last.prompt) == "other"
        stack.engine.send_outputs(last, ScriptedOutput(byte_model.tokens("done"), "length"))
        assert other.result().json()["choices"][0]["text"] == "done"
        assert (poison.result().status_code, poison.result().json()["error_code"]) == (503, 606)
        assert "times" in poison.result().json()["message"]
