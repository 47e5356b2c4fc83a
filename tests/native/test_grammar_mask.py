"""Masks of grammars forbid exactly the tokens whose bits are not set, whatever computes them."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from rtp_llm.kernels.logits_mask import argmax_allowed, mask_logits
from rtp_llm.kernels.sampling import FAILED
from rtp_llm.native.library import select_kernels
from tests.kernel_levels import LEVELS

NUM_ROWS = 7


@pytest.fixture(params=[*LEVELS, "off"], scope="module", autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    select_kernels(request.param)
    yield
    select_kernels("auto")


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, NDArray[np.bool_], list[int]]:
    """Returns logits, of which many are equal, the tokens that each mask allows [masks, vocab], and the masks' rows."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vocab = draw(st.sampled_from([1, 8, 63, 64, 65, 127, 4096, 4097, 9001]))
    rows = draw(st.lists(st.integers(0, NUM_ROWS - 1), unique=True).map(sorted))
    share = rng.choice([0, 0.001, 0.5, 0.999, 1], (len(rows), 1 + vocab // 64)).repeat(64, axis=1)[:, :vocab]
    logits = rng.integers(-20, 20, (NUM_ROWS, vocab)).astype(np.float32)
    logits[logits == 0] = -0.0
    for row in range(NUM_ROWS):
        if rng.random() < 0.5:
            logits[row, rng.integers(vocab)] = rng.choice([np.nan, np.inf, -np.inf])
    return torch.from_numpy(logits), rng.random((len(rows), vocab)) < share, rows


def expected(logits: Tensor, allowed: NDArray[np.bool_], rows: list[int]) -> NDArray[np.float32]:
    masked = logits.numpy().copy()
    for row, tokens in zip(rows, allowed, strict=True):
        masked[row][~tokens] = -np.inf
    return masked


@given(cases())
def test_forbidden_tokens_are_masked_and_no_other_bit_changes(
    case: tuple[Tensor, NDArray[np.bool_], list[int]],
) -> None:
    logits, allowed, rows = case
    wanted = expected(logits, allowed, rows)
    masked = logits.clone()
    mask_logits(masked, np.packbits(allowed, axis=1, bitorder="little"), rows)
    is_number = ~np.isnan(logits.numpy())  # the row of any other fails anyway
    assert (masked.numpy().view(np.int32) == wanted.view(np.int32))[is_number].all()
    assert not np.isfinite(masked.numpy()[~is_number]).any()


@given(cases())
def test_the_highest_allowed_token(case: tuple[Tensor, NDArray[np.bool_], list[int]]) -> None:
    logits, allowed, rows = case
    before = logits.clone()
    tokens = argmax_allowed(logits, np.packbits(allowed, axis=1, bitorder="little"), rows)
    for row, masked, token in zip(logits.numpy(), expected(logits, allowed, rows), tokens.tolist(), strict=True):
        can_be_sampled = np.isfinite(masked.max()) and (row < np.inf).all()
        assert token == (masked.argmax() if can_be_sampled else FAILED)
    assert before.numpy().tobytes() == logits.numpy().tobytes()
