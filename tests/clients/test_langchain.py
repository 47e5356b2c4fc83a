"""langchain-openai: bound tools, whole and streamed, over chat completions and responses."""

from functools import reduce
from operator import add
from typing import Any

import pytest

from tests.clients import two_tools
from tests.clients.scripted_model import MAX_SEQ_LEN, ScriptedServer

langchain_openai = pytest.importorskip(
    "langchain_openai", reason="langchain-openai is not installed: make test-clients"
)


def chat_model(server: ScriptedServer, uses_responses: bool) -> Any:
    return langchain_openai.ChatOpenAI(
        model="any",
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        timeout=60,
        use_responses_api=uses_responses,
    )


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("uses_responses", [False, True])
def test_an_agent(two_tools_server: ScriptedServer, uses_responses: bool, streams: bool) -> None:
    tools = [{"type": "function", "function": function} for function in two_tools.FUNCTIONS]
    model = chat_model(two_tools_server, uses_responses).bind_tools(tools)
    messages: list[Any] = [("user", two_tools.QUESTION)]
    for _ in range(2):
        message = reduce(add, model.stream(messages)) if streams else model.invoke(messages)
        messages.append(message)
        for call in message.tool_calls:
            result = two_tools.run_tool(call["name"], call["args"])
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    assert message.text == two_tools.ANSWER


@pytest.mark.parametrize("uses_responses", [False, True])
def test_a_prompt_that_is_too_long(two_tools_server: ScriptedServer, uses_responses: bool) -> None:
    """Fallbacks to a model with a longer context, and middleware that shortens the history, wait for this error."""
    overflow = pytest.importorskip("langchain_core.exceptions").ContextOverflowError
    with pytest.raises(overflow):
        chat_model(two_tools_server, uses_responses).invoke("x" * MAX_SEQ_LEN)
