"""Llama 3.2 and Llama 4: a list of Python calls, `[get_weather(city="Rome"), now()]`
(github.com/meta-llama/llama-models, models/llama3_2/text_prompt_format.md, models/llama4/prompt_format.md).
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rtp_llm.text.grammar import quote
from rtp_llm.text.scanner import Malformed, Reading, Sink
from rtp_llm.text.tokenizer import Tokenizer
from rtp_llm.text.tool_formats.call_grammar import alternatives, line_start_answer, properties, repeated, value
from rtp_llm.text.tool_formats.tool_format import ToolCallParser, ToolFormat
from rtp_llm.text.tools import Tool

_NAME = re.compile(r"[\w.:/-]*")
_WORD = re.compile(r"[\w.+-]*")
_HEX = re.compile(r"[0-9a-fA-F]*")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORDS = {"True": "true", "False": "false", "None": "null", **{word: word for word in ("true", "false", "null")}}
_ESCAPES = {"\n": "", "\\": "\\", "'": "'", '"': '"', "/": "/", "0": "\0"}
_ESCAPES |= {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_MAX_DEPTH = 64  # of lists and dicts


class PythonicParser(ToolCallParser):
    starts = ("<|python_start|>", "[")
    line_starts = ("[",)

    def read_calls(self, start: str) -> Reading[None]:
        scanner = self.scanner
        if start != "[":
            yield from scanner.expect("[")
        yield from self._read_call()
        scanner.mark()
        yield from scanner.skip_space()
        while (yield from scanner.skip(",")):
            yield from self._read_call()
            scanner.mark()
            yield from scanner.skip_space()
        yield from scanner.skip("]")
        if not (yield from scanner.is_cut_off("<|python_end|>")):
            yield from scanner.skip("<|python_end|>")

    def _read_call(self) -> Reading[None]:
        """Reads `name(key=value, …)`. Announces it at its first key or closing bracket: `[see(2024)]` is not a call."""
        scanner = self.scanner
        yield from scanner.skip_space()
        name = yield from scanner.word(_NAME)
        yield from scanner.expect("(")
        separator = "{"
        yield from scanner.skip_space()
        while not (yield from scanner.skip(")")):
            key = yield from scanner.word(_NAME)
            yield from scanner.expect("=")
            if separator == "{":
                self.begin_call(name)
            self.add_arguments(f"{separator}{json.dumps(key)}: ")
            separator = ", "
            scanner.mark()  # what is no value is content
            yield from self._read_value(self._add_value)
            scanner.unmark()
            yield from scanner.skip_space()
            yield from scanner.skip(",")
            yield from scanner.skip_space()
        if separator == "{":
            self.begin_call(name)
        self.add_arguments("{}" if separator == "{" else "}")

    def _add_value(self, text: str) -> None:
        self.scanner.unmark()
        self.add_arguments(text)

    def _read_value(self, sink: Sink, depth: int = 0) -> Reading[None]:
        """Reads a Python literal and passes its JSON to `sink`. Raises Malformed."""
        scanner = self.scanner
        yield from scanner.skip_space()
        char = yield from scanner.peek()
        if char in ("'", '"'):
            yield from self._read_string(sink)
        elif char in ("[", "(", "{") and depth < _MAX_DEPTH:
            yield from self._read_collection(sink, depth + 1)
        else:
            word = yield from scanner.word(_WORD)
            sink(_json_word(word))

    def _read_collection(self, sink: Sink, depth: int) -> Reading[None]:
        scanner = self.scanner
        is_dict = (yield from scanner.peek()) == "{"
        close = {"[": "]", "(": ")", "{": "}"}[(yield from scanner.char())]
        sink("{" if is_dict else "[")
        separator = ""
        yield from scanner.skip_space()
        while not (yield from scanner.skip(close)):
            sink(separator)
            separator = ", "
            if is_dict:
                yield from self._read_string(sink)
                yield from scanner.expect(":")
                sink(": ")
            yield from self._read_value(sink, depth)
            yield from scanner.skip_space()
            if not (yield from scanner.skip(",")) and not (yield from scanner.is_next(close)):
                raise Malformed
            yield from scanner.skip_space()
        sink("}" if is_dict else "]")

    def _read_string(self, sink: Sink) -> Reading[None]:
        scanner = self.scanner
        quote = yield from scanner.char()
        if quote not in ("'", '"'):
            raise Malformed
        if (yield from scanner.skip(quote)):
            if not (yield from scanner.skip(quote)):
                sink('""')
                return
            quote *= 3
        sink('"')
        while (end := (yield from scanner.until((quote, "\\"), lambda text: sink(_escaped(text))))) == "\\":
            yield from scanner.char()
            yield from self._read_escape(sink)
        sink('"' if end else "")
        yield from scanner.skip(quote)

    def _read_escape(self, sink: Sink) -> Reading[None]:
        char = yield from self.scanner.char()
        if char in _HEX_DIGITS:
            digits = ""
            for _ in range(_HEX_DIGITS[char]):
                digits += yield from self.scanner.char()
            if not _HEX.fullmatch(digits) or not digits or int(digits, 16) > 0x10FFFF:
                raise Malformed
            sink(json.dumps(chr(int(digits, 16)))[1:-1])  # in ASCII: two surrogates in a row are a character in JSON
        elif char:
            sink(_escaped(_ESCAPES.get(char, "\\" + char)))  # Python keeps the backslash of an unknown escape


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _json_word(word: str) -> str:
    """Returns a number, or Python's or JSON's word for a value, as JSON. Raises Malformed."""
    if _NUMBER.fullmatch(word):
        return word
    if word not in _WORDS:
        raise Malformed
    return _WORDS[word]


class PythonicFormat(ToolFormat):
    name = "pythonic"
    markers = ("<|python_start|>", "<|python_end|>")
    parser_class = PythonicParser

    def grammar(self, tools: Sequence[Tool], parallel: bool, tokenizer: Tokenizer) -> str:
        calls = repeated("call_body", ", ", parallel)
        return "\n".join(
            (
                *alternatives([_call_expression(tool, index) for index, tool in enumerate(tools)]),
                *(rule for index, tool in enumerate(tools) for rule in _parameter_rules(tool, index)),
                f"calls: {quote('[')} {calls} {quote(']')}",
                *line_start_answer("["),
            )
        )

    def is_used_by(self, template: str) -> bool:
        return re.search(r"\[\w+\(\w+=", template) is not None


def _call_expression(tool: Tool, index: int) -> str:
    """Returns the Lark expression of a call: the required parameters, then some of the others, each in order."""
    items = [(_rule_name(index, number), item[2]) for number, item in enumerate(properties(tool))]
    required = [rule for rule, is_required in items if is_required]
    optional = [rule for rule, is_required in items if not is_required]
    comma = quote(", ")
    followers = [" ".join(f"({comma} {later})?" for later in optional[start:]) for start in range(len(optional) + 1)]
    if required:
        parameters = f"{f' {comma} '.join(required)} {followers[0]}"
    else:
        firsts = [f"{first} {rest}" for first, rest in zip(optional, followers[1:], strict=True)]
        parameters = f"({' | '.join(firsts)})?" if firsts else ""
    return f"{quote(tool.name + '(')} {parameters} {quote(')')}"


def _parameter_rules(tool: Tool, index: int) -> list[str]:
    """Returns one rule per parameter, so that the grammar does not repeat its expression for each position."""
    return [
        f"{_rule_name(index, number)}: {quote(name + '=')} {_literal(schema, tool.strict)}"
        for number, (name, schema, _) in enumerate(properties(tool))
    ]


def _rule_name(tool: int, parameter: int) -> str:
    return f"call_{tool}_parameter_{parameter}"


def _literal(schema: Any, strict: bool) -> str:
    """Returns the Lark expression of a literal. The parser reads JSON's words for True, False and None as well."""
    is_plain = isinstance(schema, Mapping) and not schema.keys() & {"enum", "const", "anyOf", "oneOf", "allOf", "$ref"}
    if is_plain and schema.get("type") == "boolean":
        return f"({quote('True')} | {quote('False')})"
    return value(schema, strict)
