"""Grammars of all kinds, followed by a model with random logits: choices, GBNF, tags, reasoning, tool calls."""

import json
import re
from typing import Any

import jsonschema_rs
import pytest
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from torch import Tensor

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SampledRows
from rtp_llm.layers.sampler import Sampler
from rtp_llm.text import grammar
from rtp_llm.text.grammar import Reasoning, Tag
from rtp_llm.text.json_schema import GrammarError
from tests import random_model
from tests.structured.random_text import CPU, MAX_SEQ_LEN, Vocabulary
from tests.structured.schemas import ADDRESS, INTEGER, STRING, closed

MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
TOKEN_THINK = Reasoning("<think>", "</think>", "inside")
TEXT_THINK = Reasoning("<", ">", "inside")  # ordinary text
ANSWER = grammar.from_json_schema(closed({"n": {"type": "integer", "minimum": 10, "maximum": 99}}))
SEEDS = range(6)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """A vocabulary in which the markers of reasoning and calls are added tokens, not special ones, as in Qwen3."""
    directory = tmp_path_factory.mktemp("marked") / "model"
    random_model.write(directory)
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in MARKERS])
    backend.save(str(directory / "tokenizer.json"))
    return Vocabulary(directory)


def texts(vocabulary: Vocabulary, text_grammar: str, bonus: dict[str, float] | None = None) -> list[str]:
    """Returns texts of several seeds. `bonus`: what the logits of these texts' tokens are raised by."""
    raised = torch.zeros(vocabulary.size)
    for text, value in (bonus or {}).items():
        for token in vocabulary.tokenizer.encode(text, add_special_tokens=False):
            raised[token] = value

    def make_logits(request: Request) -> Tensor:
        return vocabulary.brief_logits(request) + raised

    grammar.check(text_grammar)
    requests = [vocabulary.request(text_grammar, seed=seed, max_tokens=600) for seed in SEEDS]
    found = [vocabulary.generate(request, make_logits) for request in requests]
    assert all(request.tokens[-1] in vocabulary.eos_ids for request in requests), found
    return found


CHOICES = ["yes", "no", 'say "maybe"\n', "naïve 数据 \U0001f600", "</think>", "a\\b"]


def test_a_choice_is_one_of_the_texts(vocabulary: Vocabulary) -> None:
    found = texts(vocabulary, grammar.from_choice(CHOICES))
    assert set(found) <= set(CHOICES)
    assert len(set(found)) > 1
    for choice in CHOICES:
        assert texts(vocabulary, grammar.from_choice([choice])) == [choice] * len(SEEDS)


@pytest.mark.parametrize("pattern", [r"[a-c]{2,4}-\d\d", r"(red|green)( light)?", r"\w{3}", r"[^x]{5}", r"ü+ß{2}"])
def test_a_regular_expression_matches_the_whole_text(vocabulary: Vocabulary, pattern: str) -> None:
    for text in texts(vocabulary, grammar.from_regex(pattern), {"ends": 0}):
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize(
    "source",
    [
        'root ::= greeting " " name\ngreeting ::= "Hello" | "Bye"\nname ::= [A-Z] [a-z]{1,3}',  # GBNF
        'start: GREETING " " NAME\nGREETING: "Hello" | "Bye"\nNAME: /[A-Z][a-z]{1,3}/',  # Lark
    ],
)
def test_gbnf_and_lark(vocabulary: Vocabulary, source: str) -> None:
    for text in texts(vocabulary, grammar.from_ebnf(source)):
        assert re.fullmatch("(Hello|Bye) [A-Z][a-z]{1,3}", text), text


def test_whitespace_can_be_forbidden(vocabulary: Vocabulary) -> None:
    for text in texts(vocabulary, grammar.from_json_schema(ADDRESS, whitespace="")):
        assert text == json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize("reasoning", [TOKEN_THINK, TEXT_THINK], ids=["tokens", "text"])
def test_the_grammar_begins_after_the_reasoning(marked: Vocabulary, reasoning: Reasoning) -> None:
    combined = grammar.combine(marked.tokenizer, content=ANSWER, reasoning=reasoning)
    bonus = {reasoning.close: 9.0}
    for text in texts(marked, combined, bonus):
        thought, _, answer = text.partition(reasoning.close)
        assert reasoning.close not in thought
        assert 10 <= json.loads(answer)["n"] <= 99
        assert re.match(r"[ \n]{0,2}\{", answer)
    assert len({text.partition(reasoning.close)[0] for text in texts(marked, combined, bonus)}) > 3


@pytest.mark.parametrize("reasoning", [TOKEN_THINK, TEXT_THINK], ids=["tokens", "text"])
def test_the_model_may_think_or_answer_at_once(marked: Vocabulary, reasoning: Reasoning) -> None:
    optional = Reasoning(reasoning.open, reasoning.close, "optional")
    combined = grammar.combine(marked.tokenizer, content=ANSWER, reasoning=optional)
    found = texts(marked, combined, {reasoning.close: 9.0})
    found += texts(marked, combined, {reasoning.open: 30.0, reasoning.close: 40.0})
    for text in found:
        answer = text.rpartition(reasoning.close)[2]
        assert text.startswith(reasoning.open) == (reasoning.close in text)
        assert 10 <= json.loads(answer)["n"] <= 99
    assert any(text.startswith(reasoning.open) for text in found)
    assert any(text.startswith("{") for text in found)


def calls(vocabulary: Vocabulary) -> str:
    """Returns the rules of a tool format as in `text.tool_formats`: one call of one tool."""
    opened, closed_by = (grammar.marker(marker, vocabulary.tokenizer) for marker in ("<tool_call>", "</tool_call>"))
    schema = closed({"name": {"const": "add"}, "n": {"type": "integer", "minimum": 0, "maximum": 9}})
    return "\n".join(
        [
            f"calls: {opened} call_body",
            f"call_body: {grammar.json_rule(schema)} {closed_by}",
            grammar.text_until("call_head", "<tool_call>", vocabulary.tokenizer),
            "answer: (call_head call_body)* TEXT",
        ]
    )


CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def test_a_required_call_is_the_whole_answer(marked: Vocabulary) -> None:
    combined = grammar.combine(marked.tokenizer, calls=calls(marked), choice="required", content=ANSWER)
    for text in texts(marked, combined):
        found = CALL.fullmatch(text)
        assert found, text
        assert json.loads(found[1])["name"] == "add"


def test_with_tools_on_auto_a_call_or_the_schema_is_allowed(marked: Vocabulary) -> None:
    combined = grammar.combine(marked.tokenizer, calls=calls(marked), choice="auto", content=ANSWER)
    found = texts(marked, combined) + texts(marked, combined, {"<tool_call>": 30.0})
    for text in found:
        assert (CALL.fullmatch(text) is not None) != (text.startswith("{") and 10 <= json.loads(text)["n"] <= 99), text
    assert any(text.startswith("{") for text in found)
    assert any(text.startswith("<tool_call>") for text in found)


def test_with_strict_tools_on_auto_only_what_a_call_begins_is_constrained(marked: Vocabulary) -> None:
    combined = grammar.combine(marked.tokenizer, calls=calls(marked), choice="auto", reasoning=TOKEN_THINK)
    found = texts(marked, combined, {"</think>": 9.0, "<tool_call>": 9.0, "<|im_end|>": 7.0})
    bodies = [body for text in found for body in CALL.findall(text)]
    assert len(bodies) > 2
    assert all(json.loads(body)["name"] == "add" for body in bodies)
    assert any(CALL.sub("", text.partition("</think>")[2]) for text in found), "no text beside the calls"


def test_without_a_constraint_there_is_no_grammar(marked: Vocabulary) -> None:
    assert grammar.combine(marked.tokenizer, reasoning=TOKEN_THINK) == ""
    assert grammar.combine(marked.tokenizer, calls=calls(marked), choice="none") == ""
    assert grammar.combine(marked.tokenizer, content=ANSWER) == ANSWER


def test_text_between_tags_is_free(marked: Vocabulary) -> None:
    tags = [Tag("<tool_call>add:", closed({"n": INTEGER}), "</tool_call>"), Tag("<tool_call>say:", STRING, "!")]
    found = texts(
        marked, grammar.from_tags(tags, ["<tool_call>"], marked.tokenizer), {"<tool_call>": 7.0, "<|im_end|>": 5.0}
    )
    begun = [part for text in found for part in text.split("<tool_call>")[1:]]
    assert len(begun) > 2
    for part in begun:
        name, _, rest = part.partition(":")
        value, _ = json.JSONDecoder().raw_decode(rest)
        jsonschema_rs.validator_for(tags[("add", "say").index(name)].schema).validate(value)


REFUSED: list[tuple[Any, str]] = [
    ({"not": {"type": "null"}}, '"not"'),
    ({"if": {}, "then": {}}, '"if"'),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    (closed({"a": {"contains": {}}}), "contains"),
    ({"oneOf": [INTEGER, {"type": "number"}]}, "oneOf"),
    ({"type": "string", "format": "iri-reference"}, "iri-reference"),
    ({"type": "object", "minProperties": 2}, "minProperties"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
    ({"$ref": "http://example.com/schema.json"}, "example.com"),
    ({"type": "strin"}, "strin"),
    ({"enum": []}, "nsatisfiable"),
    (False, "is false"),
    ([1], "list"),
    ("{", "not JSON"),
    ({"const": "\ud800"}, "escape"),
]


@pytest.mark.parametrize(("schema", "named"), REFUSED, ids=str)
def test_what_cannot_be_enforced_is_refused_by_name(schema: Any, named: str) -> None:
    with pytest.raises(GrammarError) as error:
        grammar.check(grammar.from_json_schema(schema))
    assert named in str(error.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "format": "password"},
        {"type": "array", "uniqueItems": False, "maxItems": 1},
        {"x-vendor": 1, "title": "t", "type": "null"},
        {"properties": {"format": INTEGER, "not": STRING, "minProperties": INTEGER}},  # names, not keywords
        True,
        '{"type": "integer"}',
    ],
    ids=str,
)
def test_what_constrains_nothing_is_accepted(schema: Any) -> None:
    grammar.check(grammar.from_json_schema(schema))


def test_options_of_llguidance_in_a_schema_have_no_effect() -> None:
    with pytest.raises(GrammarError, match="uniqueItems"):
        grammar.check(grammar.from_json_schema({"uniqueItems": True, "x-guidance": {"lenient": True}}))


def test_what_llguidance_may_not_bound_is_known() -> None:
    for schema in (
        {"type": "string", "pattern": "a+"},
        {"type": "object", "patternProperties": {"^a": {}}},
        {"allOf": [{"type": "string"}]},
        {"type": "number", "multipleOf": 0.1},
    ):
        assert not grammar.is_bounded(grammar.from_json_schema(schema))
        assert not grammar.is_bounded(grammar.from_lark(f"start: {grammar.json_rule(schema)}"))
    assert not grammar.is_bounded(grammar.from_lark("start: A & B\nA: /a+/\nB: /b+/"))
    notes = {"type": "object", "properties": {"notes": {"type": "string", "description": "not a pattern"}}}
    assert grammar.is_bounded(grammar.from_json_schema(notes))


def test_a_schema_nested_without_end_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(GrammarError, match="nested"):
        grammar.from_json_schema(schema)


@pytest.mark.parametrize(
    "source", ["hello world", 'root ::= "a', "root ::= missing", 'start: <|nope|> "a"', 'start: "a" (']
)
def test_a_malformed_grammar_is_refused(source: str) -> None:
    with pytest.raises(GrammarError):
        grammar.check(grammar.from_ebnf(source))


def test_long_grammars_are_refused() -> None:
    with pytest.raises(GrammarError, match="at most 131072"):
        grammar.check(grammar.from_json_schema({"enum": [f"{number:090}" for number in range(2000)]}))
    with pytest.raises(GrammarError, match="at most 16384"):
        grammar.from_ebnf("root ::= " + '"a" ' * 5000)


def test_greedy_text_does_not_depend_on_the_company(vocabulary: Vocabulary) -> None:
    """Greedy rows with nothing but grammars are sampled in another way than those beside others."""
    patterns = ("[0-9]{4}", "(ab|cd){3}", ".{6}")

    def outputs(*others: Request) -> list[list[int]]:
        requests = [vocabulary.request(grammar.from_regex(p), seed=i, temperature=0.0) for i, p in enumerate(patterns)]
        sampler = Sampler(len(requests) + len(others), vocabulary.size, CPU)
        slots = dict(enumerate([*requests, *others]))
        for slot, request in slots.items():
            sampler.reset(slot, request)
        while running := {slot: r for slot, r in slots.items() if not r.finish_reason(MAX_SEQ_LEN)}:
            logits = torch.stack([vocabulary.brief_logits(request) for request in running.values()])
            logits[:, vocabulary.eos_ids] = -torch.inf  # the end of a grammar comes all the same
            rows = SampledRows.build(list(running), [len(request.tokens) for request in running.values()])
            for sampled in sampler.accept_drafts(sampler.sample(logits, rows), rows):
                assert not sampled.failed
                slots[sampled.slot].tokens += sampled.token_ids
        return [request.output for request in requests]

    penalized = vocabulary.request("start: /.*/", max_tokens=20, presence_penalty=1.0)
    penalized.matcher = None
    assert outputs() == outputs(penalized)
