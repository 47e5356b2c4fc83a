"""Mistral: `[TOOL_CALLS]` before a JSON array of calls, or, since its 11th tokenizer, before each call as
`name[ARGS]{…}` or `name[CALL_ID]id[ARGS]{…}` (github.com/mistralai/mistral-common).
"""

import re
import secrets
import string
from collections.abc import Sequence

from rtp_llm.text.grammar import marker, quote, text_until
from rtp_llm.text.scanner import Malformed, Reading
from rtp_llm.text.tokenizer import Tokenizer
from rtp_llm.text.tool_formats.call_grammar import alternatives, arguments, json_object, marked_calls, repeated
from rtp_llm.text.tool_formats.json_calls import JsonCallParser
from rtp_llm.text.tool_formats.tool_format import ToolFormat
from rtp_llm.text.tools import Tool

_NAME = re.compile(r"[\w.:/-]*")


class MistralParser(JsonCallParser):
    starts = ("[TOOL_CALLS]",)

    def read_calls(self, start: str) -> Reading[None]:
        yield from self.scanner.skip_space()
        for stray in MistralFormat.markers:
            if (yield from self.scanner.is_next(stray)):
                raise Malformed
        first = yield from self.scanner.peek()
        if first == "[":
            yield from self._read_array()
        elif first == "{":
            yield from self.read_object()
        else:
            yield from self._read_named()

    def _read_array(self) -> Reading[None]:
        scanner = self.scanner
        yield from scanner.expect("[")
        yield from self.read_object()
        scanner.mark()
        while (yield from scanner.skip(",")):
            yield from self.read_object()
            scanner.mark()
        yield from scanner.skip("]")

    def _read_named(self) -> Reading[None]:
        scanner, call_id = self.scanner, ""
        name = yield from scanner.word(_NAME)
        if (yield from scanner.skip("[CALL_ID]")):
            call_id = yield from scanner.word(_NAME)
        yield from scanner.skip("[ARGS]")
        yield from scanner.skip_space()
        if (yield from scanner.peek()) != "{":
            raise Malformed
        self.begin_call(name, call_id)
        yield from self.read_value(self.add_arguments)

    @staticmethod
    def new_id() -> str:
        """Returns nine random letters and digits: Mistral's templates reject other ids in the chat history."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class MistralFormat(ToolFormat):
    name = "mistral"
    markers = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
    parser_class = MistralParser

    def grammar(self, tools: Sequence[Tool], parallel: bool, tokenizer: Tokenizer) -> str:
        if tokenizer.token_id("[ARGS]") is not None:
            args = marker("[ARGS]", tokenizer)
            bodies = [f"{quote(tool.name)} {args} {arguments(tool)}" for tool in tools]
            return marked_calls("[TOOL_CALLS]", "", bodies, parallel, tokenizer)
        array = f"{quote('[')} {repeated('call_body', ', ', parallel)} {quote(']')}"
        return "\n".join(
            (
                *alternatives([json_object(tool) for tool in tools]),
                f"calls: {marker('[TOOL_CALLS]', tokenizer)} {array}",
                text_until("call_head", "[TOOL_CALLS]", tokenizer),
                f"answer: TEXT | call_head {array}",
            )
        )

    def is_used_by(self, template: str) -> bool:
        return "[TOOL_CALLS]" in template
