"""Separates the reasoning (chain of thought) from the rest of the output."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rtp_llm.text.output import OutputDelta, OutputParser
from rtp_llm.text.scanner import Reading
from rtp_llm.text.scanning_parser import ScanningParser

ReasoningState = Literal["inside", "optional"]


@dataclass(frozen=True)
class ReasoningFormat:
    """The markers with which a family of models delimits its reasoning.

    name     the value of REASONING_PARSER
    always   whether the output begins with reasoning even if neither the prompt nor the model opens it
    """

    name: str
    open: str
    close: str
    always: bool = False

    def state(self, prompt: str, prefill: str | None = None) -> ReasoningState | None:
        """Returns where the output starts: "inside" the reasoning; "optional": before it, and the model may omit it;
        None: after it, so that the output has no reasoning.

        prompt   the rendered prompt
        prefill  the assistant's text at the end of the prompt that the model continues; None if a new turn begins
        """
        tail = prompt.rstrip()
        if tail.endswith(self.open) or (prefill and prefill.rfind(self.open) > prefill.rfind(self.close)):
            return "inside"
        if tail.endswith(self.close) or (prefill and prefill.strip()):
            return None
        return "inside" if self.always else "optional"


class ReasoningParser(ScanningParser):
    """An `OutputParser` that separates the reasoning and passes the rest of the text to another parser, `inner`. Drops
    whitespace next to the markers of the reasoning.
    """

    def __init__(
        self, reasoning_format: ReasoningFormat, state: ReasoningState, inner: OutputParser, is_shown: bool = True
    ):
        super().__init__()
        self._format, self._inner, self._is_shown = reasoning_format, inner, is_shown
        self.in_reasoning = state == "inside"
        self._space = ""

    def finish(self) -> list[OutputDelta]:
        return super().finish() + self._inner.finish()

    def read(self) -> Reading[None]:
        scanner, markers = self.scanner, self._format
        scanner.mark()
        yield from scanner.skip_space()
        if (yield from scanner.skip(markers.open)) or self.in_reasoning:
            self.in_reasoning = True
            scanner.unmark()
            yield from scanner.skip_space()
            yield from scanner.until((markers.close,), self._add_reasoning)
            self.in_reasoning = not (yield from scanner.skip(markers.close))
            yield from scanner.skip_space()
        self._add_rest(scanner.unmark())
        while (yield from scanner.peek()):
            self._add_rest(scanner.rest())

    def _add_reasoning(self, text: str) -> None:
        text = self._space + text
        reasoning = text.rstrip()
        self._space = text[len(reasoning) :]
        if reasoning and self._is_shown:
            self.emit(OutputDelta(reasoning=reasoning))

    def _add_rest(self, text: str) -> None:
        for delta in self._inner.push(text):
            self.emit(delta)


_FORMATS: Sequence[ReasoningFormat] = (
    ReasoningFormat("qwen3", "<think>", "</think>"),
    ReasoningFormat("deepseek_r1", "<think>", "</think>", always=True),
    ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
)
REASONING_FORMATS = {reasoning_format.name: reasoning_format for reasoning_format in _FORMATS}


def detect(template: str) -> ReasoningFormat | None:
    """Returns the format that a chat template uses; None if it does not mention reasoning."""
    if "[THINK]" in template:
        return REASONING_FORMATS["mistral"]
    if "</think>" not in template:
        return None
    # Templates of DeepSeek's first distillations leave it to the model, which often begins without the marker.
    return REASONING_FORMATS["deepseek_r1" if "\uff5cAssistant\uff5c" in template else "qwen3"]
