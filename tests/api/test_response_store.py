"""Stored responses: continued, read again, generated without a client; judged by the `openai` client."""

import json
from typing import Any

import openai
import pytest

from tests.api.api_server import ApiServer
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput
from tests.api.test_messages import answering
from tests.sdk_clients import openai_client


def prompt_of(api: ApiServer, byte_model: ByteModel) -> str:
    return byte_model.tokenizer.decode(api.engine.next_submission().prompt, skip_special_tokens=False)


def test_a_response_is_continued(start_api: StartApi, byte_model: ByteModel) -> None:
    api = start_api(answering(byte_model, "b"), responses_store_mb=1)
    with openai_client(api.url) as client:
        first = client.responses.create(model="any", input="a", instructions="once")
        second = client.responses.create(model="any", input="c", previous_response_id=first.id)
        assert second.previous_response_id == first.id
        assert client.responses.retrieve(first.id).output_text == "b"
        assert [item.type for item in client.responses.input_items.list(first.id).data] == ["message"]
        api.engine.next_submission()
        assert prompt_of(api, byte_model) == "<|turn|>user:a<|turn|>assistant:b<|turn|>user:c<|turn|>assistant:"
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)


def test_nothing_is_stored_by_default(start_api: StartApi, byte_model: ByteModel) -> None:
    api = start_api(answering(byte_model, "b"))
    with openai_client(api.url) as client:
        response = client.responses.create(model="any", input="a")
        for request in (
            lambda: client.responses.create(model="any", input="c", previous_response_id=response.id),
            lambda: client.responses.create(model="any", input="c", background=True),
        ):
            with pytest.raises(openai.BadRequestError, match="RESPONSES_STORE_MB"):
                request()
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)


def test_store_false(start_api: StartApi, byte_model: ByteModel) -> None:
    with openai_client(start_api(answering(byte_model, "b"), responses_store_mb=1).url) as client:
        response = client.responses.create(model="any", input="a", store=False)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)


def test_a_response_belongs_to_its_key(start_api: StartApi, byte_model: ByteModel) -> None:
    api = start_api(answering(byte_model, "b"), responses_store_mb=1, api_key="ann:1,bob:2")
    with openai_client(api.url) as client:
        ann, bob = client.with_options(api_key="1"), client.with_options(api_key="2")
        response = ann.responses.create(model="any", input="a")
        assert ann.responses.retrieve(response.id).id == response.id
        for request in (bob.responses.retrieve, bob.responses.delete, bob.responses.cancel):
            with pytest.raises(openai.NotFoundError):
                request(response.id)
        with pytest.raises(openai.NotFoundError):
            bob.responses.create(model="any", input="c", previous_response_id=response.id)


def test_a_background_response_goes_on_without_its_client(start_api: StartApi, byte_model: ByteModel) -> None:
    api = start_api(responses_store_mb=1)
    body = {"model": "any", "input": "a", "background": True, "stream": True}
    with api.open_stream("/v1/responses", body) as response:
        submission = api.engine.next_submission()
        chunks = response.iter_raw()
        event = next(chunks).decode().partition("\n")
        assert event[0] == "event: response.created"
        response_id = json.loads(event[2].partition("\n")[0].removeprefix("data: "))["response"]["id"]
    with openai_client(api.url) as client:
        api.engine.send_outputs(submission, ScriptedOutput(byte_model.tokens("bc")))
        api.engine.send_outputs(submission, ScriptedOutput(byte_model.tokens("d"), "length"))
        again = list(client.responses.retrieve(response_id, stream=True, starting_after=0))
        assert again[0].sequence_number == 1
        assert again[-1].type == "response.incomplete"
        assert again[-1].response.output_text == "bcd"
        assert api.engine.num_pending_aborts == 0
        assert client.responses.retrieve(response_id).status == "incomplete"


def test_a_background_response_is_cancelled(start_api: StartApi, byte_model: ByteModel) -> None:
    api = start_api(responses_store_mb=1)
    with openai_client(api.url) as client:
        response = client.responses.create(model="any", input="a", background=True)
        assert response.status == "in_progress"
        submission = api.engine.next_submission()
        assert client.responses.cancel(response.id).status == "cancelled"
        assert api.engine.next_abort() == submission.id


def test_old_responses_give_way(start_api: StartApi, byte_model: ByteModel) -> None:
    long_text: Any = "x" * 1500
    with openai_client(start_api(answering(byte_model, "b"), responses_store_mb=1).url) as client:
        ids = [client.responses.create(model="any", input=long_text).id for _ in range(300)]
        assert client.responses.retrieve(ids[-1]).id == ids[-1]
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(ids[0])


def test_only_a_whole_response_is_continued(start_api: StartApi, byte_model: ByteModel) -> None:
    api = start_api(responses_store_mb=1)
    with openai_client(api.url) as client:
        response = client.responses.create(model="any", input="a", background=True)
        for _ in range(2):  # while it runs, and after it was cancelled
            with pytest.raises(openai.BadRequestError, match="previous_response_id"):
                client.responses.create(model="any", input="c", previous_response_id=response.id)
            client.responses.cancel(response.id)
        api.engine.next_abort()


def test_a_stream_is_stored_before_its_last_event(start_api: StartApi, byte_model: ByteModel) -> None:
    with openai_client(start_api(answering(byte_model, "b"), responses_store_mb=1).url) as client:
        for event in client.responses.create(model="any", input="a", stream=True):
            if event.type == "response.completed":
                assert client.responses.retrieve(event.response.id).status == "completed"


def test_what_a_stream_with_another_ending_generated_is_not_stored(start_api: StartApi, byte_model: ByteModel) -> None:
    outputs = [ScriptedOutput(byte_model.tokens("a")), ScriptedOutput([], "error", error="broken")]
    with openai_client(start_api(lambda _: outputs, responses_store_mb=1).url) as client:
        last = list(client.responses.create(model="any", input="a", stream=True))[-1]
        assert last.type == "response.failed"
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(last.response.id)
