"""A model that says what a script tells it to, behind the API of the product.

It stands in for a checkpoint: tokens are single bytes, the chat template shows tools as Hermes' models see them, and
the script reads the conversation back from the prompt's tokens. So everything but the forward pass is the product's.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.api.api_server import ApiServer
from tests.api.byte_model import END, TURN, ByteModel
from tests.api.fake_engine import FakeEngine, Script, ScriptedOutput, Submission

MAX_SEQ_LEN = 1 << 20  # a coding agent's first prompt has 100,000 bytes
CHUNK_TOKENS = 7  # per step, so that a stream has many events and no boundary of them falls between words
TEMPLATE = """\
{%- if tools -%}
<|turn|>tools
<tools>
{%- for tool in tools %}{{ '\\n' ~ (tool | tojson) }}{% endfor %}
</tools>
A call is <tool_call>{"name": NAME, "arguments": ARGUMENTS}</tool_call><|end|>
{%- endif -%}
{%- for message in messages -%}
{{- '<|turn|>' ~ message.role ~ '\\n' ~ (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}
{{- '<tool_call>{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) -}}
{{- '}</tool_call>' -}}
{%- endfor -%}
<|end|>
{%- endfor -%}
{{- '<|turn|>assistant\\n' if add_generation_prompt else '' -}}
"""


@dataclass(frozen=True)
class Answer:
    """What the model says: text, then calls as pairs of a tool's name and its arguments."""

    text: str = ""
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()

    def __str__(self) -> str:
        objects = (json.dumps({"name": name, "arguments": arguments}) for name, arguments in self.calls)
        return self.text + "".join(f"\n<tool_call>\n{call}\n</tool_call>" for call in objects)


@dataclass(frozen=True)
class Conversation:
    """What a prompt shows of a conversation. `tools`: by name. `turns`: pairs of role and text."""

    tools: dict[str, dict[str, Any]]
    turns: list[tuple[str, str]]

    @classmethod
    def from_prompt(cls, prompt: str) -> "Conversation":
        pairs = [turn.removesuffix(END).partition("\n") for turn in prompt.split(TURN)[1:-1]]
        turns = [(role, text) for role, _, text in pairs]
        tools: dict[str, dict[str, Any]] = {}
        if turns and turns[0][0] == "tools":
            lines = turns.pop(0)[1].partition("</tools>")[0].splitlines()[1:]
            tools = {tool["function"]["name"]: tool["function"] for tool in map(json.loads, lines)}
        return cls(tools, turns)

    @property
    def results(self) -> list[str]:
        """The results of tools so far."""
        return [text for role, text in self.turns if role == "tool"]


AnswerScript = Callable[[Conversation], Answer]


class ScriptedServer(ApiServer):
    """The API with a scripted model. `conversations`: all that it was asked."""

    def __init__(self, directory: Path, answer: AnswerScript, **settings: Any):
        model = ByteModel(directory)
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
        self.conversations: list[Conversation] = []
        self._answer = answer
        super().__init__(model, self._outputs, **settings)

    def new_engine(self, script: Script | None = None, **options: Any) -> FakeEngine:
        return super().new_engine(script, max_seq_len=MAX_SEQ_LEN, num_blocks=MAX_SEQ_LEN // 16, **options)

    def _outputs(self, submission: Submission) -> list[ScriptedOutput]:
        prompt = self.model.tokenizer.decode(submission.prompt, skip_special_tokens=False)
        try:
            conversation = Conversation.from_prompt(prompt)
            self.conversations.append(conversation)
            answer = self._answer(conversation)
        except Exception as error:  # else the client would wait for an answer
            return [ScriptedOutput([], finish="error", error=f"the script failed: {error!r}")]
        tokens = [*self.model.tokens(str(answer)), self.model.end]
        starts = range(0, len(tokens), CHUNK_TOKENS)
        return [
            ScriptedOutput(tokens[start : start + CHUNK_TOKENS], finish="stop" if start == starts[-1] else None)
            for start in starts
        ]
