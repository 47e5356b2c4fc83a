"""litellm, as a client of chat completions and of messages."""

import json
import os
from typing import Any

import pytest

from tests.clients import two_tools
from tests.clients.scripted_model import MAX_SEQ_LEN, ScriptedServer

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it downloads a list of prices when it is imported
litellm = pytest.importorskip("litellm", reason="litellm is not installed: make test-clients")

pytestmark = pytest.mark.filterwarnings("ignore")  # litellm's own

PROVIDERS = [("openai", "/v1"), ("anthropic", "")]
TOOLS = [{"type": "function", "function": function} for function in two_tools.FUNCTIONS]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("provider", "path"), PROVIDERS)
def test_an_agent(two_tools_server: ScriptedServer, provider: str, path: str, streams: bool) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": two_tools.QUESTION}]
    for _ in range(2):
        response = litellm.completion(
            model=f"{provider}/any",
            api_base=f"{two_tools_server.url}{path}",
            api_key="none",
            messages=messages,
            tools=TOOLS,
            stream=streams,
            num_retries=0,
            timeout=60,
        )
        choice = (litellm.stream_chunk_builder(list(response)) if streams else response).choices[0]
        calls = choice.message.tool_calls or []
        assert choice.finish_reason == ("tool_calls" if calls else "stop")
        messages.append(choice.message.model_dump())
        for call in calls:
            result = two_tools.run_tool(call.function.name, json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    assert choice.message.content == two_tools.ANSWER


@pytest.mark.parametrize(("provider", "path"), PROVIDERS)
def test_a_prompt_that_is_too_long(two_tools_server: ScriptedServer, provider: str, path: str) -> None:
    """Its router falls back to another model on this error only."""
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(
            model=f"{provider}/any",
            api_base=f"{two_tools_server.url}{path}",
            api_key="none",
            messages=[{"role": "user", "content": "x" * MAX_SEQ_LEN}],
            num_retries=0,
            timeout=60,
        )
