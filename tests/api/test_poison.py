"""A request that makes the engine crash ends alone, with an error that clients do not retry; the others continue."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from rtp_llm.api.client import MAX_UNREAD_OUTPUTS, EngineClient
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.metrics import Metrics
from tests.api.api_server import ApiServer
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import FakeEngine, ScriptedOutput, Submission
from tests.sdk_clients import openai_client


def prompt_of(api: ApiServer, submission: Submission) -> str:
    return api.model.tokenizer.decode(submission.prompt)


def crash(api: ApiServer, *launched: Submission, epoch: int) -> None:
    """Ends the engine in a step with these sequences, and starts the next one."""
    api.engine.send_launch(*launched)
    api.engine.close()
    api.new_engine(epoch=epoch)


def crash_with_poison(api: ApiServer, innocent: Submission, tokens: list[int]) -> None:
    """Crashes in a step with the innocent sequence and the poison, and in two with the poison alone."""
    poison = api.engine.next_submission()
    assert prompt_of(api, poison) == "poison"
    crash(api, innocent, poison, epoch=2)
    for epoch in (3, 4):
        alone = api.engine.next_submission()
        assert alone.id == poison.id
        crash(api, alone, epoch=epoch)
    again = api.engine.next_submission()
    assert (again.id, again.output) == (innocent.id, tokens)


def start_innocent(api: ApiServer, pool: ThreadPoolExecutor, tokens: list[int]) -> tuple[Any, Submission]:
    """Starts a request that has got `tokens`. Returns (future response, submission)."""
    response = pool.submit(api.post, "/v1/completions", {"prompt": "innocent"})
    submission = api.engine.next_submission()
    api.engine.send_outputs(submission, ScriptedOutput(tokens))
    api.wait_until(lambda: api.metric("rtp_llm_generation_tokens_total", model_name="fake") == len(tokens))
    return response, submission


def finish(api: ApiServer, response: Any, submission: Submission, tokens: list[int]) -> None:
    api.engine.send_outputs(submission, ScriptedOutput(tokens, "length"))
    assert response.result().json()["choices"][0]["text"] == "one two"


def verdicts(api: ApiServer) -> dict[str, str]:
    loaded: dict[str, str] = json.loads(api.part_spec.verdicts_path.read_text())
    return loaded


def clear_expected_errors(api: ApiServer) -> None:
    assert "was alone in a failed step" in api.errors.lines.pop()
    assert not api.errors.lines


@pytest.mark.parametrize("streamed", [False, True])
def test_the_sdk_sends_a_poison_request_once(start_api: StartApi, byte_model: ByteModel, streamed: bool) -> None:
    api = start_api()
    tokens = byte_model.tokens("one ")
    with ThreadPoolExecutor(2) as pool:
        response, innocent = start_innocent(api, pool, tokens)

        def send_poison() -> openai.APIError:
            with (
                openai_client(api.url, max_retries=openai.DEFAULT_MAX_RETRIES) as client,
                pytest.raises(openai.APIError) as error,
            ):
                list(client.completions.create(model="fake", prompt="poison", stream=streamed))
            return error.value

        poison = pool.submit(send_poison)
        crash_with_poison(api, innocent, tokens)
        error = poison.result()
        if not streamed:
            assert isinstance(error, openai.InternalServerError)
            assert (error.status_code, error.response.headers["x-should-retry"]) == (500, "false")
        assert "the engine crashes when it computes this request" in str(error)
        assert verdicts(api) == dict.fromkeys("123", "investigating")
        finish(api, response, innocent, byte_model.tokens("two"))
        assert verdicts(api) == dict.fromkeys("123", "request")
        assert api.engine.num_pending_submissions == 0
        assert api.metric("rtp_llm_poison_requests_total", model_name="fake") == 1
    clear_expected_errors(api)


def test_a_poison_request_that_comes_again_does_not_reach_the_engine(
    start_api: StartApi, byte_model: ByteModel
) -> None:
    api = start_api()
    tokens = byte_model.tokens("one ")
    with ThreadPoolExecutor(2) as pool:
        response, innocent = start_innocent(api, pool, tokens)
        poison = pool.submit(api.post, "/v1/completions", {"prompt": "poison"})
        crash_with_poison(api, innocent, tokens)
        finish(api, response, innocent, byte_model.tokens("two"))
        for answer in (poison.result(), api.post("/v1/completions", {"prompt": "poison"})):
            assert (answer.status_code, answer.json()["error_code"]) == (500, 606)
            assert answer.headers["x-should-retry"] == "false"
        assert api.engine.num_pending_submissions == 0
    clear_expected_errors(api)


def test_a_cleared_sequence_is_held_while_the_next_is_tried(start_api: StartApi, byte_model: ByteModel) -> None:
    """Tokens that arrive after a sequence was withdrawn are computed again, not lost and not doubled."""
    api = start_api()
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(api.post, "/v1/completions", {"prompt": "any"}) for _ in range(2)]
        crash(api, api.engine.next_submission(), api.engine.next_submission(), epoch=2)
        first = api.engine.next_submission()
        for letter in "ab":
            api.engine.send_outputs(first, ScriptedOutput(byte_model.tokens(letter)))
        assert api.engine.next_abort() == first.id
        second = api.engine.next_submission()
        api.engine.send_outputs(first, ScriptedOutput(byte_model.tokens("c")))  # it was computed before the abort
        api.engine.send_outputs(second, ScriptedOutput(byte_model.tokens("abcd"), "length"))
        again = api.engine.next_submission()
        assert (again.prompt, again.output) == (first.prompt, byte_model.tokens("ab"))
        api.engine.send_outputs(again, ScriptedOutput(byte_model.tokens("cd"), "length"))
        assert [answer.result().json()["choices"][0]["text"] for answer in answers] == ["abcd"] * 2
    assert verdicts(api) == {"1": "engine"}


def test_a_sequence_is_held_until_its_reader_has_caught_up(tmp_path: Path, byte_model: ByteModel) -> None:
    """A reader that stops costs a bounded number of outputs, and no KV blocks."""
    engine = FakeEngine(tmp_path / "engine")
    client = EngineClient([tmp_path / "engine"], Metrics("fake", 2048), 60, tmp_path / "verdicts.json")
    letters = [byte_model.tokens("x")] * MAX_UNREAD_OUTPUTS

    async def read() -> int:
        client.start()
        while not client.is_connected:
            await asyncio.sleep(0.01)
        outputs = client.generate("slow", [1], SamplingParams(max_tokens=2000))
        first_output = asyncio.ensure_future(anext(outputs))
        submission = await asyncio.to_thread(engine.next_submission)
        engine.send_outputs(submission, ScriptedOutput(byte_model.tokens("x")))
        received = len((await first_output).tokens)
        engine.send_outputs(submission, *(ScriptedOutput(letter) for letter in letters))
        assert await asyncio.to_thread(engine.next_abort) == submission.id
        engine.send_outputs(submission, ScriptedOutput(byte_model.tokens("x")))  # it was computed before the abort
        async for output in outputs:
            received += len(output.tokens)
            if engine.num_pending_submissions:
                again = engine.next_submission()
                assert len(again.output) == 1 + MAX_UNREAD_OUTPUTS
                engine.send_outputs(again, ScriptedOutput(byte_model.tokens("y"), "length"))
            await asyncio.sleep(0.001)
        await client.stop()
        return received

    try:
        assert asyncio.run(read()) == 1 + MAX_UNREAD_OUTPUTS + 1
    finally:
        engine.close()
