"""Grammar rules that several tool call formats share, in llguidance's variant of Lark."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rtp_llm.text.grammar import MAX_CHARACTERS, json_rule, marker, quote, text_until
from rtp_llm.text.json_schema import GrammarError, closed, prepare
from rtp_llm.text.tokenizer import Tokenizer
from rtp_llm.text.tools import Tool

MAX_PARAMETERS = 64  # of a tool in a format that writes them one by one
_ROOT_KEYS = ("$defs", "definitions")


def arguments(tool: Tool) -> str:
    """Returns the Lark expression for the arguments of a call, a JSON object.

    Raises GrammarError if the tool is strict and its schema cannot be enforced.
    """
    return value({"type": "object", **parameters(tool)}, tool.strict)


def json_object(tool: Tool, arguments_key: str = "arguments") -> str:
    """Returns the Lark expression for a call that is a JSON object with the function's name and arguments."""
    begin = quote(f'{{"name": "{tool.name}", "{arguments_key}": ')
    return f"{begin} {arguments(tool)} {quote('}')}"


def parameters(tool: Tool) -> Mapping[str, Any]:
    """Returns the schema of a function's arguments. A function without one has no parameters, as in OpenAI's API."""
    return closed(tool.parameters) if tool.parameters else {"properties": {}, "additionalProperties": False}


def value(schema: Any, strict: bool) -> str:
    """Returns the Lark expression for a JSON value. Unless `strict`, ignores keywords that cannot be enforced.

    Raises GrammarError for a strict schema that cannot be enforced.
    """
    if strict:
        return json_rule(schema)
    try:
        prepared = prepare(schema)
    except GrammarError:
        prepared = prepare({"type": schema.get("type", "object")} if isinstance(schema, dict) else True)
    prepared["x-guidance"]["lenient"] = True
    return "%json " + json.dumps(prepared)


def properties(tool: Tool) -> list[tuple[str, Any, bool]]:
    """Returns (name, schema, is required) of each parameter, for formats that write parameters one by one.

    Raises GrammarError if a strict function's schema has keywords, such as `anyOf`, that a list of single parameters
    cannot enforce, or if there are too many parameters.
    """
    schema = parameters(tool)
    by_name, required = schema.get("properties") or {}, schema.get("required") or ()
    known = {"type", "properties", "required", "additionalProperties", "title", "description", "$schema", *_ROOT_KEYS}
    if tool.strict and (unknown := sorted(schema.keys() - known)):
        raise GrammarError(
            f"tool {tool.name}: the JSON schema's keyword {unknown[0]} cannot be enforced in this model's tool call"
            " format; leave it out, or set strict to false"
        )
    root = {key: schema[key] for key in _ROOT_KEYS if key in schema}
    if len(by_name) * len(json.dumps(root)) > MAX_CHARACTERS or len(by_name) > MAX_PARAMETERS:
        raise GrammarError(
            f"tool {tool.name} has {len(by_name)} parameters, and its grammar repeats the schema's $defs"
            f" ({len(json.dumps(root))} characters) for each; allowed: at most {MAX_PARAMETERS} parameters, and"
            f" {MAX_CHARACTERS} characters of $defs in all repetitions together"
        )
    return [
        (name, {**item, **root} if isinstance(item, dict) else item, name in required) for name, item in by_name.items()
    ]


def alternatives(bodies: Sequence[str]) -> list[str]:
    """Returns the Lark rules that define the rule `call_body` as any one of the Lark expressions `bodies`. Each of
    these matches the calls of one function.
    """
    names = [f"call_{index}" for index in range(len(bodies))]
    return [f"call_body: {' | '.join(names)}", *(f"{name}: {body}" for name, body in zip(names, bodies, strict=True))]


def marked_calls(start: str, separator: str, bodies: Sequence[str], parallel: bool, tokenizer: Tokenizer) -> str:
    """Returns the result of `ToolFormat.grammar` for a format in which each call begins with the marker `start`.

    bodies     for each function, the Lark expression of the rest of a call, after the marker
    separator  text between two calls
    parallel   whether several calls are allowed
    """
    return "\n".join(
        (
            *alternatives(bodies),
            f"calls: {repeated(f'{marker(start, tokenizer)} call_body', separator, parallel)}",
            text_until("call_head", start, tokenizer),
            f"answer: {'(call_head call_body)* TEXT' if parallel else 'TEXT | call_head call_body'}",
        )
    )


def line_start_answer(first: str) -> list[str]:
    """Returns the Lark rules that define the rule `answer` of `ToolFormat.grammar`: text, calls, or text before calls.

    The first line that starts with the character `first`, after spaces and tabs, begins the calls.
    """
    return [
        rf"CALL_LINE: /[ \t]*([^ \t\n\{first}][^\n]*)?/",
        r'CALL_TEXT: CALL_LINE ("\n" CALL_LINE)*',
        "answer: calls | CALL_TEXT calls?",
    ]


def repeated(expression: str, separator: str, parallel: bool) -> str:
    """Returns the Lark expression for one call, which `expression` matches; with `parallel`, for one or more calls with
    the text `separator` between them.
    """
    return f"{expression} ({quote(separator)} {expression})*" if parallel else expression
