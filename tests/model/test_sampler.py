"""The sampler follows the requested distribution, and depends on seed and position only.

Some tests replace the random numbers by an even grid over [0, 1): the fraction of the grid that selects a token is its
probability, which must equal that of transformers' logits processors. Others draw with many seeds or positions and
apply a chi-square test.
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
GRID_SIZE = 4000  # numbers in [0, 1) that a distribution is measured with
RESOLUTION = 2 / GRID_SIZE


def make_request(seed: int = 0, output: Sequence[int] = (), **params: Any) -> Request:
    return Request(str(seed), list(PROMPT), SamplingParams(max_tokens=100, seed=seed, **params), list(output))


def draw(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """Returns a token for each request, all from the same logits [VOCAB]."""
    expanded = logits.expand(len(requests), -1)
    sampled, _ = sample(expanded, SamplingMetadata(list(range(len(requests))), list(requests), []))
    tokens = [token.token_id for token in sampled]
    assert None not in tokens
    return [token for token in tokens if token is not None]


def random_logits(seed: int, spread: float = 3) -> Tensor:
    """Returns normally distributed logits [VOCAB]. `spread`: standard deviation; with 1 no token is very unlikely."""
    return spread * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def measure_distribution(logits: Tensor, monkeypatch: pytest.MonkeyPatch, **params: Any) -> NDArray[np.float64]:
    """Returns the probability of each token: the fraction of an even grid over [0, 1) that selects it."""
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: (seed + 0.5) / GRID_SIZE)
    tokens = draw(logits, [make_request(seed, **params) for seed in range(GRID_SIZE)])
    return np.bincount(tokens, minlength=VOCAB) / GRID_SIZE


def transformers_distribution(
    logits: Tensor, processors: Sequence[LogitsProcessor], input_ids: Sequence[int] = PROMPT
) -> NDArray[Any]:
    scores = LogitsProcessorList(processors)(torch.LongTensor([list(input_ids)]), logits[None].clone())
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
def test_filters_match_transformers(
    params: dict[str, Any], processors: list[LogitsProcessor], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = random_logits(seed)
    expected = transformers_distribution(logits, processors)
    measured = measure_distribution(logits, monkeypatch, **params)
    assert np.abs(measured - expected).max() <= RESOLUTION
    assert not measured[expected == 0].any()


def test_rows_are_sampled_independently(monkeypatch: pytest.MonkeyPatch) -> None:
    """All filters alternate in one batch, and every request gets the same token as in a batch of its own."""
    logits = random_logits(3)
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: seed / 1000)
    requests = [make_request(i % 1000, **FILTERS[i % len(FILTERS)][0]) for i in range(1500)]
    requests[7::31] = [make_request(i, temperature=0.0) for i in range(len(requests[7::31]))]
    assert draw(logits, requests) == [draw(logits, [r])[0] for r in requests]


@pytest.mark.parametrize(
    ("params", "processors"),
    [
        ({}, []),
        ({"temperature": 1.5, "top_k": 9}, [TemperatureLogitsWarper(1.5), TopKLogitsWarper(9)]),
        ({"temperature": 2.0, "top_p": 0.7}, [TemperatureLogitsWarper(2.0), TopPLogitsWarper(0.7)]),
        ({"temperature": 2.0, "min_p": 0.08}, [TemperatureLogitsWarper(2.0), MinPLogitsWarper(0.08)]),
    ],
    ids=["unfiltered", "top_k", "top_p", "min_p"],
)
@pytest.mark.parametrize("by", ["seed", "position"])
def test_many_draws_follow_the_distribution(params: dict[str, Any], processors: list[LogitsProcessor], by: str) -> None:
    """Draws with many seeds, or at many positions with one seed. The seeds are fixed, so the test is not flaky."""
    logits, count = random_logits(4), 5000
    if by == "seed":
        requests = [make_request(seed, **params) for seed in range(count)]
    else:
        requests = [make_request(123, [1] * length, **params) for length in range(count)]
    counts = np.bincount(draw(logits, requests), minlength=VOCAB)
    assert is_chi_square_plausible(counts, transformers_distribution(logits, processors))


def is_chi_square_plausible(counts: NDArray[Any], probabilities: NDArray[Any]) -> bool:
    """Returns whether the chi-square statistic is within 4 standard deviations of its mean.

    Pools tokens whose expected count is below 5.
    """
    expected = probabilities * counts.sum()
    rare = expected < 5
    assert not counts[probabilities == 0].any()
    pooled_counts = np.append(counts[~rare], counts[rare].sum())
    pooled_expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    degrees_of_freedom = len(pooled_counts) - 1
    statistic = ((pooled_counts - pooled_expected) ** 2 / pooled_expected).sum()
    return bool(abs(statistic - degrees_of_freedom) < 4 * np.sqrt(2 * degrees_of_freedom))


def test_chi_square_detects_a_wrong_distribution() -> None:
    """Proves that test_many_draws_follow_the_distribution can fail, even for a slightly different temperature."""
    logits = random_logits(4)
    counts = np.bincount(draw(logits, [make_request(s, temperature=1.15) for s in range(5000)]), minlength=VOCAB)
    assert not is_chi_square_plausible(counts, transformers_distribution(logits, []))
    assert not is_chi_square_plausible(
        np.round(5000 * transformers_distribution(logits, [])).astype(int), np.full(VOCAB, 1 / VOCAB)
    )


def test_repetition_penalty_counts_prompt_and_output(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(5, spread=1)
    measured = measure_distribution(logits, monkeypatch, output=OUTPUT, repetition_penalty=1.7)
    expected = transformers_distribution(logits, [RepetitionPenaltyLogitsProcessor(1.7)], PROMPT + OUTPUT)
    assert np.abs(measured - expected).max() <= RESOLUTION


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.9), (-0.7, 0.4)])
def test_presence_and_frequency_penalties(presence: float, frequency: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's formula, over the output only: logit - count * frequency - (count > 0) * presence."""
    logits = random_logits(6, spread=1)
    counts = np.bincount(OUTPUT, minlength=VOCAB)
    penalized = logits.double().numpy() - counts * frequency - (counts > 0) * presence
    expected = np.exp(penalized - penalized.max()) / np.exp(penalized - penalized.max()).sum()
    params = {"output": OUTPUT, "presence_penalty": presence, "frequency_penalty": frequency}
    assert np.abs(measure_distribution(logits, monkeypatch, **params) - expected).max() <= RESOLUTION


def test_penalties_do_not_count_the_prompt() -> None:
    logits = torch.zeros(VOCAB)
    logits[PROMPT[0]] = 1
    assert draw(logits, [make_request(temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)]) == [PROMPT[0]]


def test_logit_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(7, spread=1)
    biased = logits.clone()
    biased[2] += 4.5
    biased[30] -= 100
    measured = measure_distribution(logits, monkeypatch, logit_bias={2: 4.5, 30: -100.0})
    assert np.abs(measured - transformers_distribution(biased, [])).max() <= RESOLUTION
    assert draw(logits, [make_request(temperature=0.0, logit_bias={9: 100.0})]) == [9]


def test_logits_are_not_changed_in_place() -> None:
    """The sampler computes logprobs from the unprocessed logits, after it has applied penalties and biases."""
    logits = random_logits(8).expand(2, -1).contiguous()
    before = logits.clone()
    requests = [
        make_request(1, OUTPUT, repetition_penalty=2.0, presence_penalty=1.0, logit_bias={1: 5.0}),
        make_request(2),
    ]
    sample(logits, SamplingMetadata([0, 1], requests, []))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.0, "top_p": 0.1}, {"top_k": 1}])
def test_greedy_ignores_temperature_and_seed(params: dict[str, Any]) -> None:
    logits = random_logits(9)
    requests = [make_request(seed, **{"temperature": 50.0, **params}) for seed in range(100)]
    assert set(draw(logits, requests)) == {int(logits.argmax())}


def test_very_low_temperature_is_greedy() -> None:
    logits = random_logits(10)
    requests = [make_request(seed, temperature=1e-6) for seed in range(50)]
    requests += [make_request(seed, temperature=1e-6, top_p=0.9) for seed in range(50)]
    assert set(draw(logits, requests)) == {int(logits.argmax())}


def test_min_tokens_bans_stop_token_ids() -> None:
    logits = random_logits(11)
    ranked = logits.argsort(descending=True).tolist()
    stops = {"stop_token_ids": tuple(ranked[:3]), "temperature": 0.0}
    for length, expected in ((0, ranked[3]), (4, ranked[3]), (5, ranked[0]), (6, ranked[0])):
        assert draw(logits, [make_request(0, [1] * length, min_tokens=5, **stops)]) == [expected]
    assert draw(logits, [make_request(0, [1], **stops)]) == [ranked[0]]
    assert draw(logits, [make_request(0, [1], min_tokens=5, temperature=0.0)]) == [ranked[0]]


@pytest.mark.parametrize("minimum", [0, 1, 9])
def test_min_tokens_and_stop_ids_in_the_engine(oracles: Oracles, minimum: int) -> None:
    """All tokens of the greedy output are stop tokens, so it ends with the first token after the minimum."""
    oracle = oracles("llama")
    stops = tuple(sorted({t for a in oracle.answers for t in a.tokens}))
    completions = drive.run(
        drive.make_single_rank_engine(oracle.path),
        [
            drive.greedy_request(a.prompt, 40, id=str(i), min_tokens=minimum, stop_token_ids=stops)
            for i, a in enumerate(oracle.answers)
        ],
    )
    for completion in completions.values():
        assert not set(completion.tokens[:minimum]) & set(stops)
        stopped = next((i for i, t in enumerate(completion.tokens) if t in stops), None)
        assert completion.finish == ("length" if stopped is None else "stop")
        assert len(completion.tokens) == (40 if stopped is None else stopped + 1)


def test_nan_logits_give_no_token() -> None:
    logits = torch.stack([random_logits(12), random_logits(13)])
    logits[0, 5] = torch.nan
    sampled, _ = sample(
        logits, SamplingMetadata([0, 1], [make_request(temperature=0.0), make_request(temperature=0.0)], [])
    )
    assert [token.token_id for token in sampled] == [None, int(logits[1].argmax())]


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
    """The random numbers for known seeds and positions never change: a request that started in another version, or on
    another machine, must continue with the same ones."""
    assert uniform(seed, position) == value


def test_uniform_differs_by_seed_and_by_position() -> None:
    numbers = {uniform(seed, position) for seed in range(50) for position in range(50)}
    assert len(numbers) == 2500
    assert all(0 <= number < 1 for number in numbers)
    assert abs(np.mean(list(numbers)) - 0.5) < 0.02


def test_position_counts_prompt_and_output() -> None:
    """A client that sends prompt and output as a new prompt gets the same random numbers."""
    tokens = draw(torch.zeros(VOCAB), [make_request(7, [1] * length) for length in range(40)])
    assert tokens == [int(uniform(7, len(PROMPT) + length) * VOCAB) for length in range(40)]
    assert len(set(tokens)) > 20
