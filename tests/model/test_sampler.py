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
from rtp_llm.contract.sampling_metadata import SampledRows, SampledTokens
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.layers import sampler
from rtp_llm.layers.logits_processors import DEFAULT_LOGITS_PROCESSORS, LogitsProcessorFactory, Penalties
from rtp_llm.layers.sampler import Sampler, uniform
from tests.model import drive
from tests.model.conftest import Oracles
from tests.quick import slow_except

VOCAB = 40
PROMPT = [3, 7, 7, 11, 39]
OUTPUT = [5, 7, 5, 5, 20]
GRID_SIZE = 4000  # numbers in [0, 1) that a distribution is measured with
RESOLUTION = 2 / GRID_SIZE


def make_request(seed: int = 0, output: Sequence[int] = (), **params: Any) -> Request:
    return Request(str(seed), list(PROMPT), SamplingParams(max_tokens=100, seed=seed, **params), list(output))


def run_sampler(
    logits: Tensor,
    requests: Sequence[Request],
    drafts: Sequence[Sequence[int]] | None = None,
    processors: Sequence[LogitsProcessorFactory] = DEFAULT_LOGITS_PROCESSORS,
) -> list[SampledTokens]:
    """Returns the tokens that a new sampler gives the requests, of which each has the slot of its index."""
    sampler = Sampler(len(requests), VOCAB, logits.device, processors)
    for slot, request in enumerate(requests):
        sampler.reset(slot, request)
    rows = SampledRows.build(range(len(requests)), [r.num_tokens for r in requests], drafts)
    return sampler.accept_drafts(sampler.sample(logits, rows), rows)


def draw(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """Returns a token for each request, all from the same logits [VOCAB]."""
    return [token for sampled in run_sampler(logits.expand(len(requests), -1), requests) for token in sampled.token_ids]


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
@pytest.mark.parametrize("seed", slow_except([1, 2], 1))
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
@pytest.mark.parametrize("by", slow_except(["seed", "position"], "seed"))
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
    run_sampler(logits, requests)
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
    sampled = run_sampler(logits, [make_request(temperature=0.0), make_request(temperature=0.0)])
    assert [(s.failed, s.token_ids) for s in sampled] == [(True, []), (False, [int(logits[1].argmax())])]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"min_tokens": 9, "stop_token_ids": (5,)}]
)
def test_nan_and_infinite_logits_fail_their_row_only(bad: float, params: dict[str, Any]) -> None:
    """Even if the token with that logit is forbidden: the model is broken."""
    logits = torch.stack([random_logits(seed) for seed in range(12, 15)])
    expected = run_sampler(logits, [make_request(i, **params) for i in range(3)])
    logits[1, 5] = bad
    logits[2, 6] = -torch.inf
    sampled = run_sampler(logits, [make_request(i, **params) for i in range(3)])
    assert [s.failed for s in sampled] == [False, True, False]
    assert (sampled[0], sampled[1].token_ids) == (expected[0], [])


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.9}], ids=str)
def test_a_row_without_allowed_tokens_fails(params: dict[str, Any]) -> None:
    class ForbidAll(Penalties):
        def is_active(self, slot: int) -> bool:
            return True

        def apply(self, logits: Tensor, rows: SampledRows) -> None:
            logits[rows.slots == 1] = -torch.inf

    logits = torch.stack([random_logits(seed) for seed in range(12, 14)])
    sampled = run_sampler(logits, [make_request(i, **params) for i in range(2)], processors=[ForbidAll])
    assert [s.failed for s in sampled] == [False, True]


def one_hot(*tokens: int) -> Tensor:
    """Returns logits [len(tokens), VOCAB] with which row i gives `tokens[i]`."""
    return 50 * torch.nn.functional.one_hot(torch.tensor(tokens), VOCAB).float()


@pytest.mark.parametrize(
    ("drafts", "sampled", "accepted"),
    [
        ([], [4], [4]),
        ([4, 5, 6], [4, 5, 6, 7], [4, 5, 6, 7]),
        ([4, 5, 6], [4, 9, 6, 7], [4, 9]),
        ([4, 5, 6], [9, 5, 6, 7], [9]),
        ([4, 4, 4], [4, 5, 4, 4], [4, 5]),  # the third draft equals its token, but stands after a wrong one
    ],
)
def test_drafts_count_up_to_the_first_wrong_one(drafts: list[int], sampled: list[int], accepted: list[int]) -> None:
    """Two sequences beside it have other drafts."""
    logits = torch.cat([one_hot(1, 2), one_hot(*sampled), one_hot(3)])
    requests = [make_request(i, temperature=0.5 * i, logprobs=0) for i in range(3)]
    results = run_sampler(logits, requests, [[1], drafts, []])
    assert [(r.slot, r.token_ids, r.failed) for r in results] == [
        (0, [1, 2], False),
        (1, accepted, False),
        (2, [3], False),
    ]
    assert [len(r.logprobs) for r in results] == [2, len(accepted), 1]


def test_a_failure_after_accepted_drafts_keeps_their_tokens() -> None:
    logits = one_hot(4, 5, 6, 7)
    logits[2] = torch.nan
    (result,) = run_sampler(logits, [make_request()], [[4, 5, 6]])
    assert (result.token_ids, result.failed) == ([4, 5], True)


def test_a_failure_behind_a_wrong_draft_does_not_count() -> None:
    logits = one_hot(4, 9, 6)
    logits[2] = torch.nan
    (result,) = run_sampler(logits, [make_request()], [[4, 5]])
    assert (result.token_ids, result.failed) == ([4, 9], False)


def test_the_row_of_a_draft_draws_the_number_of_its_position() -> None:
    """So drafts do not change the text."""
    tokens = [int(uniform(7, len(PROMPT) + offset) * VOCAB) for offset in range(4)]
    (result,) = run_sampler(torch.zeros(4, VOCAB), [make_request(7)], [tokens[:3]])
    assert result.token_ids == tokens


@pytest.mark.parametrize("params", [{"logit_bias": {3: 100.0}}, {"repetition_penalty": 5.0}])
def test_logprobs_come_from_the_unprocessed_logits(params: dict[str, Any]) -> None:
    logits = random_logits(14)[None]
    (result,) = run_sampler(logits, [make_request(logprobs=2, **params)])
    (token,), ((logprob, rank, tops),) = result.token_ids, result.logprobs
    expected = logits[0].double().log_softmax(-1)
    assert logprob == pytest.approx(float(expected[token]), abs=1e-5)
    assert rank == int((expected > expected[token]).sum())
    assert [t for t, _ in tops] == expected.topk(2).indices.tolist()


def test_a_slot_is_used_again() -> None:
    sampler = Sampler(1, VOCAB, drive.CPU)
    rows = SampledRows.build([0], [len(PROMPT)])
    for params in ({"logit_bias": {9: 100.0}, "temperature": 0.0}, {"temperature": 0.0}):
        sampler.reset(0, make_request(**params))
        output = sampler.sample(one_hot(4), rows)
        assert output.tokens.tolist() == ([9] if "logit_bias" in params else [4])
        sampler.remove(0)


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
