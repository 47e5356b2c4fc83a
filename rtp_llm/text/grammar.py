"""Builds grammars for outputs, as strings for llguidance: JSON schemas, regular expressions, choices, Lark and GBNF.

A grammar string is the JSON form of a list of grammars, of which the first is the start (github.com/guidance-ai/
llguidance, docs/syntax.md). The API process builds and checks it; rank 0 compiles it for the model's tokens.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from rtp_llm.text import json_schema
from rtp_llm.text.json_schema import WHITESPACE, GrammarError
from rtp_llm.text.tokenizer import Tokenizer

MAX_CHARACTERS = 128 << 10  # of a grammar; to compile one of this size takes at most some tenths of a second
MAX_GBNF_CHARACTERS = 16 << 10  # of a grammar that Python code converts to Lark
MAX_ERROR_CHARACTERS = 300  # of llguidance's messages, which quote the grammar
TEXT = r"TEXT: /(.|\n)*/"
_TOKEN_ID = re.compile(r"<\[\d+\]>")
_LIMITS = LLParserLimits(verbose_errors=False)  # without the parser's state
# What llguidance checks by intersecting regular expressions, which can take it any time: a schema's patterns, formats
# and conditions, the operators & and ~ of Lark.
_UNBOUNDED = re.compile(r'[&~]|"(pattern|patternProperties|format|allOf|not|multipleOf)\\*"')
_BYTES = LLTokenizer("byte")  # has a token per byte: compiles a grammar without a model


@dataclass(frozen=True)
class Reasoning:
    """The reasoning that a response's grammar must allow: its markers, and whether the prompt has opened it ("inside")
    or the model may do so ("optional").
    """

    open: str
    close: str
    state: Literal["inside", "optional"]


@dataclass(frozen=True)
class Tag:
    """A structure of a request's `structural_tag`: the text `begin`, JSON that `schema` allows, and the text `end`. It
    may occur in otherwise free text; `grammar.from_tags` enforces it.
    """

    begin: str
    schema: Any
    end: str


def from_json_schema(schema: Any, whitespace: str = WHITESPACE) -> str:
    """Returns the grammar for JSON that a schema (an object, a boolean or JSON text) allows. `whitespace`: regular
    expression for the whitespace between two JSON tokens. Raises GrammarError if the schema cannot be enforced.
    """
    return _pack({"json_schema": json_schema.prepare(schema, whitespace)})


def from_regex(pattern: str) -> str:
    """Returns the grammar for texts that `pattern`, a regular expression in Rust's syntax, matches as a whole."""
    grammar: str = LLMatcher.grammar_from_regex(pattern)
    return grammar


def from_choice(choices: Sequence[str]) -> str:
    """Returns the grammar that allows exactly these texts."""
    return from_lark("start: " + " | ".join(map(quote, choices)))


def from_lark(lark: str) -> str:
    """Returns the grammar string of a grammar that is written in llguidance's variant of Lark."""
    return _pack({"lark_grammar": lark})


def from_ebnf(text: str) -> str:
    """Returns the grammar string of a grammar that is written in Lark or in GBNF, the EBNF variant of llama.cpp, which
    vLLM and SGLang use too. Raises GrammarError.
    """
    if len(text) > MAX_GBNF_CHARACTERS:
        raise GrammarError(f"the grammar has {len(text)} characters; at most {MAX_GBNF_CHARACTERS} are allowed")
    try:
        return from_lark(any_to_lark(text))
    except Exception as error:  # the converter raises various errors for what it cannot read
        raise GrammarError(f"the grammar is neither Lark nor GBNF: {error}") from None


def from_tags(tags: Sequence[Tag], triggers: Sequence[str], tokenizer: Tokenizer) -> str:
    """Returns the grammar for a request's `structural_tag`: free text, in which structures (`tags`) may occur.

    Once the text contains a trigger, it must go on with the rest of a tag whose `begin` starts with that trigger.
    Raises GrammarError if a schema cannot be enforced, if a trigger starts no tag, or if a tag has no trigger.
    """
    rules = [TEXT]
    for number, trigger in enumerate(triggers):
        bodies = [
            f"{marker(tag.begin[len(trigger) :], tokenizer)} {json_rule(tag.schema)} {marker(tag.end, tokenizer)}"
            for tag in tags
            if tag.begin.startswith(trigger)
        ]
        if not bodies:
            raise GrammarError(f"trigger {trigger[:80]!r} is not a prefix of the begin tag of any structure")
        rules += [
            text_until(f"until_{number}", trigger, tokenizer),
            f"tag_{number}: until_{number} ({' | '.join(bodies)})",
        ]
    for tag in tags:
        if not tag.begin.startswith(tuple(triggers)):
            raise GrammarError(f"no trigger is a prefix of the structure's begin tag {tag.begin[:80]!r}")
    alternatives = " | ".join(f"tag_{number}" for number in range(len(triggers)))
    return from_lark("\n".join([f"start: ({alternatives})* TEXT", *rules]))


def is_bounded(grammar: str) -> bool:
    """Returns whether `check` takes at most some tenths of a second for this grammar.

    It may take longer if llguidance has to intersect regular expressions, as for the keyword `pattern` of a JSON
    schema: llguidance does not limit the time for that.
    """
    return not _UNBOUNDED.search(grammar)


def check(grammar: str) -> None:
    """Raises GrammarError if llguidance cannot enforce a grammar, for example because of a keyword of a JSON schema, or
    if the grammar is too long. Releases the GIL.
    """
    if len(grammar) > MAX_CHARACTERS:
        raise GrammarError(f"the grammar has {len(grammar)} characters; at most {MAX_CHARACTERS} are allowed")
    # The tokenizer of bytes does not know the ids of the model's tokens.
    matcher = LLMatcher(_BYTES, _TOKEN_ID.sub(f"<[{_BYTES.eos_token}]>", grammar), log_level=0, limits=_LIMITS)
    if error := matcher.get_error():
        raise GrammarError(_explain(error))


# Parts of grammars with a model's markers


def quote(text: str) -> str:
    """Returns a text as a quoted string literal of Lark, the language of llguidance's grammars."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Any) -> str:
    """Returns the Lark expression for JSON that a schema allows. Raises GrammarError."""
    return "%json " + json.dumps(json_schema.prepare(schema))


def marker(text: str, tokenizer: Tokenizer) -> str:
    """Returns the Lark expression that matches `text`, such as "<tool_call>". A part of `text` that is the name of a
    special token, or of an added token in angle brackets, matches that token instead of its characters.
    """
    parts = tokenizer.split_markers(text)
    return " ".join(quote(part) if isinstance(part, str) else f"<[{part}]>" for part in parts)


def text_until(rule: str, text: str, tokenizer: Tokenizer) -> str:
    """Returns a Lark rule with the name `rule`, which matches any text up to and including the first `text`, a marker
    such as "</think>". The rule uses the terminal TEXT (any text), which the grammar must define.
    """
    end = marker(text, tokenizer)
    return f"{rule}: TEXT {end}" if end.startswith("<") else f"{rule}[lazy]: TEXT {end}"


def combine(
    tokenizer: Tokenizer,
    *,
    content: str = "",
    calls: str = "",
    choice: Literal["auto", "required", "none"] = "none",
    reasoning: Reasoning | None = None,
) -> str:
    """Returns the grammar for a whole response; empty if any text is allowed.

    content: grammar of the content; empty: any text.
    calls: Lark rules of tool calls; empty: no calls. The rule `calls` matches one or more calls, the rule `answer` any
        text, with or without calls in it. They may use the terminal TEXT (any text), which this function defines.
    choice: "required": only calls are allowed; "auto": calls or content; "none": only content.
    reasoning: the reasoning that the model may write before content and calls; None: it writes none.
    """
    if not calls or choice == "none":
        if not content or not reasoning:
            return content
        calls, body = "", "@content"
    elif choice == "required":
        content, body = "", "calls"
    else:
        body = "(calls | @content)" if content else "answer"
    rules = [f"start: {'reasoning ' if reasoning else ''}{body}", TEXT]
    if reasoning:
        rules += _reasoning_rules(reasoning, tokenizer)
    grammars = json.loads(content)["grammars"] if content else []
    return _pack({"lark_grammar": "\n".join([*rules, calls])}, *({**g, "name": "content"} for g in grammars))


def _reasoning_rules(reasoning: Reasoning, tokenizer: Tokenizer) -> Iterator[str]:
    if reasoning.state == "inside":
        yield r"reasoning: thought /[ \n]{0,2}/"
    else:
        yield rf"reasoning: ({marker(reasoning.open, tokenizer)} thought /[ \n]{{0,2}}/)?"
    yield text_until("thought", reasoning.close, tokenizer)


def _pack(*grammars: Mapping[str, Any]) -> str:
    return json.dumps({"grammars": grammars}, separators=(",", ":"))


def _explain(error: str) -> str:
    """Returns llguidance's message in terms of the request."""
    message = error.strip()[:MAX_ERROR_CHARACTERS]
    if keywords := re.search(r"Unimplemented keys: \[(.*)\]", message):
        return f"the JSON schema's keyword {keywords[1]} cannot be enforced; leave it out"
    if name := re.search(r"Unknown format: (.*)", message):
        return f"the JSON schema's format {name[1]!r} cannot be enforced; leave it out"
    if "oneOf constraints" in message:
        return "the JSON schema's keyword oneOf cannot be enforced, as its schemas overlap; use anyOf"
    return message
