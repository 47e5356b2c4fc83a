"""The `anthropic` client: an agent loop with two tools over messages."""

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.clients import two_tools
from tests.clients.scripted_model import ScriptedServer
from tests.sdk_clients import anthropic_client

TOOLS: list[Any] = [
    {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]} for f in two_tools.FUNCTIONS
]


@pytest.fixture(scope="module")
def client(two_tools_server: ScriptedServer) -> Iterator[anthropic.Anthropic]:
    with anthropic_client(two_tools_server.url) as client:
        yield client


@pytest.mark.parametrize("streams", [False, True])
def test_an_agent_over_messages(client: anthropic.Anthropic, streams: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": two_tools.QUESTION}]
    for _ in range(2):
        request: dict[str, Any] = {"model": "any", "max_tokens": 1000, "messages": messages, "tools": TOOLS}
        if streams:
            with client.messages.stream(**request) as stream:
                message = stream.get_final_message()
        else:
            message = client.messages.create(**request)
        calls = [block for block in message.content if block.type == "tool_use"]
        assert message.stop_reason == ("tool_use" if calls else "end_turn")
        if not calls:
            break
        results = [
            {"type": "tool_result", "tool_use_id": call.id, "content": two_tools.run_tool(call.name, dict(call.input))}
            for call in calls
        ]
        messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    [block] = message.content
    assert block.type == "text"
    assert block.text == two_tools.ANSWER
