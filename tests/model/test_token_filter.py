"""Top-k, top-p and min-p give the token that a stable sort of the vocabulary in float64 gives."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from rtp_llm.layers.token_filter import FILTER_PARAMS, NUM_CANDIDATES, sample_filtered
from rtp_llm.native.library import select_kernels
from tests.quick import slow_except

FIRST, LAST = 0.0, 1 - 1e-9  # random numbers that select the first and the last of the kept tokens


@pytest.fixture(scope="module", params=slow_except(["auto", "off"], "auto"), autouse=True)
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    select_kernels(request.param)
    yield
    select_kernels("auto")


def sorted_sample(logits: NDArray[np.float32], params: np.void) -> int:
    """Returns the token of one row, by the definition of the filters. Nothing is shared with the product."""
    order = np.argsort(-logits, kind="stable")
    scaled = logits[order].astype(np.float64) / params["temperature"]
    probs = np.exp(scaled - scaled[0])
    probs /= probs.sum()
    if params["top_k"]:
        probs[params["top_k"] :] = 0
        probs /= probs.sum()
    keep = np.cumsum(probs) - probs < params["top_p"] if params["top_p"] < 1 else np.ones(len(probs), bool)
    keep &= probs >= params["min_p"] * probs[0]
    keep[0] = True
    cumulative = np.cumsum(np.where(keep, probs, 0))
    return int(order[np.argmax(cumulative > params["number"] * cumulative[-1])])


def make_params(temperature: float, top_k: int, top_p: float, min_p: float, numbers: list[float]) -> NDArray[np.void]:
    return np.array([(temperature, top_k, top_p, min_p, number) for number in numbers], FILTER_PARAMS)


def check_row(logits: Tensor, params: NDArray[np.void]) -> list[int]:
    """Compares the tokens of one row for several numbers, and returns them."""
    tokens: list[int] = sample_filtered(logits.expand(len(params), -1), params).tolist()
    assert tokens == [sorted_sample(logits.numpy(), p) for p in params]
    return tokens


def random_row(rng: np.random.Generator) -> Tensor:
    """Returns logits of a random size and spread; sometimes rounded, so that many are equal, or with most forbidden."""
    vocab_size = int(rng.choice([1, 2, 30, NUM_CANDIDATES, NUM_CANDIDATES + 1, 700, 5000]))
    logits = torch.from_numpy(rng.normal(0, rng.choice([0.0, 1e-3, 0.3, 2, 8]), vocab_size).astype(np.float32))
    logits += float(rng.choice([0, -30, 1000]))
    if rng.random() < 0.4:
        logits = logits.bfloat16().float() if rng.random() < 0.5 else (4 * logits).round() / 4
    if rng.random() < 0.3:
        allowed = rng.random(vocab_size) < rng.choice([0.01, 0.5])
        allowed[rng.integers(vocab_size)] = True
        logits[torch.from_numpy(~allowed)] = -torch.inf
    return logits


def random_params(rng: np.random.Generator, numbers: list[float]) -> NDArray[np.void]:
    return make_params(
        temperature=float(rng.choice([1e-4, 0.3, 0.7, 1, 3])),
        top_k=int(rng.choice([0, 0, 2, 50, NUM_CANDIDATES, NUM_CANDIDATES + 1, 600, 10**6])),
        # Not a round number: whether 1/4 of four equal tokens is below 1/4 is up to rounding.
        top_p=float(rng.choice([1, rng.random(), 1 - 0.1 * rng.random()])),
        min_p=float(rng.choice([0, 0, rng.random(), 0.02 * rng.random(), 1])),
        numbers=numbers,
    )


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_kept_set_and_token_equal_those_of_a_sort(seed: int) -> None:
    rng = np.random.default_rng(seed)
    check_row(random_row(rng), random_params(rng, [FIRST, LAST, *rng.random(6).tolist()]))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_row_depends_on_its_company(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocab_size = int(rng.choice([200, 3000]))
    spreads = torch.from_numpy(rng.choice([0.2, 1, 6], 24).astype(np.float32))
    logits = torch.from_numpy(rng.normal(0, 1, (24, vocab_size)).astype(np.float32)) * spreads[:, None]
    logits[int(rng.integers(24)), 3] = float(rng.choice([np.nan, np.inf]))  # this row's token does not matter
    params = np.concatenate([random_params(rng, [rng.random()]) for _ in logits])
    together = sample_filtered(logits, params)
    shuffled = rng.permutation(24)[: rng.integers(1, 25)]
    assert torch.equal(sample_filtered(logits[shuffled], params[shuffled]), together[shuffled])
    alone = [int(sample_filtered(logits[[i]], params[[i]])) for i in shuffled]
    assert alone == together[shuffled].tolist()


@pytest.mark.parametrize("spread", slow_except([0.5, 2.5], 0.5), ids=["flat", "peaked"])
@pytest.mark.parametrize(
    "params",
    [
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"top_k": 50},
        {"top_k": 1000, "top_p": 0.95},
        {"min_p": 0.02},
        {"top_k": 20000, "top_p": 0.5, "min_p": 1e-3},
    ],
    ids=str,
)
def test_vocabulary_of_a_real_model(spread: float, params: dict[str, Any]) -> None:
    """The float32 sum of 152,000 weights is not exact; the kept set is."""
    rng = np.random.default_rng(7)
    logits = torch.from_numpy(rng.normal(0, spread, 151_936).astype(np.float32))
    defaults = {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    tokens = check_row(logits, make_params(**(defaults | params), numbers=[FIRST, LAST, *rng.random(6).tolist()]))
    assert len(set(tokens)) > 2


def test_top_p_at_the_edge_of_a_token() -> None:
    """Tokens whose predecessors have a little more or less than top_p, by less than a float32 can tell apart."""
    logits = torch.from_numpy(np.random.default_rng(8).normal(0, 3, 5000).astype(np.float32))
    probs = np.sort(np.exp(logits.numpy().astype(np.float64)))[::-1]
    starts = (np.cumsum(probs) - probs) / probs.sum()
    for rank in (3, 20, 100, 200, 255, 256, 257, 400, 2000):
        for difference in (-1e-9, 1e-9):
            params = make_params(1.0, 0, starts[rank] + difference, 0.0, [1 - 1e-7, 0.3])
            last, _ = check_row(logits, params)
            assert last == np.argsort(-logits.numpy(), kind="stable")[rank - (difference < 0)]
