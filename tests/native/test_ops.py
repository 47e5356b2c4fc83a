"""The kernels between linear layers and attention: compared with float64, and bit for bit with their compositions.

Inputs of kernels that may read only part of a tensor have NaN in the rest. In bf16 and fp16 the compositions define
where values are rounded; the sum of squares in a norm has no defined order, so that a quotient can fall on the other
side of a tie.
"""

from collections.abc import Callable
from math import ceil
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from rtp_llm.kernels import ops
from rtp_llm.native.library import select_kernels
from rtp_llm.parallel.group import SingleRankGroup

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
Result = TypeVar("Result")
RANKS = SingleRankGroup()
# Of half an ulp: results are rounded twice, the quotient and the product, or the sum and the norm.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-11}

pytestmark = pytest.mark.usefixtures("level")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def strided(tensor: Tensor) -> Tensor:
    """Returns the same rows, further apart in memory, with NaN between them."""
    wide = torch.full((len(tensor), tensor.shape[1] + 5), torch.nan, dtype=tensor.dtype)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


def by_torch(compute: Callable[[], Result]) -> Result:
    """Returns what `compute` gives without kernels."""
    select_kernels("off")
    return compute()


def norm_float64(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        actual.double(), expected, rtol=TOLERANCES[actual.dtype], atol=TOLERANCES[actual.dtype] * 1e-1
    )


def assert_same_bits(actual: Tensor, expected: Tensor, differing: float = 0.0) -> None:
    """`differing`: the share of elements that may be one unit in the last place apart."""
    assert actual.shape == expected.shape
    assert (actual != expected).sum() <= ceil(differing * actual.numel())
    torch.testing.assert_close(actual, expected, rtol=1.01 * torch.finfo(actual.dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(0, 64), (1, 1), (1, 896), (3, 17), (7, 100), (40, 896)])
@pytest.mark.parametrize("layout", [Tensor.contiguous, strided, lambda x: x.T.contiguous().T])
def test_rms_norm(dtype: torch.dtype, rows: int, size: int, layout: Callable[[Tensor], Tensor]) -> None:
    x, weight = random(rows, size, dtype=dtype, scale=3.0), random(size, dtype=dtype, seed=1)
    y = ops.rms_norm(layout(x), weight, EPS)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    assert_close(y, norm_float64(x, weight))
    if dtype != torch.float32:
        assert_same_bits(y, by_torch(lambda: ops.rms_norm(x, weight, EPS)), differing=1e-3)


def test_rms_norm_of_more_dimensions() -> None:
    x, weight = random(3, 4, 32), random(32, seed=1)
    assert_close(ops.rms_norm(x[:, 1:3], weight, EPS), norm_float64(x[:, 1:3], weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_post", [False, True])
@pytest.mark.parametrize("has_pre", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(0, 64), (1, 896), (5, 33), (40, 896)])
def test_add_rms_norm(dtype: torch.dtype, has_post: bool, has_pre: bool, rows: int, size: int) -> None:
    x, residual = random(rows, size, dtype=dtype), random(rows, size, dtype=dtype, seed=1)
    post, pre = (random(size, dtype=dtype, seed=seed) if has else None for seed, has in ((2, has_post), (3, has_pre)))

    def compute() -> tuple[Tensor, Tensor]:
        return ops.all_reduce_add_rms_norm(x.clone(), residual.clone(), RANKS, post, pre, EPS)

    normed, total = compute()
    addend = norm_float64(x, post) if post is not None else x.double()
    torch.testing.assert_close(
        total.double(), residual.double() + addend, rtol=TOLERANCES[dtype], atol=3 * TOLERANCES[dtype]
    )
    # From the residual as it is rounded, which later layers read.
    assert_close(normed, total.double() if pre is None else norm_float64(total, pre))
    if dtype != torch.float32:
        for actual, expected in zip((normed, total), by_torch(compute), strict=True):
            if not has_post:
                assert_same_bits(actual, expected, differing=1e-3 if has_pre else 0)


def rotate_float64(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs as complex numbers."""
    first, second = heads.double().chunk(2, -1)
    rotated = torch.complex(first, second) * torch.complex(cos.double(), sin.double())
    return torch.cat((rotated.real, rotated.imag), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("has_rope", [False, True])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "dim"), [(0, 2, 1, 16), (1, 14, 2, 64), (3, 3, 1, 6), (9, 4, 2, 80)]
)
@pytest.mark.parametrize("layout", [Tensor.contiguous, strided])
def test_norm_rope(
    dtype: torch.dtype,
    has_norms: bool,
    has_rope: bool,
    rows: int,
    heads: int,
    kv_heads: int,
    dim: int,
    layout: Callable[[Tensor], Tensor],
) -> None:
    qkv = random(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    norms = (random(dim, dtype=dtype, seed=1), random(dim, dtype=dtype, seed=2)) if has_norms else None
    angles = 100 * random(rows, 1, dim // 2, seed=3)
    cos_sin = (angles.cos().to(dtype), angles.sin().to(dtype)) if has_rope else None

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        return ops.norm_rope(layout(qkv.clone()), heads, kv_heads, norms, EPS, cos_sin)

    q, k, v = results = compute()
    parts = qkv.unflatten(-1, (-1, dim)).split((heads, kv_heads, kv_heads), 1)
    expected = [part.double() for part in parts]
    for i in range(2):
        if norms:
            expected[i] = norm_float64(parts[i], norms[i])
        if cos_sin:
            expected[i] = rotate_float64(expected[i], *cos_sin)
    tolerance = 2 * TOLERANCES[dtype]
    for actual, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)
    assert torch.equal(v, parts[2])
    if dtype != torch.float32:
        for actual, composed in zip((q, k), by_torch(compute), strict=False):
            if not has_norms:
                assert_same_bits(actual, composed)


def test_many_rows_on_two_threads_have_the_same_bits() -> None:
    """Enough rows for the kernels to share them out."""
    x, weight = random(300, 896, dtype=torch.bfloat16), random(896, dtype=torch.bfloat16, seed=1)
    alone = ops.rms_norm(x, weight, EPS)
    torch.set_num_threads(2)
    assert torch.equal(ops.rms_norm(x, weight, EPS), alone)
    assert torch.equal(torch.cat([ops.rms_norm(row, weight, EPS) for row in x.split(1)]), alone)
