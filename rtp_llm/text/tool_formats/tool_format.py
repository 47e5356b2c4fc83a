"""Interface of tool call formats, and the base class of their parsers."""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import ClassVar

from rtp_llm.text.output import OutputDelta, ToolCallDelta
from rtp_llm.text.scanner import Malformed, Reading
from rtp_llm.text.scanning_parser import ScanningParser
from rtp_llm.text.tokenizer import Tokenizer
from rtp_llm.text.tools import Tool


class ToolCallParser(ScanningParser):
    """Splits the output into content and tool calls.

    A call is announced (sent to the client) as soon as its name is known and the text cannot be anything else. Text
    that turns out not to be a call before that is content, unchanged. After that, its arguments are passed on as they
    arrive, even if they turn out not to be valid JSON; OpenAI's clients expect that. Calls of unknown functions are
    passed on too, since only the client can tell the model about its mistake. Whitespace next to a call is dropped, as
    templates add their own.

    starts       texts with which a call can begin
    line_starts  those of them that count only at the start of a line
    """

    starts: ClassVar[tuple[str, ...]]
    line_starts: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tools: Sequence[Tool], hidden: Collection[str] = ()):
        """`hidden`: markers that are special tokens and must not appear in content."""
        super().__init__()
        self.tools = {tool.name: tool for tool in tools}
        self._hidden = frozenset(hidden)
        self._num_calls = 0
        self._space = ""  # after the content so far: dropped if a call follows
        self._in_line = False  # whether the line has content

    @abstractmethod
    def read_calls(self, start: str) -> Reading[None]:
        """Reads one or more calls after the marker `start`. Raises Malformed if the text is not a call."""

    # For `read_calls`

    def begin_call(self, name: str, call_id: str = "") -> None:
        """Announces a call to the client. From here on, the text of the call cannot become content, even if the rest is
        malformed.
        """
        self.scanner.unmark()
        self._space = ""
        self.emit(OutputDelta(call=ToolCallDelta(self._num_calls, call_id or self.new_id(), name)))
        self._num_calls += 1

    def add_arguments(self, text: str) -> None:
        if text:
            self.emit(OutputDelta(call=ToolCallDelta(self._num_calls - 1, arguments=text)))

    @staticmethod
    def new_id() -> str:
        return f"call_{secrets.token_hex(12)}"

    # Own

    def read(self) -> Reading[None]:
        markers = (*self.starts, *self._hidden.difference(self.starts))
        while start := (yield from self.scanner.until(markers, self._add_content)):
            if start in self._hidden:
                yield from self.scanner.skip(start)
                self.scanner.mark()
            else:
                self.scanner.mark()
                yield from self.scanner.skip(start)
            num_calls = self._num_calls
            try:
                if start not in self.starts or (self._in_line and start in self.line_starts):
                    raise Malformed
                yield from self.read_calls(start)
                self.scanner.unmark()
                yield from self.scanner.skip_space()
                self._in_line = False
            except Malformed:
                text = self.scanner.unmark()
                if self._num_calls == num_calls or (yield from self.scanner.peek()):  # not a call that was cut off
                    for marker in self._hidden:
                        text = text.replace(marker, "")
                    self._add_content(text)
        if self._space:
            self.emit(OutputDelta(content=self._space))

    def _add_content(self, text: str) -> None:
        text = self._space + text
        content = text.rstrip()
        self._space = text[len(content) :]
        if content:
            self.emit(OutputDelta(content=content))
        *lines_before, last_line = text.rsplit("\n", 1)
        self._in_line = bool(last_line.strip()) or (self._in_line and not lines_before)


class ToolFormat(ABC):
    """The syntax in which a family of models writes tool calls.

    name     the value of TOOL_CALL_PARSER
    markers  texts that delimit calls. Markers that are special tokens must not be removed before parsing.
    """

    name: ClassVar[str]
    markers: ClassVar[tuple[str, ...]]
    parser_class: ClassVar[type[ToolCallParser]]

    @abstractmethod
    def is_used_by(self, template: str) -> bool:
        """Returns whether a chat template shows or describes calls in this format."""

    @abstractmethod
    def grammar(self, tools: Sequence[Tool], parallel: bool, tokenizer: Tokenizer) -> str:
        """Returns two Lark rules for `text.grammar.combine`, and the rules that they use: `calls` matches one call or,
        with `parallel`, one or more; `answer` matches any text, with or without such calls in it.

        Raises GrammarError if a strict tool's schema cannot be enforced.
        """

    def parser(self, tools: Sequence[Tool], hidden: Collection[str] = ()) -> ToolCallParser:
        """Returns a parser for one sequence. `hidden`: markers that are special tokens and must not appear in
        content.
        """
        return self.parser_class(tools, hidden)
