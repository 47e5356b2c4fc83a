"""Base of output parsers that read the text with a scanner."""

from abc import ABC, abstractmethod
from dataclasses import replace

from rtp_llm.text.output import OutputDelta
from rtp_llm.text.scanner import Reading, Scanner


class ScanningParser(ABC):
    """Base of `OutputParser`s that are written as one generator, `read`, which reads the text from `scanner`. It pauses
    where it needs more text, and the next `push` resumes it.
    """

    in_reasoning = False

    def __init__(self) -> None:
        self.scanner = Scanner()
        self._deltas: list[OutputDelta] = []
        self._reading = self.read()

    @abstractmethod
    def read(self) -> Reading[None]:
        """Generator that reads the text of the sequence from `scanner` and passes its deltas to `emit`. It yields when
        it needs more text.
        """

    def push(self, text: str) -> list[OutputDelta]:
        self.scanner.feed(text)
        return self._advance()

    def finish(self) -> list[OutputDelta]:
        self.scanner.end()
        return self._advance()

    def _advance(self) -> list[OutputDelta]:
        next(self._reading, None)
        deltas, self._deltas = self._deltas, []
        return deltas

    def emit(self, delta: OutputDelta) -> None:
        """Adds a delta to those that the current `push` or `finish` will return; merges it with the last of these if it
        continues the same field.
        """
        merged = _merged(self._deltas[-1], delta) if self._deltas else None
        if merged:
            self._deltas[-1] = merged
        else:
            self._deltas.append(delta)


def _merged(first: OutputDelta, second: OutputDelta) -> OutputDelta | None:
    """Returns both pieces as one, None if they are of different kinds or calls."""
    if first.call and second.call and first.call.index == second.call.index:
        return OutputDelta(call=replace(first.call, arguments=first.call.arguments + second.call.arguments))
    if first.reasoning and second.reasoning:
        return OutputDelta(reasoning=first.reasoning + second.reasoning)
    return OutputDelta(content=first.content + second.content) if first.content and second.content else None
