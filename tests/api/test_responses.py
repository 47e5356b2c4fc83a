"""The Responses API, judged by the `openai` client; the engine is a script over single-byte tokens."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput
from tests.api.test_messages import answering
from tests.sdk_clients import openai_client


@pytest.fixture
def client(start_api: StartApi, byte_model: ByteModel) -> Iterator[openai.OpenAI]:
    with openai_client(start_api(answering(byte_model, "Grüße")).url) as client:
        yield client


def test_a_response(client: openai.OpenAI) -> None:
    tools: list[Any] = [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}]
    response = client.responses.create(model="any", input="Hi", metadata={"a": "b"}, tools=tools)
    assert (response.status, response.output_text, response.error) == ("completed", "Grüße", None)
    assert (response.metadata, response.tool_choice, response.parallel_tool_calls) == ({"a": "b"}, "auto", True)
    assert [tool.model_dump()["name"] for tool in response.tools] == ["f"]
    assert response.usage
    assert response.usage.input_tokens == len("user:Hiassistant:") + 2
    assert response.usage.output_tokens == len("Grüße".encode()) + 1


def test_a_stream_gives_the_same_response(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="any", input="Hi")
    with client.responses.stream(model="any", input="Hi") as stream:
        events = list(stream)
        streamed = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    types = [event.type for event in events]
    assert types[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert types[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Grüße"
    assert streamed.output_text == whole.output_text
    assert streamed.usage == whole.usage


def test_the_length_limit(start_api: StartApi, byte_model: ByteModel) -> None:
    with openai_client(start_api(answering(byte_model, "abc", finish="length")).url) as client:
        response = client.responses.create(model="any", input="Hi", max_output_tokens=16)
    assert response.status == "incomplete"
    assert response.incomplete_details
    assert response.incomplete_details.reason == "max_output_tokens"


def test_input_items_become_turns(start_api: StartApi, byte_model: ByteModel) -> None:
    api = start_api(answering(byte_model, "x"))
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "a"}]},
        {"role": "user", "content": "b"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "d"},
        {"type": "web_search_call", "id": "2", "status": "completed"},
    ]
    tools = [{"type": "web_search"}, {"type": "local_shell"}]
    api.post("/v1/responses", {"model": "any", "input": items, "instructions": "Be brief.", "tools": tools})
    prompt = byte_model.tokenizer.decode(api.engine.next_submission().prompt, skip_special_tokens=False)
    assert prompt.endswith("<|turn|>user:b<|turn|>assistant:c<|turn|>tool:d<|turn|>assistant:")
    assert "Be brief." in prompt


def test_logprobs(start_api: StartApi, byte_model: ByteModel) -> None:
    token = byte_model.tokens("a")[0]
    outputs = [ScriptedOutput([token], "length", logprobs=[(-0.5, 1, [(token, -0.5)])])]
    with openai_client(start_api(lambda _: outputs).url) as client:
        include: Any = ["message.output_text.logprobs"]
        response = client.responses.create(model="any", input="Hi", include=include, top_logprobs=1)
    [item] = response.output
    assert item.type == "message"
    [part] = item.content
    assert part.type == "output_text"
    assert part.logprobs
    assert [(entry.token, entry.logprob) for entry in part.logprobs] == [("a", -0.5)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
    ],
)
def test_what_is_not_supported(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": "any", "input": "Hi", **fields})
    assert caught.value.param == param


def test_an_error_ends_a_stream_with_failed(start_api: StartApi, byte_model: ByteModel) -> None:
    outputs = [ScriptedOutput(byte_model.tokens("a")), ScriptedOutput([], "error", error="broken")]
    with openai_client(start_api(lambda _: outputs).url) as client:
        events = list(client.responses.create(model="any", input="Hi", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error
