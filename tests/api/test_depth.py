"""JSON that is nested deeply is refused in the same words wherever it stands, before recursive code meets it."""

import json
from typing import Any

import pytest
from jinja2 import Environment

from rtp_llm.text.json_depth import MAX_DEPTH
from rtp_llm.text.messages import MessageFormat
from tests.api.api_server import ApiServer
from tests.api.conftest import StartApi
from tests.quick import slow_except

MESSAGE = {"role": "user", "content": "a"}
Place = tuple[str, dict[str, Any], int]


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": function}]}]}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


# The path, the body with "X" for what is nested, and how many levels are above it.
PLACES: dict[str, Place] = {
    "unknown field": ("/tokenize", {"prompt": "a", "y": "X"}, 1),
    "tools": (
        "/chat/render",
        {"messages": [MESSAGE], "tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": "X"}}}]},
        5,
    ),
    "template": ("/chat/render", {"messages": [MESSAGE], "chat_template_kwargs": {"x": "X"}}, 2),
    "arguments": ("/chat/render", call({"x": "X"}), 7),
}


def status(api: ApiServer, path: str, body: bytes) -> int:
    with api.client() as client:
        response = client.post(path, content=body)
    assert response.status_code == 200 or f"nested more deeply than {MAX_DEPTH} levels" in response.text
    return response.status_code


@pytest.mark.parametrize("name", slow_except(PLACES, "tools", "arguments"))
def test_the_depth_of_a_body_is_limited(name: str, start_api: StartApi) -> None:
    api = start_api()
    path, body, above = PLACES[name]
    statuses = [
        status(api, path, json.dumps(body).replace('"X"', "[" * depth + "]" * depth).encode())
        for depth in (MAX_DEPTH - above, MAX_DEPTH - above + 1, 5000, 500_000)
    ]
    assert statuses == [200, 400, 400, 400]


def test_the_depth_of_a_body_in_a_string_is_limited(start_api: StartApi) -> None:
    api = start_api()
    bodies = [json.dumps(json.dumps({"prompt": "a", "y": nested(depth - 1)})) for depth in (MAX_DEPTH, MAX_DEPTH + 1)]
    assert [status(api, "/tokenize", body.encode()) for body in bodies] == [200, 400]


def test_arguments_that_are_nested_deeply_stay_text() -> None:
    """A template that goes through them, or encodes them, gets a string, as for arguments that are no JSON."""
    for depth, kind in ((MAX_DEPTH, dict), (MAX_DEPTH + 1, str), (900, str), (100_000, str)):
        message = call('{"x":' + "[" * (depth - 1) + "]" * (depth - 1) + "}")["messages"][0]
        tree = Environment().parse("{{ messages }}")
        normalized = MessageFormat("{{ messages }}", tree).normalize(message)
        assert type(normalized["tool_calls"][0]["function"]["arguments"]) is kind


def test_many_brackets_are_not_deep(start_api: StartApi) -> None:
    assert status(start_api(), "/tokenize", json.dumps({"prompt": "[{" * 1000, "y": [[]] * 1000}).encode()) == 200
