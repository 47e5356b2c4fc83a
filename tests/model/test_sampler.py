"""The sampler draws from the distribution that was asked for, for reasons of its own: seed and position, nothing else.

Two kinds of proof. With chosen "random" numbers, one inside each token's share, the whole distribution can be read off
exactly; transformers' processors say what it must be. With the real ones, a chi-square test says that many seeds
together follow it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SamplingMetadata
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.layers import sampler
from rtp_llm.layers.sampler import sample, uniform
from tests.model import drive
from tests.model.conftest import Oracles

VOCAB = 40
PROMPT = [3, 7, 7, 11, 39]
OUTPUT = [5, 7, 5, 5, 20]
STEPS = 4000  # of the grid that a distribution is read off with
RESOLUTION = 2 / STEPS


def request(seed: int = 0, output: Sequence[int] = (), **params: Any) -> Request:
    return Request(str(seed), list(PROMPT), SamplingParams(max_tokens=100, seed=seed, **params), list(output))


def draw(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """A token for each request, all of them from the same logits [vocab]."""
    table = logits.expand(len(requests), -1)
    results, _ = sample(table, SamplingMetadata(list(range(len(requests))), list(requests), []))
    tokens = [result.token_id for result in results]
    assert None not in tokens
    return [token for token in tokens if token is not None]


def random_logits(seed: int, spread: float = 3) -> Tensor:
    """Where it matters that no token is too unlikely to be seen: a `spread` of 1."""
    return spread * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def distribution(logits: Tensor, monkeypatch: pytest.MonkeyPatch, **params: Any) -> NDArray[np.float64]:
    """The probability of each token, measured: which share of a fine grid of numbers leads to it."""
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: (seed + 0.5) / STEPS)
    tokens = draw(logits, [request(seed, **params) for seed in range(STEPS)])
    return np.bincount(tokens, minlength=VOCAB) / STEPS


def processed(logits: Tensor, processors: Sequence[LogitsProcessor], seen: Sequence[int] = PROMPT) -> NDArray[Any]:
    scores = LogitsProcessorList(processors)(torch.LongTensor([list(seen)]), logits[None].clone())
    probabilities: NDArray[Any] = scores[0].double().softmax(-1).numpy()
    return probabilities


FILTERS: list[tuple[dict[str, Any], list[LogitsProcessor]]] = [
    ({}, []),
    ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
    ({"temperature": 2.5}, [TemperatureLogitsWarper(2.5)]),
    ({"top_k": 2}, [TopKLogitsWarper(2)]),
    ({"top_k": 7}, [TopKLogitsWarper(7)]),
    ({"top_k": VOCAB + 5}, []),
    ({"top_p": 0.3}, [TopPLogitsWarper(0.3)]),
    ({"top_p": 0.95}, [TopPLogitsWarper(0.95)]),
    ({"top_p": 1e-6}, [TopKLogitsWarper(1)]),
    ({"min_p": 0.02}, [MinPLogitsWarper(0.02)]),
    ({"min_p": 1.0}, [MinPLogitsWarper(1.0)]),
    (
        {"temperature": 1.7, "top_k": 12, "top_p": 0.8, "min_p": 0.1},
        [TemperatureLogitsWarper(1.7), TopKLogitsWarper(12), TopPLogitsWarper(0.8), MinPLogitsWarper(0.1)],
    ),
    (
        {"temperature": 0.8, "top_k": 4, "top_p": 0.9},
        [TemperatureLogitsWarper(0.8), TopKLogitsWarper(4), TopPLogitsWarper(0.9)],
    ),
    ({"repetition_penalty": 1.8}, [RepetitionPenaltyLogitsProcessor(1.8)]),
    (
        {"repetition_penalty": 0.6, "top_p": 0.9, "temperature": 1.3},
        [RepetitionPenaltyLogitsProcessor(0.6), TemperatureLogitsWarper(1.3), TopPLogitsWarper(0.9)],
    ),
]


@pytest.mark.parametrize(("params", "processors"), FILTERS, ids=[str(params) for params, _ in FILTERS])
@pytest.mark.parametrize("seed", [1, 2])
def test_filters_are_transformers(
    params: dict[str, Any], processors: list[LogitsProcessor], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = random_logits(seed)
    expected = processed(logits, processors)
    found = distribution(logits, monkeypatch, **params)
    assert np.abs(found - expected).max() <= RESOLUTION
    assert not found[expected == 0].any()


def test_each_row_goes_by_its_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """All filters in one batch, in turn, and every request gets what it would get alone."""
    logits = random_logits(3)
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: seed / 1000)
    requests = [request(i % 1000, **FILTERS[i % len(FILTERS)][0]) for i in range(1500)]
    requests[7::31] = [request(i, temperature=0.0) for i in range(len(requests[7::31]))]
    assert draw(logits, requests) == [draw(logits, [r])[0] for r in requests]


@pytest.mark.parametrize(
    ("params", "processors"),
    [
        ({}, []),
        ({"temperature": 1.5, "top_k": 9}, [TemperatureLogitsWarper(1.5), TopKLogitsWarper(9)]),
        ({"temperature": 2.0, "top_p": 0.7}, [TemperatureLogitsWarper(2.0), TopPLogitsWarper(0.7)]),
        ({"temperature": 2.0, "min_p": 0.08}, [TemperatureLogitsWarper(2.0), MinPLogitsWarper(0.08)]),
    ],
    ids=["plain", "top_k", "top_p", "min_p"],
)
@pytest.mark.parametrize("by", ["seed", "position"])
def test_many_draws_follow_the_distribution(params: dict[str, Any], processors: list[LogitsProcessor], by: str) -> None:
    """Over seeds, and over the positions of one seed: both are what a client sees as randomness. The seeds are fixed,
    so this passes always or never.
    """
    logits, count = random_logits(4), 5000
    if by == "seed":
        requests = [request(seed, **params) for seed in range(count)]
    else:
        requests = [request(123, [1] * length, **params) for length in range(count)]
    counts = np.bincount(draw(logits, requests), minlength=VOCAB)
    assert chi_square_is_plausible(counts, processed(logits, processors))


def chi_square_is_plausible(counts: NDArray[Any], probabilities: NDArray[Any]) -> bool:
    """Whether the statistic lies within 4 standard deviations of its mean; rare tokens count as one."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    assert not counts[probabilities == 0].any()
    found = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    freedom = len(found) - 1
    statistic = ((found - wanted) ** 2 / wanted).sum()
    return bool(abs(statistic - freedom) < 4 * np.sqrt(2 * freedom))


def test_the_chi_square_would_notice() -> None:
    """Proves that the test above can fail, for a temperature that is a little off too."""
    logits = random_logits(4)
    counts = np.bincount(draw(logits, [request(s, temperature=1.15) for s in range(5000)]), minlength=VOCAB)
    assert not chi_square_is_plausible(counts, processed(logits, []))
    assert not chi_square_is_plausible(np.round(5000 * processed(logits, [])).astype(int), np.full(VOCAB, 1 / VOCAB))


def test_repetition_penalty_counts_prompt_and_output(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(5, spread=1)
    found = distribution(logits, monkeypatch, output=OUTPUT, repetition_penalty=1.7)
    expected = processed(logits, [RepetitionPenaltyLogitsProcessor(1.7)], PROMPT + OUTPUT)
    assert np.abs(found - expected).max() <= RESOLUTION


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.9), (-0.7, 0.4)])
def test_presence_and_frequency_penalties(presence: float, frequency: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's formula, over the output alone: logit - count x frequency - (count > 0) x presence."""
    logits = random_logits(6, spread=1)
    counts = np.bincount(OUTPUT, minlength=VOCAB)
    edited = logits.double().numpy() - counts * frequency - (counts > 0) * presence
    expected = np.exp(edited - edited.max()) / np.exp(edited - edited.max()).sum()
    params = {"output": OUTPUT, "presence_penalty": presence, "frequency_penalty": frequency}
    assert np.abs(distribution(logits, monkeypatch, **params) - expected).max() <= RESOLUTION


def test_penalties_do_not_count_the_prompt() -> None:
    logits = torch.zeros(VOCAB)
    logits[PROMPT[0]] = 1
    assert draw(logits, [request(temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)]) == [PROMPT[0]]


def test_logit_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(7, spread=1)
    biased = logits.clone()
    biased[2] += 4.5
    biased[30] -= 100
    found = distribution(logits, monkeypatch, logit_bias={2: 4.5, 30: -100.0})
    assert np.abs(found - processed(biased, [])).max() <= RESOLUTION
    assert draw(logits, [request(temperature=0.0, logit_bias={9: 100.0})]) == [9]


def test_nothing_is_edited_in_place() -> None:
    """The rows may be views of what others still read: logprobs are of the model's own logits."""
    logits = random_logits(8).expand(2, -1).contiguous()
    before = logits.clone()
    requests = [request(1, OUTPUT, repetition_penalty=2.0, presence_penalty=1.0, logit_bias={1: 5.0}), request(2)]
    sample(logits, SamplingMetadata([0, 1], requests, []))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.0, "top_p": 0.1}, {"top_k": 1}])
def test_greedy_ignores_temperature_and_seed(params: dict[str, Any]) -> None:
    logits = random_logits(9)
    requests = [request(seed, **{"temperature": 50.0, **params}) for seed in range(100)]
    assert set(draw(logits, requests)) == {int(logits.argmax())}


def test_a_very_low_temperature_is_greedy() -> None:
    logits = random_logits(10)
    requests = [request(seed, temperature=1e-6) for seed in range(50)]
    requests += [request(seed, temperature=1e-6, top_p=0.9) for seed in range(50)]
    assert set(draw(logits, requests)) == {int(logits.argmax())}


def test_min_tokens_bans_the_ids_that_would_stop() -> None:
    logits = random_logits(11)
    order = logits.argsort(descending=True).tolist()
    stops = {"stop_token_ids": tuple(order[:3]), "temperature": 0.0}
    for length, expected in ((0, order[3]), (4, order[3]), (5, order[0]), (6, order[0])):
        assert draw(logits, [request(0, [1] * length, min_tokens=5, **stops)]) == [expected]
    assert draw(logits, [request(0, [1], **stops)]) == [order[0]]
    assert draw(logits, [request(0, [1], min_tokens=5, temperature=0.0)]) == [order[0]]


@pytest.mark.parametrize("minimum", [0, 1, 9])
def test_min_tokens_and_stop_ids_in_the_engine(oracles: Oracles, minimum: int) -> None:
    """Everything that greedy output would say is a stop: it ends with the first token behind the minimum."""
    oracle = oracles("llama")
    stops = tuple(sorted({t for a in oracle.answers for t in a.tokens}))
    outcomes = drive.run(
        drive.alone(oracle.path),
        [
            drive.greedy(a.prompt, 40, id=str(i), min_tokens=minimum, stop_token_ids=stops)
            for i, a in enumerate(oracle.answers)
        ],
    )
    for outcome in outcomes.values():
        assert not set(outcome.tokens[:minimum]) & set(stops)
        stopped = next((i for i, t in enumerate(outcome.tokens) if t in stops), None)
        assert outcome.finish == ("length" if stopped is None else "stop")
        assert len(outcome.tokens) == (40 if stopped is None else stopped + 1)


def test_logits_that_are_not_numbers_give_no_token() -> None:
    table = torch.stack([random_logits(12), random_logits(13)])
    table[0, 5] = torch.nan
    results, _ = sample(table, SamplingMetadata([0, 1], [request(temperature=0.0), request(temperature=0.0)], []))
    assert [r.token_id for r in results] == [None, int(table[1].argmax())]


@pytest.mark.parametrize(
    ("seed", "position", "value"),
    [
        (0, 0, 0.0564663990004608),
        (0, 1, 0.44008326622012284),
        (1, 0, 0.6487508310490744),
        (-1, 5, 0.9318107580365629),
        (2**64 - 1, 5, 0.9318107580365629),
        (12345, 131071, 0.5697463754007748),
    ],
)
def test_uniform_is_pinned(seed: int, position: int, value: float) -> None:
    """A stream that was begun by another version, or on another machine, must go on with the same numbers."""
    assert uniform(seed, position) == value


def test_uniform_differs_by_seed_and_by_position() -> None:
    numbers = {uniform(seed, position) for seed in range(50) for position in range(50)}
    assert len(numbers) == 2500
    assert all(0 <= number < 1 for number in numbers)
    assert abs(np.mean(list(numbers)) - 0.5) < 0.02


def test_the_position_is_that_of_the_token() -> None:
    """Prompt and output count alike: whoever sends both as a new prompt goes on with the same numbers."""
    tokens = draw(torch.zeros(VOCAB), [request(7, [1] * length) for length in range(40)])
    assert tokens == [int(uniform(7, len(PROMPT) + length) * VOCAB) for length in range(40)]
    assert len(set(tokens)) > 20
