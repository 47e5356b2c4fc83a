"""Anthropic's Messages API, judged by the `anthropic` client; the engine is a script over single-byte tokens."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import Script, ScriptedOutput
from tests.sdk_clients import anthropic_client

HI: list[Any] = [{"role": "user", "content": "Hi"}]


def answering(byte_model: ByteModel, text: str, finish: str = "stop", step: int = 3) -> Script:
    """Returns a script that answers every prompt with `text`, `step` tokens at a time."""
    tokens = byte_model.tokens(text) + ([byte_model.end] if finish == "stop" else [])
    pieces = [tokens[i : i + step] for i in range(0, len(tokens), step)]
    return lambda _: [ScriptedOutput(p, finish if i == len(pieces) - 1 else None) for i, p in enumerate(pieces)]


@pytest.fixture
def client(start_api: StartApi, byte_model: ByteModel) -> Iterator[anthropic.Anthropic]:
    with anthropic_client(start_api(answering(byte_model, "Grüße")).url) as client:
        yield client


def test_a_message(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="any", max_tokens=64, messages=HI)
    assert (message.type, message.role, message.stop_reason, message.stop_sequence) == (
        "message",
        "assistant",
        "end_turn",
        None,
    )
    assert [block.model_dump(exclude_none=True) for block in message.content] == [{"type": "text", "text": "Grüße"}]
    assert message.usage.input_tokens == len("user:Hiassistant:") + 2
    assert message.usage.output_tokens == len("Grüße".encode()) + 1


def test_a_stream_gives_the_same_message(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(model="any", max_tokens=64, messages=HI)
    with client.messages.stream(model="any", max_tokens=64, messages=HI) as stream:
        texts = list(stream.text_stream)
        streamed = stream.get_final_message()
    assert len(texts) > 1
    assert streamed.model_dump(exclude={"id"}) == whole.model_dump(exclude={"id"})


def test_the_length_limit(start_api: StartApi, byte_model: ByteModel) -> None:
    with anthropic_client(start_api(answering(byte_model, "abc", finish="length")).url) as client:
        message = client.messages.create(model="any", max_tokens=3, messages=HI)
    assert message.stop_reason == "max_tokens"


def test_a_stop_sequence_is_named(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="any", max_tokens=64, messages=HI, stop_sequences=["ß"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "ß")
    assert message.content[0].type == "text"
    assert message.content[0].text == "Grü"


def submitted(start_api: StartApi, byte_model: ByteModel, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the prompt and the sampling parameters that the engine gets."""
    api = start_api(answering(byte_model, "x"))
    api.post("/v1/messages", {"model": "any", "max_tokens": 5, **body})
    submission = api.engine.next_submission()
    return byte_model.tokenizer.decode(submission.prompt, skip_special_tokens=False), submission.params


def test_system_blocks_and_roles(start_api: StartApi, byte_model: ByteModel) -> None:
    billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=0a1b2;"}
    system = [billing, {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, text("c")]},
        {"role": "user", "content": "d"},
    ]
    prompt, _ = submitted(start_api, byte_model, {"system": system, "messages": messages})
    assert prompt == "<|turn|>system:Be brief.<|turn|>user:a\nb<|turn|>assistant:c<|turn|>user:d<|turn|>assistant:"


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def test_tools_become_openai_turns(start_api: StartApi, byte_model: ByteModel) -> None:
    use = {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [text("3")]}
    messages = [*HI, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result, text("go on")]}]
    tools = [{"name": "add"}, {"type": "web_search_20250305", "name": "web_search"}]
    prompt, _ = submitted(start_api, byte_model, {"messages": messages, "tools": tools})
    assert prompt == "<|turn|>user:Hi<|turn|>assistant:<|turn|>tool:3<|turn|>user:go on<|turn|>assistant:"


def test_sampling_parameters(start_api: StartApi, byte_model: ByteModel) -> None:
    _, params = submitted(start_api, byte_model, {"messages": HI})
    assert (params["temperature"], params["max_tokens"]) == (1.0, 5)
    _, params = submitted(start_api, byte_model, {"messages": HI, "temperature": 0, "top_k": 3, "top_p": 0.5})
    assert (params["temperature"], params["top_k"], params["top_p"]) == (0, 3, 0.5)


def test_count_tokens(client: anthropic.Anthropic) -> None:
    count = client.messages.count_tokens(model="any", messages=HI)
    assert count.input_tokens == len("user:Hiassistant:") + 2


def test_errors_have_anthropics_shape(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(model="any", max_tokens=5, messages=[{"role": "user", "content": "x" * 5000}])
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert caught.value.body["error"]["message"].startswith("The prompt is too long: ")
    image: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    with pytest.raises(anthropic.BadRequestError, match=r"messages.0: a 'image' block is not supported"):
        client.messages.create(model="any", max_tokens=5, messages=[{"role": "user", "content": [image]}])


def test_a_wrong_key(start_api: StartApi) -> None:
    api = start_api(api_key="right")
    with anthropic_client(api.url) as client, pytest.raises(anthropic.AuthenticationError) as caught:
        client.messages.create(model="any", max_tokens=5, messages=HI)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == "authentication_error"


def test_an_error_in_a_stream(start_api: StartApi, byte_model: ByteModel) -> None:
    outputs = [ScriptedOutput(byte_model.tokens("a")), ScriptedOutput([], "error", error="broken")]
    api = start_api(lambda _: outputs)
    with (
        anthropic_client(api.url) as client,
        pytest.raises(anthropic.APIStatusError),
        client.messages.stream(model="any", max_tokens=5, messages=HI) as stream,
    ):
        stream.get_final_message()


def test_a_silent_stream_sends_ping_events(start_api: StartApi) -> None:
    api = start_api(sse_ping_seconds=0.05)
    body = {"model": "any", "max_tokens": 5, "messages": HI, "stream": True}
    with api.open_stream("/v1/messages", body) as response:
        frame = next(response.iter_bytes()).decode()
    event, data = frame.strip().split("\n")
    assert event == "event: ping"
    assert json.loads(data.removeprefix("data: ")) == {"type": "ping"}
