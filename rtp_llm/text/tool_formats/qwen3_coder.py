"""Qwen3-Coder: XML tags for the function and for each parameter; values are text without quotes
(huggingface.co/Qwen/Qwen3-Coder-30B-A3B-Instruct, chat_template.jinja).
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rtp_llm.text.grammar import marker, quote
from rtp_llm.text.json_schema import GrammarError
from rtp_llm.text.scanner import Reading
from rtp_llm.text.tokenizer import Tokenizer
from rtp_llm.text.tool_formats.call_grammar import marked_calls, properties, value
from rtp_llm.text.tool_formats.tool_format import ToolCallParser, ToolFormat
from rtp_llm.text.tools import Tool, json_types

_NAME = re.compile(r"[^<>\n]*")
# Models forget the closing tag of a value at times. The newline before it is not part of the value.
_VALUE_ENDS = ("\n</parameter>", "</parameter>", "\n<parameter=", "\n</function>")
_NEWLINE = "\n"
_ENFORCED = frozenset({"type", "enum", "const", "title", "description", "default", "examples", "$defs", "definitions"})
# Text without what ends a value early.
_CALL_VALUE = r"CALL_VALUE: /(.|\n)*/ & ~/(.|\n)*\n<(parameter=|\/function>)(.|\n)*/"
_PYTHON_WORDS = {"True": True, "False": False, "None": None}


MAX_ALTERNATIVES_DEPTH = 3


class Qwen3CoderParser(ToolCallParser):
    starts = ("<tool_call>", "<function=")  # models leave out <tool_call> at times

    def read_calls(self, start: str) -> Reading[None]:
        scanner = self.scanner
        if start == "<tool_call>":
            yield from scanner.expect("<function=")
        name = yield from scanner.word(_NAME)
        yield from scanner.expect(">")
        self.begin_call(name.strip())
        separator = "{"
        yield from scanner.skip_space()
        while (yield from scanner.skip("<parameter=")):
            key = (yield from scanner.word(_NAME)).strip()
            yield from scanner.expect(">")
            self.add_arguments(f"{separator}{_text(key)}: ")
            yield from self._read_value(self.tools.get(name.strip()), key)
            separator = ", "
            yield from scanner.skip_space()
        if (yield from scanner.is_cut_off("<parameter=", "</function>")):
            return  # and the JSON shows it
        self.add_arguments("{}" if separator == "{" else "}")
        yield from scanner.skip("</function>")
        yield from scanner.skip_space()
        if not (yield from scanner.is_cut_off("</tool_call>")):
            yield from scanner.skip("</tool_call>")

    def _read_value(self, tool: Tool | None, key: str) -> Reading[None]:
        """Reads a value and adds it as JSON: text as it comes, other types when they are complete."""
        scanner, types = self.scanner, tool.types(key) if tool else frozenset({"string"})
        yield from scanner.skip("\n")
        if types == {"string"}:
            self.add_arguments('"')
            end = yield from scanner.until(_VALUE_ENDS, lambda text: self.add_arguments(_text(text)[1:-1]))
            self.add_arguments('"' if end else "")
        else:
            pieces: list[str] = []
            end = yield from scanner.until(_VALUE_ENDS, pieces.append)
            if end:
                self.add_arguments(_json_value("".join(pieces), types))
        yield from scanner.skip("\n")
        yield from scanner.skip("</parameter>")


def _json_value(text: str, types: frozenset[str]) -> str:
    """Returns the text as JSON of one of these types (empty: any type); as a string if it fits none of them."""
    word = text.strip()
    try:
        value = _PYTHON_WORDS[word] if word in _PYTHON_WORDS else json.loads(word, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _text(text)
    may_be_text = not types or "string" in types
    if may_be_text and (isinstance(value, str) or (types and types.isdisjoint(json_types(value)))):
        return _text(text)
    return json.dumps(value) if word in _PYTHON_WORDS else word


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class Qwen3CoderFormat(ToolFormat):
    name = "qwen3_coder"
    markers = ("<tool_call>", "</tool_call>")
    parser_class = Qwen3CoderParser

    def grammar(self, tools: Sequence[Tool], parallel: bool, tokenizer: Tokenizer) -> str:
        end = f"{quote('</function>' + _NEWLINE)} {marker('</tool_call>', tokenizer)}"
        value_end = f"{_NEWLINE}</parameter>{_NEWLINE}"
        bodies = []
        for tool in tools:
            parts = [quote(f"{_NEWLINE}<function={tool.name}>{_NEWLINE}")]
            for name, schema, is_required in properties(tool):
                part = f"{quote(f'<parameter={name}>{_NEWLINE}')} {_value_expression(tool, schema, value_end)}"
                parts.append(part if is_required else f"({part})?")
            bodies.append(" ".join([*parts, end]))
        rules = marked_calls("<tool_call>", _NEWLINE, bodies, parallel, tokenizer)
        return "\n".join((rules, _CALL_VALUE, 'call_text[lazy]: CALL_VALUE "</parameter>"'))

    def is_used_by(self, template: str) -> bool:
        return "<function=" in template and "<parameter=" in template


def _value_expression(tool: Tool, schema: Any, end: str, depth: int = 0) -> str:
    """Returns the Lark expression of a parameter's value with its end tag. Strings have no quotes; other types are
    JSON.

    Raises GrammarError for a keyword of a strict tool that cannot be enforced on a string without quotes.
    """
    schema = tool.resolved(schema)
    if isinstance(schema, Mapping) and isinstance(schema.get("anyOf"), list):
        if depth == MAX_ALTERNATIVES_DEPTH:
            raise GrammarError(
                f"tool {tool.name}: the JSON schema of a parameter nests anyOf too deeply; allowed: at most"
                f" {MAX_ALTERNATIVES_DEPTH} levels"
            )
        return f"({' | '.join(_value_expression(tool, item, end, depth + 1) for item in schema['anyOf'])})"
    if "string" not in tool.types_of(schema):
        return f"{value(schema, tool.strict)} {quote(end)}"
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and values:
        texts = [item if isinstance(item, str) else json.dumps(item) for item in values]
        return f"({' | '.join(quote(text + end) for text in texts)})"
    if tool.strict and (unknown := sorted(schema.keys() - _ENFORCED)):
        raise GrammarError(
            f"tool {tool.name}: the JSON schema's keyword {unknown[0]} cannot be enforced: this model writes string"
            " arguments without quotes; leave it out, or set strict to false"
        )
    return f"call_text {quote(_NEWLINE)}"
