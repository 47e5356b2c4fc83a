"""The deltas (content, reasoning, tool calls) into which an output parser splits the text of a sequence."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ToolCallDelta:
    """A part of a tool call. The first delta of a call has its id and name; arguments concatenate to JSON text."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class OutputDelta:
    """A part of the output; exactly one field is set."""

    content: str = ""
    reasoning: str = ""
    call: ToolCallDelta | None = None


class OutputParser(Protocol):
    """Splits the text of one sequence into content, reasoning and tool calls.

    The concatenated result does not depend on how the text is split into chunks.

    in_reasoning  whether the text so far ends inside the reasoning
    """

    in_reasoning: bool

    def push(self, text: str) -> list[OutputDelta]:
        """Returns the deltas that are final after this text."""
        ...

    def finish(self) -> list[OutputDelta]:
        """Returns the deltas of the buffered text. Call it once, after the last push."""
        ...


class ContentParser:
    """An `OutputParser` that returns all text as content."""

    in_reasoning = False

    def push(self, text: str) -> list[OutputDelta]:
        return [OutputDelta(content=text)] if text else []

    def finish(self) -> list[OutputDelta]:
        return []
