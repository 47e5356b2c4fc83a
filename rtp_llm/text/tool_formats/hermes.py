"""Hermes, Qwen 2.5, Qwen 3: JSON between `<tool_call>` tags (github.com/NousResearch/Hermes-Function-Calling)."""

from collections.abc import Sequence

from rtp_llm.text.grammar import marker, quote
from rtp_llm.text.scanner import Reading
from rtp_llm.text.tokenizer import Tokenizer
from rtp_llm.text.tool_formats.call_grammar import json_object, marked_calls
from rtp_llm.text.tool_formats.json_calls import JsonCallParser
from rtp_llm.text.tool_formats.tool_format import ToolFormat
from rtp_llm.text.tools import Tool


class HermesParser(JsonCallParser):
    starts = ("<tool_call>",)
    end = "</tool_call>"

    def read_calls(self, start: str) -> Reading[None]:
        yield from self.read_object()
        if not (yield from self.scanner.is_cut_off(self.end)):
            yield from self.scanner.skip(self.end)


class HermesFormat(ToolFormat):
    name = "hermes"
    markers = ("<tool_call>", "</tool_call>")
    parser_class = HermesParser

    def grammar(self, tools: Sequence[Tool], parallel: bool, tokenizer: Tokenizer) -> str:
        newline, end = quote("\n"), marker("</tool_call>", tokenizer)
        bodies = [f"{newline} {json_object(tool)} {newline} {end}" for tool in tools]
        return marked_calls("<tool_call>", "\n", bodies, parallel, tokenizer)

    def is_used_by(self, template: str) -> bool:
        return "<tool_call>" in template and '"arguments"' in template
