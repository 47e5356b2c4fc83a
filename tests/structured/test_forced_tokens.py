"""Tokens that a grammar forces are drafts: fewer steps, and to the bit the same tokens and logprobs."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.contract.request import Request
from rtp_llm.engine.engine import Engine
from rtp_llm.text import grammar
from tests.model import drive
from tests.structured.random_text import Vocabulary
from tests.structured.schemas import SHORT, array, closed
from tests.structured.test_engine import FEW_BLOCKS, make_request, running_engine

ITEM = closed({"article_number": {"type": "integer", "minimum": 1, "maximum": 99}, "is_available": {"type": "boolean"}})
ORDER = closed(
    {
        "preferred_delivery_window": {"enum": ["in the morning", "in the evening"]},
        "customer_identification": SHORT,
        "requested_articles": array(ITEM, 1, 2),
    }
)
CALL = 'start: "<call>\\n{\\"name\\": \\"get_the_weather\\", \\"arguments\\": " args "}\\n</call>"\nargs: /[a-c]{1,9}/'
SETTINGS: list[dict[str, Any]] = [{}, {"rtp_pipeline_depth": 1}, FEW_BLOCKS, {"max_batch_tokens_size": 7}]


def make_requests(vocabulary: Vocabulary, temperature: float) -> list[Request]:
    """Returns requests that draft at different times, some with the fields that count or forbid tokens, some free."""
    tokenizer, order = vocabulary.tokenizer, grammar.from_json_schema(ORDER)
    common: dict[str, Any] = {"temperature": temperature, "max_tokens": 200}
    return [
        *(make_request(tokenizer, f"order {n}", order, seed=n, **common) for n in range(3)),
        make_request(tokenizer, "dense", grammar.from_json_schema(ORDER, ""), logprobs=2, **common),
        make_request(tokenizer, "call", grammar.from_lark(CALL), min_tokens=60, **common),
        make_request(tokenizer, "short", order, temperature=temperature, max_tokens=21),
        make_request(tokenizer, "penalties", order, repetition_penalty=1.3, presence_penalty=0.5, top_p=0.9, **common),
        make_request(tokenizer, "free", "", temperature=temperature, max_tokens=40),
    ]


def generate(engine: Engine, requests: Sequence[Request]) -> tuple[dict[str, Any], int]:
    """Returns what clients see of each request, and the number of steps."""
    completions = drive.run(engine, requests)
    return {id: (c.tokens, c.logprobs, c.finish) for id, c in completions.items()}, engine.num_steps


@pytest.fixture(scope="module")
def without_drafts(checkpoint: Path, vocabulary: Vocabulary) -> Callable[[int, float], Any]:
    """What clients see of each request, by TP size and temperature."""

    @cache
    def expected(tp_size: int, temperature: float) -> Any:
        with running_engine(checkpoint, tp_size, has_drafts=False) as engine:
            return generate(engine, make_requests(vocabulary, temperature))[0]

    return expected


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafts_change_nothing_but_the_steps(
    checkpoint: Path,
    vocabulary: Vocabulary,
    without_drafts: Callable[[int, float], Any],
    temperature: float,
    tp_size: int,
    settings: dict[str, Any],
) -> None:
    expected = without_drafts(tp_size, temperature)
    with running_engine(checkpoint, tp_size, **settings) as engine:
        completions, _ = generate(engine, make_requests(vocabulary, temperature))
        if settings is FEW_BLOCKS:
            assert engine.scheduler.stats.preemptions, "nothing is preempted, so nothing is tested"
    assert completions == expected
    assert len(completions["dense"][1]) == len(completions["dense"][0])
    assert sum(finish == "stop" for _, _, finish in completions.values()) >= 4


@pytest.mark.parametrize("depth", [0, 1])
def test_forced_texts_save_steps(checkpoint: Path, vocabulary: Vocabulary, depth: int) -> None:
    steps = {}
    for has_drafts in (False, True):
        with running_engine(checkpoint, has_drafts=has_drafts, rtp_pipeline_depth=depth) as engine:
            request = make_request(vocabulary.tokenizer, "r", grammar.from_json_schema(ORDER, ""), max_tokens=200)
            completions, steps[has_drafts] = generate(engine, [request])
            stats = engine.scheduler.stats
    assert completions["r"][2] == "stop"
    assert steps[False] == pytest.approx(len(completions["r"][0]), abs=2)
    assert steps[True] < 0.6 * steps[False]
    assert stats.draft_tokens == stats.accepted_tokens == pytest.approx(steps[False] - steps[True], abs=2)


def test_a_step_with_many_drafts_is_short(checkpoint: Path, vocabulary: Vocabulary) -> None:
    """Requests beside them must not wait for the work of all that could be drafted."""
    with running_engine(checkpoint, max_batch_tokens_size=512, rtp_pipeline_depth=0) as engine:
        for request in make_requests(vocabulary, 0.8):
            assert engine.add(request) is None
        tokens = []
        while engine.has_work:
            is_decoding = all(request.num_output_tokens for request in engine.scheduler.running)
            is_prompt = engine.num_waiting or not is_decoding
            engine.step()
            tokens += [] if is_prompt else [engine.last_step_tokens]
    assert 8 < max(tokens) <= 8 + 16


def test_a_reasoning_budget_goes_before_the_grammar(checkpoint: Path, vocabulary: Vocabulary) -> None:
    """The budget forces the end of the reasoning where the grammar forces something else: the draft is rejected."""
    tokenizer = vocabulary.tokenizer
    end = tuple(tokenizer.encode("</t>", add_special_tokens=False))
    texts = []
    for has_drafts in (False, True):
        with running_engine(checkpoint, has_drafts=has_drafts) as engine:
            request = make_request(
                tokenizer,
                "r",
                grammar.from_lark(r'start: TEXT "</t>a long text that is forced"' + "\nTEXT: /[a-d]{0,40}/"),
                reasoning_budget=7,
                reasoning_end=end,
            )
            texts.append(generate(engine, [request])[0])
    assert texts[0] == texts[1]
    assert tokenizer.decode(texts[0]["r"][0]).count("</t>a long text that is forced")
