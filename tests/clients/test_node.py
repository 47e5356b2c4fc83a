"""Node's `openai` client: its own agent loop over chat completions, and one over responses, whole and streamed."""

import json
from pathlib import Path

import pytest

from tests.clients import npm, two_tools
from tests.clients.scripted_model import ScriptedServer

SCRIPT = Path(__file__).with_name("openai_agent.mjs")


def test_an_agent(two_tools_server: ScriptedServer, tmp_path: Path) -> None:
    if not (npm.FOLDER / "node_modules/openai").exists():
        pytest.skip("Node's openai client is not installed: make test-clients")
    arguments = [str(npm.FOLDER), two_tools_server.url, two_tools.QUESTION, json.dumps(two_tools.FUNCTIONS)]
    output = npm.run([npm.command("node"), str(SCRIPT), *arguments], tmp_path, tmp_path)
    assert json.loads(output) == [two_tools.ANSWER] * 4
