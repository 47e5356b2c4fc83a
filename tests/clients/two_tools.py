"""A task with two tools for every client: the model calls both at once, and repeats what they return."""

import json
from typing import Any

from tests.clients.scripted_model import Answer, Conversation

QUESTION = "How is the weather in Ulm, and how late is it there?"
PREAMBLE = "Let me look."
ANSWER = "21 degrees in Ulm / noon in Europe/Berlin"
CALLS = (("weather", {"city": "Ulm"}), ("clock", {"zone": "Europe/Berlin"}))
PARAMETERS: dict[str, dict[str, Any]] = {
    name: {
        "type": "object",
        "properties": {argument: {"type": "string"} for argument in arguments},
        "required": list(arguments),
        "additionalProperties": False,
    }
    for name, arguments in CALLS
}
FUNCTIONS: list[dict[str, Any]] = [
    {"name": name, "description": f"Returns the {name}.", "parameters": schema} for name, schema in PARAMETERS.items()
]


def answer(conversation: Conversation) -> Answer:
    """The model's script."""
    if conversation.results:
        return Answer(" / ".join(conversation.results))
    assert set(conversation.tools) == {"weather", "clock"}
    return Answer(PREAMBLE, CALLS)


def run_tool(name: str, arguments: str | dict[str, Any]) -> str:
    """Runs a tool. `arguments`: an object, or its JSON text."""
    values = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {"weather": "21 degrees in {city}", "clock": "noon in {zone}"}[name].format(**values)
