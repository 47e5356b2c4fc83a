"""Forced calls of a model with random logits: each format's own parser reads them, and the arguments are valid."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import jsonschema_rs
import pytest
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from rtp_llm.contract.request import Request
from rtp_llm.text import grammar
from rtp_llm.text.grammar import Reasoning, combine
from rtp_llm.text.json_schema import GrammarError
from rtp_llm.text.tool_formats import TOOL_FORMATS
from rtp_llm.text.tools import Tool
from tests import random_model
from tests.quick import slow_except
from tests.structured.random_text import Vocabulary
from tests.text.answers import Sum, parse

TOOLS = [
    Tool(
        "search",
        {
            "type": "object",
            "properties": {
                "query": {"type": "string"},
                "limit": {"type": "integer", "minimum": 1, "maximum": 50},
                "exact": {"type": "boolean"},
                "kind": {"enum": ["page", "true", 7, None]},
                "after": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "order": {"anyOf": [{"const": "asc"}, {"$ref": "#/$defs/field"}]},
                "tags": {"type": "array", "items": {"$ref": "#/$defs/field"}, "maxItems": 2},
                "where": {
                    "type": "object",
                    "properties": {"site": {"type": "string"}, "deep": {"type": "boolean"}},
                    "required": ["deep"],
                    "additionalProperties": False,
                },
            },
            "required": ["query", "kind", "where", "order"],
            "additionalProperties": False,
            "$defs": {"field": {"type": "string", "enum": ["title", "date"]}},
        },
        strict=True,
    ),
    Tool("now", {}),
    Tool(
        "set_alarm",
        {
            "type": "object",
            "properties": {
                "at": {"type": "number", "minimum": 0, "maximum": 24},
                "loud": {"type": ["boolean", "null"]},
            },
            "additionalProperties": False,
            "not": {"required": ["never"]},  # no grammar can enforce it, and the tool is not strict
        },
    ),
]
SCHEMAS = {tool.name: tool.parameters or {"additionalProperties": False} for tool in TOOLS}
SEEDS = range(16)
VALUE_END = "\n</parameter>\n"  # which a random model would never come upon


@pytest.fixture(scope="module", params=slow_except(["tokens", "text"], "text"))
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """A vocabulary whose markers are tokens, and one in which they are text like any other."""
    directory = tmp_path_factory.mktemp("tools") / "model"
    random_model.write(directory)
    if request.param == "tokens":
        backend = Backend.from_file(str(directory / "tokenizer.json"))
        markers = {marker for tool_format in TOOL_FORMATS.values() for marker in tool_format.markers}
        is_special = {marker: not marker.endswith("tool_call>") for marker in sorted(markers)}
        backend.add_tokens([AddedToken(m, special=s, normalized=False) for m, s in is_special.items()])
        backend.save(str(directory / "tokenizer.json"))
    return Vocabulary(directory)


def answers(
    vocabulary: Vocabulary, name: str, text_grammar: str, wishes: Sequence[str] = (), eagerness: int = 4
) -> list[Sum]:
    """Returns the parsed answers of several seeds.

    wishes     texts that the model likes to write
    eagerness  to end
    """
    grammar.check(text_grammar)
    tokenizer, found = vocabulary.tokenizer, []
    wishes = [*wishes, VALUE_END] if name == "qwen3_coder" else wishes
    texts = [tokenizer.token_text(token) for token in range(tokenizer.vocab_size)]

    @cache
    def tokens_of(text: str) -> list[int]:
        return [token for token, piece in enumerate(texts) if piece and text.startswith(piece)]

    def make_logits(request: Request) -> torch.Tensor:
        logits = vocabulary.brief_logits(request)
        logits[list(vocabulary.eos_ids)] += eagerness
        tail = tokenizer.decode(request.output[-40:], skip_special_tokens=False)
        for wish in wishes:
            written = next((n for n in range(len(wish) - 1, 0, -1) if tail.endswith(wish[:n])), 0)
            logits[tokens_of(wish[written:])] += 20 if written else 6
        return logits

    for seed in SEEDS:
        request = vocabulary.request(text_grammar, seed=seed, max_tokens=1500)
        text = vocabulary.generate(request, make_logits)
        assert request.tokens[-1] in vocabulary.eos_ids, text[-1000:]
        found.append(parse(TOOL_FORMATS[name].parser(TOOLS), text))
    return found


def check_calls(answer: Sum) -> None:
    for call in answer.calls:
        jsonschema_rs.validator_for(dict(SCHEMAS[call.name])).validate(json.loads(call.arguments))


def calls_grammar(vocabulary: Vocabulary, name: str, tools: Sequence[Tool], choice: Any, parallel: bool = True) -> str:
    tokenizer = vocabulary.tokenizer
    calls = TOOL_FORMATS[name].grammar(tools, parallel, tokenizer)
    return combine(tokenizer, calls=calls, choice=choice)


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_required_calls_are_valid(vocabulary: Vocabulary, name: str) -> None:
    text_grammar = calls_grammar(vocabulary, name, TOOLS, "required")
    found = answers(vocabulary, name, text_grammar)
    for answer in found:
        assert answer.calls
        assert not answer.content
        check_calls(answer)
    assert {call.name for answer in found for call in answer.calls} == SCHEMAS.keys()


TWO_CALLS = {
    "hermes": '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=now>\n</function>\n</tool_call>\n"
    "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "llama3_json": '{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}',
    "pythonic": "[now(), now()]",
    "mistral": '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]',
}


@pytest.mark.parametrize("choice", ["required", "auto"])
@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_several_calls_are_allowed_unless_they_must_not_be_parallel(
    vocabulary: Vocabulary, name: str, choice: str
) -> None:
    text = TWO_CALLS[name]
    if name == "mistral" and vocabulary.tokenizer.token_id("[ARGS]"):
        text = "[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now[ARGS]{}"
    tokens = vocabulary.tokenizer.encode(text, add_special_tokens=False)
    for parallel in (True, False):
        matcher = vocabulary.request(calls_grammar(vocabulary, name, TOOLS, choice, parallel)).matcher
        assert matcher
        assert (matcher.try_consume_tokens(tokens) == len(tokens)) == parallel
        assert not parallel or matcher.is_accepting()


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize("tool", slow_except(TOOLS, *TOOLS[1:]), ids=lambda tool: tool.name)
def test_a_named_function_is_called_once(vocabulary: Vocabulary, name: str, tool: Tool) -> None:
    text_grammar = calls_grammar(vocabulary, name, [tool], "required", parallel=False)
    for answer in answers(vocabulary, name, text_grammar):
        assert [call.name for call in answer.calls] == [tool.name]
        assert not answer.content
        check_calls(answer)


START = {"hermes": "<tool_call>", "qwen3_coder": "<tool_call>", "mistral": "[TOOL_CALLS]"}
START |= {"llama3_json": "\n{", "pythonic": "\n["}


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize("parallel", [True, False])
def test_with_auto_there_is_text_and_each_call_is_valid(vocabulary: Vocabulary, name: str, parallel: bool) -> None:
    text_grammar = calls_grammar(vocabulary, name, TOOLS, "auto", parallel)
    found = answers(vocabulary, name, text_grammar, [START[name]], eagerness=7)
    for answer in found:
        check_calls(answer)
        assert parallel or len(answer.calls) <= 1
    assert any(answer.calls for answer in found)


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_strict_schema_that_cannot_be_enforced_is_refused(vocabulary: Vocabulary, name: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "if": {"required": ["a"]}, "then": False}
    with pytest.raises(GrammarError, match="if"):
        grammar.check(calls_grammar(vocabulary, name, [Tool("f", schema, strict=True)], "required"))
    grammar.check(calls_grammar(vocabulary, name, [Tool("f", schema)], "required"))


def test_qwen3_coder_cannot_enforce_the_pattern_of_a_text(vocabulary: Vocabulary) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^a+$"}}}
    with pytest.raises(GrammarError, match="pattern"):
        TOOL_FORMATS["qwen3_coder"].grammar([Tool("f", schema, strict=True)], True, vocabulary.tokenizer)


def test_calls_follow_reasoning(vocabulary: Vocabulary) -> None:
    calls = TOOL_FORMATS["hermes"].grammar(TOOLS, True, vocabulary.tokenizer)
    reasoning = Reasoning("<think>", "</think>", "optional")
    grammar.check(combine(vocabulary.tokenizer, calls=calls, choice="required", reasoning=reasoning))
