"""Coding agents, each of which edits a file: codex over responses, claude-code over messages, opencode over chat.

The model's script tells them which of their own tools to call; everything else they do by themselves.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.clients import npm
from tests.clients.scripted_model import Answer, Conversation, ScriptedServer

pytestmark = pytest.mark.slow
TASK = "Replace Hello by Goodbye in greeting.py"
DONE = "It says Goodbye now."


class EditTask:
    """A folder with one file to edit, a home for the agent, and the model's script: `steps`, one after each result."""

    def __init__(self, folder: Path):
        self.home, self.project = folder / "home", folder / "project"
        self.home.mkdir()
        self.project.mkdir()
        self.file = self.project / "greeting.py"
        self.file.write_text('print("Hello")\n')
        self.steps: Sequence[Answer] = ()

    def answer(self, conversation: Conversation) -> Answer:
        """The model's script. Without tools an agent asks for something else, such as a title."""
        return self.steps[len(conversation.results)] if conversation.tools else Answer("Greeting")

    def check(self, server: ScriptedServer) -> None:
        """Checks that the file was edited, and that each prompt continued the one before it."""
        assert self.file.read_text() == 'print("Goodbye")\n'
        prompts = [conversation for conversation in server.conversations if conversation.tools]
        assert len(prompts) == len(self.steps)
        for first, second in itertools.pairwise(prompts):
            assert second.tools == first.tools
            assert second.turns[: len(first.turns)] == first.turns, "the prefix cache would be of no use"


@pytest.fixture
def task(tmp_path: Path) -> EditTask:
    return EditTask(tmp_path)


def test_codex(task: EditTask, tmp_path: Path) -> None:
    codex = npm.command("codex")
    shell = ("exec_command", {"cmd": "sed -i s/Hello/Goodbye/ greeting.py"})
    task.steps = [Answer("I edit it.", (shell,)), Answer(DONE)]
    settings = task.home / ".codex/config.toml"
    settings.parent.mkdir()
    with ScriptedServer(tmp_path / "model", task.answer) as server:
        provider = f'name = "rtp"\nbase_url = "{server.url}/v1"\nwire_api = "responses"\n'
        settings.write_text(f'model = "any"\nmodel_provider = "rtp"\n[model_providers.rtp]\n{provider}')
        # Its sandbox needs rights that a container does not have.
        flags = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
        output = npm.run([codex, "exec", *flags, TASK], task.home, task.project)
    assert output.strip() == DONE
    task.check(server)


def test_claude_code(task: EditTask, tmp_path: Path) -> None:
    claude = npm.command("claude")
    path = {"file_path": str(task.file)}
    task.steps = [
        Answer("I read it.", (("Read", path),)),
        Answer("", (("Edit", {**path, "old_string": "Hello", "new_string": "Goodbye"}),)),
        Answer(DONE),
    ]
    flags = ["--model=any", "--permission-mode=acceptEdits", "--output-format=json"]
    with ScriptedServer(tmp_path / "model", task.answer) as server:
        environment = {"ANTHROPIC_BASE_URL": server.url, "ANTHROPIC_API_KEY": "none"}
        environment["CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC"] = "1"
        output = npm.run([claude, "--print", TASK, *flags], task.home, task.project, **environment)
    assert json.loads(output)["result"] == DONE
    task.check(server)


def test_opencode(task: EditTask, tmp_path: Path) -> None:
    opencode = npm.command("opencode")
    path = {"filePath": str(task.file)}
    task.steps = [
        Answer("I read it.", (("read", path),)),
        Answer("", (("edit", {**path, "oldString": "Hello", "newString": "Goodbye"}),)),
        Answer(DONE),
    ]
    with ScriptedServer(tmp_path / "model", task.answer) as server:
        options = {"baseURL": f"{server.url}/v1", "apiKey": "none"}
        provider = {"npm": "@ai-sdk/openai-compatible", "options": options, "models": {"any": {}}}
        settings = {"provider": {"rtp": provider}, "model": "rtp/any", "autoupdate": False, "share": "disabled"}
        environment = {"OPENCODE_CONFIG_CONTENT": json.dumps(settings), "OPENCODE_DISABLE_MODELS_FETCH": "1"}
        output = npm.run([opencode, "run", TASK], task.home, task.project, **environment)
    assert DONE in output
    task.check(server)
