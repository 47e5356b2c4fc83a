"""Every output of a model with random logits is valid for the schema that it was asked to follow.

jsonschema-rs, which shares no code with llguidance, decides what is valid.
"""

import json
from decimal import Decimal
from typing import Any

import jsonschema_rs
import pytest
import torch
from torch import Tensor

from rtp_llm.contract.request import Request
from rtp_llm.text import grammar
from rtp_llm.text.json_schema import GrammarError, closed, prepare
from tests.quick import slow_except
from tests.structured.random_text import Vocabulary
from tests.structured.schemas import SCHEMAS, Schema

SEEDS = range(3)


def test_there_are_many_schemas() -> None:
    assert len(SCHEMAS) >= 150


@pytest.mark.parametrize(
    "name", slow_except(SCHEMAS, *(name for name in SCHEMAS if not name.startswith("object with ")))
)
def test_every_output_is_valid(name: str, vocabulary: Vocabulary) -> None:
    schema = SCHEMAS[name]
    text_grammar = grammar.from_json_schema(schema)
    grammar.check(text_grammar)
    for seed in SEEDS:
        request = vocabulary.request(text_grammar, seed=seed)
        text = vocabulary.generate(request)
        assert request.tokens[-1] in vocabulary.eos_ids, f"does not end: {text[:500]!r}"
        check(schema, text)


def check(schema: Schema, text: str) -> None:
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    validator.validate(json.loads(text, parse_float=Decimal))


def test_a_model_that_wants_only_newlines_comes_to_an_end(vocabulary: Vocabulary) -> None:
    """Each gap between two tokens of the JSON takes one line break at most, so the text ends and is valid."""
    lines = [t for t in range(vocabulary.tokenizer.vocab_size) if vocabulary.tokenizer.token_bytes(t)[:1] == b"\n"]

    def make_logits(request: Request) -> Tensor:
        logits = vocabulary.brief_logits(request)
        logits[lines] += 100
        return logits

    for name in ("person", "matrix", "any object", "pydantic"):
        request = vocabulary.request(grammar.from_json_schema(SCHEMAS[name]), temperature=0.0)
        text = vocabulary.generate(request, make_logits)
        assert request.tokens[-1] in vocabulary.eos_ids
        assert "\n" in text
        assert "\n\n" not in text
        check(SCHEMAS[name], text)


def test_text_outside_the_schema_would_be_found(vocabulary: Vocabulary) -> None:
    """The judge refuses what the grammar of another schema allows."""
    text = vocabulary.generate(vocabulary.request(grammar.from_json_schema({"type": "integer", "minimum": 10})))
    with pytest.raises(jsonschema_rs.ValidationError):
        check({"type": "integer", "maximum": 9}, text)


def test_padding_ids_of_the_model_are_never_sampled(vocabulary: Vocabulary) -> None:
    def make_logits(request: Request) -> Tensor:
        logits = vocabulary.brief_logits(request)
        logits[vocabulary.tokenizer.vocab_size :] += 100
        return logits

    request = vocabulary.request(grammar.from_json_schema(SCHEMAS["person"]))
    check(SCHEMAS["person"], vocabulary.generate(request, make_logits))
    assert max(request.output) < vocabulary.tokenizer.vocab_size
    assert torch.isfinite(make_logits(request)).all()


def test_closed_objects_have_no_other_names() -> None:
    inner = {"type": "object", "properties": {"a": {}}}
    schema = {"properties": {"x": inner, "y": {"items": inner}}, "required": ["x"]}
    shut = {**inner, "additionalProperties": False}
    assert closed(schema) == {
        "properties": {"x": shut, "y": {"items": shut}},
        "required": ["x"],
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"type": "object"},
        {"properties": {"a": {}}, "additionalProperties": {"type": "string"}},
        {"properties": {"a": {}}, "required": ["b"]},
        {"properties": {"a": {}}, "allOf": [{"required": ["b"]}]},
        {"properties": {"a": {}}, "patternProperties": {"^x": {}}},
    ],
)
def test_what_says_otherwise_stays_open(schema: Any) -> None:
    assert closed(schema) == schema


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "integer", "multipleOf": 999983}, "multipleOf"),
        ({"items": {"properties": ["a"]}}, "properties"),
        ({"required": [["a"]]}, "required"),
        ({"anyOf": 5}, "anyOf"),
        ({"properties": {"a": {"type": [["string"]]}}}, "type"),
        ({"format": []}, "format"),
    ],
)
def test_what_is_malformed_or_too_large_is_refused_by_name(schema: dict[str, Any], keyword: str) -> None:
    with pytest.raises(GrammarError, match=keyword):
        prepare(schema)


@pytest.mark.parametrize("divisor", [0.01, 0.25, 5, 1000, 2.5])
def test_usual_divisors_are_enforced(divisor: float) -> None:
    assert prepare({"type": "number", "multipleOf": divisor})["multipleOf"] == divisor
