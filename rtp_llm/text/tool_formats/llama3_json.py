"""Llama 3.1 to 3.3: JSON objects at the start of the output or of a line, with or without `<|python_tag|>` before them
(github.com/meta-llama/llama-models, models/llama3_1/prompt_format.md).
"""

from collections.abc import Sequence

from rtp_llm.text.scanner import Reading
from rtp_llm.text.tokenizer import Tokenizer
from rtp_llm.text.tool_formats.call_grammar import alternatives, json_object, line_start_answer, repeated
from rtp_llm.text.tool_formats.json_calls import JsonCallParser
from rtp_llm.text.tool_formats.tool_format import ToolFormat
from rtp_llm.text.tools import Tool


class Llama3JsonParser(JsonCallParser):
    starts = ("<|python_tag|>", "{")
    line_starts = ("{",)
    is_strict = True

    def read_calls(self, start: str) -> Reading[None]:
        scanner = self.scanner
        yield from self.read_object(is_open=start == "{")
        scanner.mark()
        yield from scanner.skip_space()
        while (yield from scanner.skip(";")) or (yield from scanner.skip(",")):
            yield from self.read_object()
            scanner.mark()
            yield from scanner.skip_space()


class Llama3JsonFormat(ToolFormat):
    name = "llama3_json"
    markers = ("<|python_tag|>",)
    parser_class = Llama3JsonParser

    def grammar(self, tools: Sequence[Tool], parallel: bool, tokenizer: Tokenizer) -> str:
        calls = repeated("call_body", "; ", parallel)
        return "\n".join(
            (
                *alternatives([json_object(tool, "parameters") for tool in tools]),
                f"calls: {calls}",
                *line_start_answer("{"),
            )
        )

    def is_used_by(self, template: str) -> bool:
        return "<|start_header_id|>" in template and '"parameters"' in template
