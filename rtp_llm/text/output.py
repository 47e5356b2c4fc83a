"""The pieces of an answer, into which an output parser splits the text of a sequence."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of a tool call. The first piece of a call has its id and name; arguments are JSON text, concatenated."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class OutputDelta:
    """A piece of an answer; exactly one field is set."""

    content: str = ""
    reasoning: str = ""
    call: ToolCallDelta | None = None


class OutputParser(Protocol):
    """Splits the text of one sequence into content, reasoning and tool calls.

    The concatenated result does not depend on how the text is split.

    in_reasoning  whether the text so far ends inside the reasoning
    """

    in_reasoning: bool

    def push(self, text: str) -> list[OutputDelta]:
        """Returns the pieces that are final after this text."""
        ...

    def finish(self) -> list[OutputDelta]:
        """Returns what was held back. Call it once, after the last push."""
        ...


class ContentParser:
    """Takes all text for content."""

    in_reasoning = False

    def push(self, text: str) -> list[OutputDelta]:
        return [OutputDelta(content=text)] if text else []

    def finish(self) -> list[OutputDelta]:
        return []
