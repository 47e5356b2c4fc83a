"""Logprobs of prompt and output equal log_softmax of transformers' logits for all chunk sizes."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

from rtp_llm.contract.engine_output import Logprob
from rtp_llm.contract.request import Request
from tests.model import drive
from tests.model.conftest import Oracles
from tests.model.drive import Settings, greedy_request
from tests.model.oracle import NEW_TOKENS, TOLERANCE, Floats, Oracle, OracleAnswer
from tests.model.rank_pool import RankPool
from tests.quick import slow_except

TOP = 5


@pytest.fixture(
    scope="module", params=slow_except(["llama-tied", "qwen3", "rope-dynamic"], "llama-tied", "rope-dynamic")
)
def oracle(request: pytest.FixtureRequest, oracles: Oracles) -> Oracle:
    return oracles(request.param)


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    logits64 = logits.astype(np.float64)
    shifted = logits64 - logits64.max(-1, keepdims=True)
    log_probs: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return log_probs


def check(logprobs: list[Logprob], tokens: list[int], logits: Floats, top: int) -> None:
    assert len(logprobs) == len(tokens) == len(logits)
    for (value, rank, likeliest), token, row in zip(logprobs, tokens, log_softmax(logits), strict=True):
        assert abs(value - row[token]) < TOLERANCE
        # Tokens whose logprobs are equal within the tolerance may have either rank.
        assert (row > row[token] + TOLERANCE).sum() <= rank <= (row > row[token] - TOLERANCE).sum()
        assert [abs(row[t] - v) < TOLERANCE for t, v in likeliest] == [True] * top
        np.testing.assert_allclose([v for _, v in likeliest], np.sort(row)[::-1][:top], rtol=0, atol=TOLERANCE)
        assert len({t for t, _ in likeliest}) == top


def check_prompt(logprobs: list[Logprob], answer: OracleAnswer, top: int) -> None:
    check(logprobs, answer.prompt[1:], answer.prompt_logits[:-1], top)


@pytest.mark.parametrize("chunk", slow_except([7, 16, 48, 512], 7, 512))
@pytest.mark.parametrize("reuse_cache", [True, False])
def test_prompt_and_output(oracle: Oracle, chunk: int, reuse_cache: bool) -> None:
    engine = drive.make_single_rank_engine(oracle.path, max_batch_tokens_size=chunk, reuse_cache=reuse_cache)
    requests = oracle.greedy_requests(logprobs=TOP, prompt_logprobs=TOP)
    # Other requests in the batch, without logprobs or with a different number of them.
    others = [greedy_request([*a.prompt[1:], 3], 40, id=f"c{i}") for i, a in enumerate(oracle.answers)]
    others[2] = greedy_request(oracle.answers[2].prompt, NEW_TOKENS, id="c2", logprobs=0, prompt_logprobs=0)
    completions = drive.run(engine, [r for pair in zip(others, requests, strict=True) for r in pair])
    for index, answer in enumerate(oracle.answers):
        completion = completions[str(index)]
        check_prompt(completion.prompt_logprobs, answer, TOP)
        check(completion.logprobs, answer.tokens, answer.logits, TOP)
    check_prompt(completions["c2"].prompt_logprobs, oracle.answers[2], 0)
    assert not completions["c1"].prompt_logprobs
    assert not completions["c1"].logprobs


def test_prompt_logprobs_per_step_are_limited(oracle: Oracle) -> None:
    """Prompt logprobs are correct if the scheduler limits the chunks of prompts that need them, because each needs a
    row of logits. The limit is lowered, since these prompts are short."""
    requests = [
        greedy_request(a.prompt, 8, id=str(i), logprobs=TOP, prompt_logprobs=TOP if i % 2 == 0 else None)
        for i, a in enumerate(oracle.answers)
    ]
    with mock.patch("rtp_llm.engine.prompt_budget.PROMPT_LOGPROB_CHUNK", 5):
        completions = drive.run(drive.make_single_rank_engine(oracle.path), requests)
    for index, answer in enumerate(oracle.answers):
        if index % 2 == 0:
            check_prompt(completions[str(index)].prompt_logprobs, answer, TOP)
        check(completions[str(index)].logprobs, answer.tokens[:8], answer.logits[:8], TOP)


def test_named_tokens(oracle: Oracle) -> None:
    """Of these tokens instead of the most likely ones, beside requests that want others."""
    ids = (3, 0, 200)
    named = oracle.greedy_requests(8, logprobs=0, logprob_token_ids=ids)
    others = [greedy_request(a.prompt, 8, id=f"o{i}", logprobs=i % 3) for i, a in enumerate(oracle.answers)]
    requests = [r for pair in zip(named, others, strict=True) for r in pair]
    completions = drive.run(drive.make_single_rank_engine(oracle.path), requests)
    for index, answer in enumerate(oracle.answers):
        expected = log_softmax(answer.logits[:8])
        for (value, _, tokens), token, row in zip(
            completions[str(index)].logprobs, answer.tokens, expected, strict=False
        ):
            assert [t for t, _ in tokens] == list(ids)
            np.testing.assert_allclose([value, *(v for _, v in tokens)], row[[token, *ids]], rtol=0, atol=TOLERANCE)
        check(completions[f"o{index}"].logprobs, answer.tokens[:8], answer.logits[:8], index % 3)


def test_cached_prompt_has_prompt_logprobs(oracle: Oracle) -> None:
    answer = oracle.answers[-1]
    engine = drive.make_single_rank_engine(oracle.path)
    drive.run(engine, [greedy_request(answer.prompt, 2, id="first")])
    completions = drive.run(engine, [greedy_request(answer.prompt, NEW_TOKENS, logprobs=TOP, prompt_logprobs=TOP)])
    check_prompt(completions["0"].prompt_logprobs, answer, TOP)
    answer.check(completions["0"].tokens, completions["0"].logits)


@pytest.mark.parametrize("reuse_cache", [True, False])
def test_preemption_during_the_prompt(oracle: Oracle, reuse_cache: bool) -> None:
    """Logprobs that were computed before the preemption are not reported twice."""
    older, newer = oracle.answers[-2], oracle.answers[-1]
    settings: Settings = {"max_batch_tokens_size": 7, "seq_size_per_block": 4, "test_block_num": 26}
    engine = drive.make_single_rank_engine(oracle.path, reuse_cache=reuse_cache, **settings)
    requests = [
        greedy_request(older.prompt, NEW_TOKENS, id="older"),
        greedy_request(newer.prompt, 20, id="newer", logprobs=TOP, prompt_logprobs=TOP),
    ]
    completions = {r.id: drive.Completion() for r in requests}
    for request in requests:
        engine.add(request)
    num_before = 0
    while engine.has_work:
        num_logprobs = len(requests[1].prompt_logprobs)
        drive.step(engine, completions)
        if engine.scheduler.stats.preemptions and not num_before:
            num_before = num_logprobs
    assert 0 < num_before < len(newer.prompt) - 1, "the preemption must happen during the prompt"
    check_prompt(completions["newer"].prompt_logprobs, newer, TOP)
    assert completions["older"].tokens == older.tokens
    assert completions["newer"].tokens == newer.tokens[:20]


@pytest.mark.parametrize("reuse_cache", [True, False])
def test_preemption_after_the_prompt(oracle: Oracle, reuse_cache: bool) -> None:
    """The prompt is recomputed, but its logprobs are not reported again."""
    answers = oracle.answers[-2:]
    engine = drive.make_single_rank_engine(
        oracle.path, reuse_cache=reuse_cache, seq_size_per_block=4, test_block_num=36
    )
    completions = drive.run(
        engine,
        [
            greedy_request(a.prompt, NEW_TOKENS, id=str(i), logprobs=TOP, prompt_logprobs=TOP)
            for i, a in enumerate(answers)
        ],
    )
    assert engine.scheduler.stats.preemptions
    for index, answer in enumerate(answers):
        check_prompt(completions[str(index)].prompt_logprobs, answer, TOP)
        check(completions[str(index)].logprobs, answer.tokens, answer.logits, TOP)


def test_resumed_request_has_no_prompt_logprobs(oracle: Oracle) -> None:
    answer = oracle.answers[-1]
    request = greedy_request(answer.prompt, NEW_TOKENS, logprobs=TOP, prompt_logprobs=TOP)
    resumed = Request(request.id, list(answer.prompt), request.params, answer.tokens[:10])
    completion = drive.run(drive.make_single_rank_engine(oracle.path), [resumed])["0"]
    assert completion.prompt_logprobs == []
    check(completion.logprobs, answer.tokens[10:], answer.logits[10:], TOP)


def test_number_of_logprobs_is_limited_to_the_vocabulary(oracle: Oracle) -> None:
    answer = oracle.answers[1]
    size = answer.logits.shape[-1]
    completion = drive.run(
        drive.make_single_rank_engine(oracle.path), [greedy_request(answer.prompt, 4, logprobs=size + 100)]
    )["0"]
    check(completion.logprobs, answer.tokens[:4], answer.logits[:4], size)


def test_logprobs_are_of_unprocessed_logits(oracle: Oracle) -> None:
    """Temperature, penalties and biases do not change logprobs."""
    answer = oracle.answers[3]
    params: dict[str, Any] = {
        "logprobs": TOP,
        "temperature": 3.0,
        "seed": 1,
        "logit_bias": {7: 50.0},
        "repetition_penalty": 1.5,
    }
    completion = drive.run(drive.make_single_rank_engine(oracle.path), [greedy_request(answer.prompt, 1, **params)])[
        "0"
    ]
    assert completion.tokens == [7]
    check(completion.logprobs, [7], answer.logits[:1], TOP)


@pytest.mark.slow
@pytest.mark.parametrize("rank_pool", [3], ids="tp{}".format, indirect=True)
def test_several_ranks(rank_pool: RankPool, oracles: Oracles) -> None:
    oracle = oracles("qwen2-14-heads")
    requests = oracle.greedy_requests(logprobs=TOP, prompt_logprobs=TOP)
    completions = rank_pool.run(oracle.path, [requests], "local", max_batch_tokens_size=13).completions
    for index, answer in enumerate(oracle.answers):
        check_prompt(completions[str(index)].prompt_logprobs, answer, TOP)
        check(completions[str(index)].logprobs, answer.tokens, answer.logits, TOP)
