"""The format of a response: how its text is split into content, reasoning and tool calls."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from rtp_llm.errors import ConfigError
from rtp_llm.text import reasoning, tool_formats
from rtp_llm.text.grammar import Reasoning
from rtp_llm.text.output import ContentParser, OutputParser
from rtp_llm.text.reasoning import REASONING_FORMATS, ReasoningFormat, ReasoningParser, ReasoningState
from rtp_llm.text.template import ChatTemplate
from rtp_llm.text.tokenizer import Tokenizer
from rtp_llm.text.tool_formats import TOOL_FORMATS
from rtp_llm.text.tool_formats.tool_format import ToolFormat
from rtp_llm.text.tools import Tool

log = logging.getLogger(__name__)

DEFAULT_TOOL_FORMAT = "hermes"
OFF = "none"  # value of REASONING_PARSER


@dataclass(frozen=True)
class OutputFormat:
    """How to parse the responses to one request. Small, since it is sent between processes.

    tools              the functions that the model may call, in `tool_format`; if empty, calls are not parsed
    reasoning_state    whether the response begins inside the reasoning; None: it has no reasoning
    include_reasoning  whether the client gets the reasoning
    special_markers    {text: id} of the reasoning and tool call markers that are special tokens: the parser needs them
                       in its text, although `skip_special_tokens` removes special tokens from what clients get
    """

    tools: tuple[Tool, ...] = ()
    tool_format: str = DEFAULT_TOOL_FORMAT
    reasoning_format: str = OFF
    reasoning_state: ReasoningState | None = None
    include_reasoning: bool = True
    special_markers: Mapping[str, int] = field(default_factory=dict)

    @property
    def reasoning(self) -> Reasoning | None:
        """Returns the markers of the reasoning that the response's grammar must allow; None without reasoning."""
        if self.reasoning_state is None:
            return None
        markers = REASONING_FORMATS[self.reasoning_format]
        return Reasoning(markers.open, markers.close, self.reasoning_state)

    def parser(self) -> OutputParser:
        """Returns a new parser for one sequence."""
        inner: OutputParser = ContentParser()
        if self.tools:
            inner = TOOL_FORMATS[self.tool_format].parser(self.tools, self.special_markers)
        if self.reasoning_state is None:
            return inner
        markers = REASONING_FORMATS[self.reasoning_format]
        return ReasoningParser(markers, self.reasoning_state, inner, self.include_reasoning)


class AnswerFormats:
    """How the served model writes tool calls and reasoning."""

    def __init__(self, tokenizer: Tokenizer, tool_format: ToolFormat, reasoning_format: ReasoningFormat | None):
        self.tool_format, self.reasoning_format = tool_format, reasoning_format
        delimiters = (reasoning_format.open, reasoning_format.close) if reasoning_format else ()
        ids = {marker: tokenizer.token_id(marker) for marker in (*tool_format.markers, *delimiters)}
        self._special = {marker: i for marker, i in ids.items() if i is not None and i in tokenizer.special_ids}

    @classmethod
    def select(
        cls, template: ChatTemplate, tokenizer: Tokenizer, tool_call_parser: str, reasoning_parser: str
    ) -> "AnswerFormats":
        """Returns the formats that the settings name, otherwise those that the chat template uses.

        Raises ConfigError if TOOL_CALL_PARSER or REASONING_PARSER is not the name of a format.
        """
        _check("TOOL_CALL_PARSER", tool_call_parser, TOOL_FORMATS)
        _check("REASONING_PARSER", reasoning_parser, {**REASONING_FORMATS, OFF: None})
        found = TOOL_FORMATS.get(tool_call_parser) or tool_formats.detect(template.source)
        found_reasoning = REASONING_FORMATS.get(reasoning_parser)
        if not reasoning_parser:
            found_reasoning = reasoning.detect(template.source)
        tool_format = found or TOOL_FORMATS[DEFAULT_TOOL_FORMAT]
        source = "" if found else " (the chat template uses no known format; TOOL_CALL_PARSER sets another one)"
        reasoning_name = getattr(found_reasoning, "name", OFF)
        log.info("format of tool calls: %s%s; format of reasoning: %s", tool_format.name, source, reasoning_name)
        return cls(tokenizer, tool_format, found_reasoning)

    def output_format(
        self,
        tools: tuple[Tool, ...],
        prompt: str,
        prefill: str | None,
        *,
        include_reasoning: bool = True,
        skip_special_tokens: bool = True,
    ) -> OutputFormat:
        """Returns how to split the responses to one request into content, reasoning and tool calls.

        prompt: the rendered prompt. Its end shows whether the response begins inside the reasoning.
        prefill: the assistant's text at the end of the prompt that the model continues; None if a new turn begins.
        """
        state = self.reasoning_format.state(prompt, prefill) if self.reasoning_format else None
        needs_markers = skip_special_tokens and (tools or state)
        return OutputFormat(
            tools,
            self.tool_format.name,
            self.reasoning_format.name if self.reasoning_format else OFF,
            state,
            include_reasoning,
            self._special if needs_markers else {},
        )


def _check(setting: str, value: str, allowed: Mapping[str, object]) -> None:
    if value and value not in allowed:
        raise ConfigError(
            f"{setting}={value!r}: not valid; allowed: {', '.join(allowed)}, or empty for the format that the chat"
            " template uses"
        )
