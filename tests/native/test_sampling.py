"""The passes over logits, with the kernels of each level and without, compared with sorts and sums in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from rtp_llm.kernels import sampling
from rtp_llm.native.library import select_kernels

pytestmark = pytest.mark.usefixtures("level")


def random(rows: int, vocab: int, scale: float = 1.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows * vocab)) * scale


def strided(logits: Tensor) -> Tensor:
    """Returns the same rows, further apart in memory, with NaN between them."""
    wide = torch.full((len(logits), logits.shape[1] + 5), torch.nan)
    wide[:, : logits.shape[1]] = logits
    return wide[:, : logits.shape[1]]


@pytest.mark.parametrize("vocab", [1, 15, 16, 4097, 151_936])
def test_argmax_finite(vocab: int) -> None:
    logits = random(20, vocab)
    logits[1] = logits[0]
    logits[1, vocab // 2 :] = logits[1].max()  # equal ones: the first counts
    logits[2, vocab - 1] = torch.inf
    logits[3, vocab // 2] = torch.nan
    logits[4] = -torch.inf
    logits[5, 1:] = -torch.inf
    logits[6, -1] = torch.nan
    logits[7] = -1e38
    expected = torch.tensor(
        [row.tolist().index(row.max().item()) if row.max().isfinite() else sampling.FAILED for row in logits]
    )
    assert torch.equal(sampling.argmax_finite(logits), expected)
    assert torch.equal(sampling.argmax_finite(strided(logits)), expected)
    torch.set_num_threads(2)
    assert torch.equal(sampling.argmax_finite(logits), expected)
    select_kernels("off")
    assert torch.equal(sampling.argmax_finite(logits), expected)


@pytest.mark.parametrize("kernels", ["on", "off"])
@pytest.mark.parametrize(("vocab", "count"), [(1, 1), (40, 40), (700, 256), (40_000, 256), (151_936, 256)])
def test_top_tokens(vocab: int, count: int, kernels: str) -> None:
    logits = random(7, vocab, scale=4.0)
    logits[1] = logits[1].round()  # many are equal
    logits[2] = -torch.inf
    logits[2, -(vocab // 2 + 1) :: 3] = 1.0  # most are forbidden, and the others equal
    logits[3] = -1.0
    logits[3, ::7], logits[3, ::14] = 0.0, -0.0  # equal
    if kernels == "off":
        select_kernels("off")
    temperatures = np.linspace(0.2, 2.0, 7)
    values, ids, masses = sampling.top_tokens(strided(logits), count, temperatures)
    for row, temperature in enumerate(temperatures):
        expected = logits[row].sort(descending=True, stable=True)
        assert np.array_equal(values[row], expected.values[:count].numpy())
        assert np.array_equal(logits[row][ids[row]].numpy(), values[row])
        certain = int((values[row] > values[row, -1]).sum())  # those that equal the last one are up to the function
        assert np.array_equal(ids[row, :certain], expected.indices[:certain].numpy())
        assert len(set(ids[row].tolist())) == count
        exact = ((logits[row].double() - logits[row].max()) / temperature).exp().sum()
        assert masses[row] == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_fail(bad: float) -> None:
    logits = random(3, 5000)
    logits[1, 4321 if bad != -torch.inf else slice(None)] = bad
    ones = np.ones(3)
    values, *_ = sampling.top_tokens(logits, 256, ones)
    tokens = sampling.sample_by_id(logits, ones, ones / 2)
    assert np.isfinite(values[:, 0]).tolist() == [True, False, True]
    assert (tokens == sampling.FAILED).tolist() == [False, True, False]


@pytest.mark.parametrize("kernels", ["on", "off"])
@pytest.mark.parametrize("vocab", [1, 9, 513, 40_001])
def test_sample_by_id(vocab: int, kernels: str) -> None:
    """The weights of the tokens before the sampled one, added by Python's exact sum, enclose the number."""
    numbers = np.append(np.linspace(0.0, 1.0, 12), np.nextafter(1.0, 0.0))
    numbers[-2] = 0.999999
    logits = random(len(numbers), vocab, scale=5.0)
    logits[0, : vocab // 2] = -torch.inf  # the number is 0
    logits[3, 1:] = -torch.inf
    logits[4, : vocab - 1] = -torch.inf
    temperatures = np.linspace(0.3, 3.0, len(numbers))
    if kernels == "off":
        select_kernels("off")
    tokens = sampling.sample_by_id(strided(logits), temperatures, numbers)
    for row, token in enumerate(tokens.tolist()):
        weights = np.exp((logits[row].double() - logits[row].max()).numpy() / temperatures[row])
        before, total = float(weights[:token].sum()), float(weights.sum())
        assert weights[token] > 0
        assert before <= numbers[row] * total * (1 + 1e-12)
        assert before + weights[token] >= numbers[row] * total * (1 - 1e-12)
