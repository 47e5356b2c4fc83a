"""Logprobs are transformers' log_softmax, of the prompt and of the output, however the prompt is cut."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

from rtp_llm.contract.engine_output import Logprob
from rtp_llm.contract.request import Request
from tests.model import drive
from tests.model.conftest import Oracles
from tests.model.drive import Settings, greedy
from tests.model.oracle import NEW_TOKENS, TOLERANCE, Floats, Oracle, OracleAnswer
from tests.model.rank_pool import RankPool

TOP = 5


@pytest.fixture(scope="module", params=["llama-tied", "qwen3", "rope-dynamic"])
def oracle(request: pytest.FixtureRequest, oracles: Oracles) -> Oracle:
    return oracles(request.param)


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    table: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return table


def check(records: list[Logprob], tokens: list[int], logits: Floats, top: int) -> None:
    assert len(records) == len(tokens) == len(logits)
    for (value, rank, likeliest), token, table in zip(records, tokens, log_softmax(logits), strict=True):
        assert abs(value - table[token]) < TOLERANCE
        # Its rank among the others, give or take those that are as likely within the tolerance.
        assert (table > table[token] + TOLERANCE).sum() <= rank <= (table > table[token] - TOLERANCE).sum()
        assert [abs(table[t] - v) < TOLERANCE for t, v in likeliest] == [True] * top
        np.testing.assert_allclose([v for _, v in likeliest], np.sort(table)[::-1][:top], rtol=0, atol=TOLERANCE)
        assert len({t for t, _ in likeliest}) == top


def check_prompt(records: list[Logprob], answer: OracleAnswer, top: int) -> None:
    check(records, answer.prompt[1:], answer.prompt_logits[:-1], top)


@pytest.mark.parametrize("chunk", [7, 16, 48, 512])
@pytest.mark.parametrize("reuse_cache", [True, False])
def test_prompt_and_output(oracle: Oracle, chunk: int, reuse_cache: bool) -> None:
    engine = drive.alone(oracle.path, max_batch_tokens_size=chunk, reuse_cache=reuse_cache)
    requests = [
        greedy(a.prompt, NEW_TOKENS, id=str(i), logprobs=TOP, prompt_logprobs=True)
        for i, a in enumerate(oracle.answers)
    ]
    # Company that wants none, or others: nobody may get somebody else's.
    company = [greedy([*a.prompt[1:], 3], 40, id=f"c{i}") for i, a in enumerate(oracle.answers)]
    company[2] = greedy(oracle.answers[2].prompt, NEW_TOKENS, id="c2", logprobs=0, prompt_logprobs=True)
    outcomes = drive.run(engine, [r for pair in zip(company, requests, strict=True) for r in pair])
    for index, answer in enumerate(oracle.answers):
        outcome = outcomes[str(index)]
        check_prompt(outcome.prompt_logprobs, answer, TOP)
        check(outcome.logprobs, answer.tokens, answer.logits, TOP)
    check_prompt(outcomes["c2"].prompt_logprobs, oracle.answers[2], 0)
    assert not outcomes["c1"].prompt_logprobs
    assert not outcomes["c1"].logprobs


def test_a_step_computes_only_so_many_of_them(oracle: Oracle) -> None:
    """Each costs a row of logits; these prompts are shorter than the bound, unless that is lowered."""
    requests = [
        greedy(a.prompt, 8, id=str(i), logprobs=TOP, prompt_logprobs=i % 2 == 0) for i, a in enumerate(oracle.answers)
    ]
    with mock.patch("rtp_llm.engine.scheduler.PROMPT_LOGPROB_CHUNK", 5):
        outcomes = drive.run(drive.alone(oracle.path), requests)
    for index, answer in enumerate(oracle.answers):
        if index % 2 == 0:
            check_prompt(outcomes[str(index)].prompt_logprobs, answer, TOP)
        check(outcomes[str(index)].logprobs, answer.tokens[:8], answer.logits[:8], TOP)


def test_a_cached_prompt_still_has_them(oracle: Oracle) -> None:
    answer = oracle.answers[-1]
    engine = drive.alone(oracle.path)
    drive.run(engine, [greedy(answer.prompt, 2, id="first")])
    outcomes = drive.run(engine, [greedy(answer.prompt, NEW_TOKENS, logprobs=TOP, prompt_logprobs=True)])
    check_prompt(outcomes["0"].prompt_logprobs, answer, TOP)
    answer.check(outcomes["0"].tokens, outcomes["0"].logits)


@pytest.mark.parametrize("reuse_cache", [True, False])
def test_preempted_in_the_middle_of_the_prompt(oracle: Oracle, reuse_cache: bool) -> None:
    """What the first try had computed is not reported twice."""
    old, young = oracle.answers[-2], oracle.answers[-1]
    settings: Settings = {"max_batch_tokens_size": 7, "seq_size_per_block": 4, "test_block_num": 26}
    engine = drive.alone(oracle.path, reuse_cache=reuse_cache, **settings)
    requests = [
        greedy(old.prompt, NEW_TOKENS, id="old"),
        greedy(young.prompt, 20, id="young", logprobs=TOP, prompt_logprobs=True),
    ]
    outcomes = {r.id: drive.Completion() for r in requests}
    for request in requests:
        engine.add(request)
    before = 0
    while engine.has_work:
        known = len(requests[1].prompt_logprobs)
        drive.step(engine, outcomes)
        if engine.scheduler.stats.preemptions and not before:
            before = known
    assert 0 < before < len(young.prompt) - 1, "it was to be preempted in the middle of its prompt"
    check_prompt(outcomes["young"].prompt_logprobs, young, TOP)
    assert outcomes["old"].tokens == old.tokens
    assert outcomes["young"].tokens == young.tokens[:20]


@pytest.mark.parametrize("reuse_cache", [True, False])
def test_preempted_behind_the_prompt(oracle: Oracle, reuse_cache: bool) -> None:
    """The prompt is computed again, but its logprobs have been reported already."""
    answers = oracle.answers[-2:]
    engine = drive.alone(oracle.path, reuse_cache=reuse_cache, seq_size_per_block=4, test_block_num=36)
    outcomes = drive.run(
        engine,
        [greedy(a.prompt, NEW_TOKENS, id=str(i), logprobs=TOP, prompt_logprobs=True) for i, a in enumerate(answers)],
    )
    assert engine.scheduler.stats.preemptions
    for index, answer in enumerate(answers):
        check_prompt(outcomes[str(index)].prompt_logprobs, answer, TOP)
        check(outcomes[str(index)].logprobs, answer.tokens, answer.logits, TOP)


def test_a_resumed_request_has_reported_its_prompt(oracle: Oracle) -> None:
    answer = oracle.answers[-1]
    request = greedy(answer.prompt, NEW_TOKENS, logprobs=TOP, prompt_logprobs=True)
    resumed = Request(request.id, list(answer.prompt), request.params, answer.tokens[:10])
    outcome = drive.run(drive.alone(oracle.path), [resumed])["0"]
    assert outcome.prompt_logprobs == []
    check(outcome.logprobs, answer.tokens[10:], answer.logits[10:], TOP)


def test_as_many_as_there_are_tokens(oracle: Oracle) -> None:
    answer = oracle.answers[1]
    size = answer.logits.shape[-1]
    outcome = drive.run(drive.alone(oracle.path), [greedy(answer.prompt, 4, logprobs=size + 100)])["0"]
    check(outcome.logprobs, answer.tokens[:4], answer.logits[:4], size)


def test_they_are_of_the_models_own_logits(oracle: Oracle) -> None:
    """Not of what temperature, penalties and biases make of them."""
    answer = oracle.answers[3]
    params: dict[str, Any] = {
        "logprobs": TOP,
        "temperature": 3.0,
        "seed": 1,
        "logit_bias": {7: 50.0},
        "repetition_penalty": 1.5,
    }
    outcome = drive.run(drive.alone(oracle.path), [greedy(answer.prompt, 1, **params)])["0"]
    assert outcome.tokens == [7]
    check(outcome.logprobs, [7], answer.logits[:1], TOP)


@pytest.mark.parametrize("gang", [3], ids="tp{}".format, indirect=True)
def test_over_ranks(gang: RankPool, oracles: Oracles) -> None:
    oracle = oracles("qwen2-14-heads")
    requests = [
        greedy(a.prompt, NEW_TOKENS, id=str(i), logprobs=TOP, prompt_logprobs=True)
        for i, a in enumerate(oracle.answers)
    ]
    outcomes = gang.run(oracle.path, [requests], "local", max_batch_tokens_size=13).outcomes
    for index, answer in enumerate(oracle.answers):
        check_prompt(outcomes[str(index)].prompt_logprobs, answer, TOP)
        check(outcomes[str(index)].logprobs, answer.tokens, answer.logits, TOP)
