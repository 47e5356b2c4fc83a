"""Runs an output parser over a text and sums up what it returns."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from rtp_llm.text.output import OutputDelta, OutputParser


@dataclass
class Call:
    name: str
    arguments: str


@dataclass
class Sum:
    """All deltas of an answer, concatenated."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, delta: OutputDelta) -> None:
        self.content += delta.content
        self.reasoning += delta.reasoning
        if piece := delta.call:
            assert bool(piece.name) == bool(piece.id) == (piece.index == len(self.calls))
            if piece.name:
                self.calls.append(Call(piece.name, ""))
            assert piece.index == len(self.calls) - 1
            self.calls[-1].arguments += piece.arguments


def parse(parser: OutputParser, texts: Iterable[str]) -> Sum:
    """Returns what the parser makes of a text that comes in these pieces."""
    total = Sum()
    for text in texts:
        for delta in parser.push(text):
            total.add(delta)
    for delta in parser.finish():
        total.add(delta)
    return total


def stream(parser: OutputParser, text: str) -> list[str]:
    """Returns a line per delta of a text that comes character by character, for comparison with a golden stream."""
    deltas = [delta for char in text for delta in parser.push(char)] + parser.finish()
    return [_line(delta) for delta in deltas]


def _line(delta: OutputDelta) -> str:
    if delta.call:
        return f"{delta.call.index} {delta.call.name} {delta.call.arguments}"
    return f"content {delta.content}" if delta.content else f"reasoning {delta.reasoning}"
