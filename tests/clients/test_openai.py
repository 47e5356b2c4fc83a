"""The `openai` client: agent loops with two tools over chat completions and responses."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.clients import two_tools
from tests.clients.scripted_model import ScriptedServer
from tests.sdk_clients import openai_client

CHAT_TOOLS: list[Any] = [{"type": "function", "function": function} for function in two_tools.FUNCTIONS]
RESPONSE_TOOLS: list[Any] = [{"type": "function", **function} for function in two_tools.FUNCTIONS]


@pytest.fixture(scope="module")
def client(two_tools_server: ScriptedServer) -> Iterator[openai.OpenAI]:
    with openai_client(two_tools_server.url) as client:
        yield client


@pytest.mark.parametrize("streams", [False, True])
def test_an_agent_over_chat_completions(client: openai.OpenAI, streams: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": two_tools.QUESTION}]
    for _ in range(2):
        if streams:
            with client.chat.completions.stream(model="any", messages=messages, tools=CHAT_TOOLS) as stream:
                choice: Any = stream.get_final_completion().choices[0]
        else:
            choice = client.chat.completions.create(model="any", messages=messages, tools=CHAT_TOOLS).choices[0]
        calls = choice.message.tool_calls or []
        assert choice.finish_reason == ("tool_calls" if calls else "stop")
        if not calls:
            break
        assert choice.message.content.strip() == two_tools.PREAMBLE
        messages.append(choice.message)
        for call in calls:
            result = two_tools.run_tool(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    assert choice.message.content == two_tools.ANSWER


@pytest.mark.parametrize("streams", [False, True])
def test_an_agent_over_responses(client: openai.OpenAI, streams: bool) -> None:
    items: list[Any] = [{"role": "user", "content": two_tools.QUESTION}]
    for _ in range(2):
        if streams:
            with client.responses.stream(model="any", input=items, tools=RESPONSE_TOOLS) as stream:
                response: Any = stream.get_final_response()
        else:
            response = client.responses.create(model="any", input=items, tools=RESPONSE_TOOLS)
        items += response.output
        calls = [item for item in response.output if item.type == "function_call"]
        for call in calls:
            result = two_tools.run_tool(call.name, call.arguments)
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": result})
    assert response.output_text == two_tools.ANSWER
