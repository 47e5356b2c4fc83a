"""Quantized linears compared with float64 products of the same integers; no row depends on its company."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear, silu

from rtp_llm.kernels.linear_method import Weights
from rtp_llm.kernels.quantized_linear import W8A8, Int4, Int8, Quantized, dequantize
from rtp_llm.native.library import Library, select_kernels
from tests.kernel_levels import LEVELS

METHODS = (Int8, W8A8, Int4)
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
EPSILON = {torch.bfloat16: 2**-8, torch.float32: 2**-20, torch.float16: 2**-11}  # of an output


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned(rows: int, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Returns random rows of a wider matrix that is NaN beside them."""
    wide = torch.full((rows + 1, size + 6), torch.nan, dtype=dtype)
    wide[:rows, 2 : size + 2] = random((rows, size), dtype, seed)
    return wide[:rows, 2 : size + 2]


def make(method: type[Quantized], weight: Tensor, gated: bool = False) -> tuple[Quantized, Weights]:
    out_size, in_size = weight.shape
    linear_method = method(out_size, in_size, weight.dtype, gated)
    return linear_method, linear_method.transform({"weight": weight})


def exact(method: Quantized, weight: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (the layer's output in float64, the sum of the magnitudes of what is added up)."""
    integers, scales = method.quantize(weight)
    w, rounded = dequantize(integers, scales).double(), method.round_inputs(x).double()
    b = None if bias is None else bias.double()
    y, magnitude = linear(rounded, w, b), linear(rounded.abs(), w.abs(), None if b is None else b.abs())
    if method.gated:
        gate, up = y.chunk(2, -1)
        gate_error, up_error = magnitude.chunk(2, -1)
        return silu(gate) * up, gate_error * up.abs() * 1.1 + up_error * gate.abs() + silu(gate).abs() * up.abs()
    return y, magnitude


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("selection", [*LEVELS, "off"])
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_product_of_the_integers(method: type[Quantized], selection: str, data: st.DataObject) -> None:
    rows, out_size, in_size = (data.draw(st.integers(1, most)) for most in (20, 120, 200))
    dtype, gated, has_bias = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans()), data.draw(st.booleans())
    torch.set_num_threads(data.draw(st.integers(1, 2)))
    out_size *= 1 + gated
    x, weight = poisoned(rows, in_size, dtype, 0), random((out_size, in_size), dtype, 1) * 0.1
    bias = random((out_size,), dtype, 2) if has_bias else None
    select_kernels(selection)
    try:
        linear_method, weights = make(method, weight, gated)
        y = linear_method.forward(x, weights, bias)
    finally:
        select_kernels("auto")
        torch.set_num_threads(1)
    expected, magnitude = exact(linear_method, weight, x, bias)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    bound = EPSILON[dtype] * expected.abs() + 2**-21 * magnitude + 1e-7  # and subnormal float16
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("method", METHODS)
def test_rows_do_not_depend_on_their_company(
    level: Library, method: type[Quantized], dtype: torch.dtype, gated: bool
) -> None:
    """Nor on the number of threads."""
    linear_method, weights = make(method, random((194, 352), dtype, 0), gated)
    x, bias = random((512, 352), dtype, 1), random((194,), dtype, 2)
    y = linear_method.forward(x, weights, bias)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in (*range(1, 18), 31, 63, 64, 65, 128, 511, 512):
            for start in {0, 512 - rows}:
                part = linear_method.forward(x[start : start + rows], weights, bias)
                assert torch.equal(part, y[start : start + rows]), (rows, start, threads)
    torch.set_num_threads(1)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_that_is_not_finite_stays_alone(level: Library, method: type[Quantized]) -> None:
    linear_method, weights = make(method, random((96, 64), torch.float32, 0))
    x = random((4, 64), torch.float32, 1)
    y = linear_method.forward(x, weights)
    for value in (torch.nan, torch.inf):
        broken = x.clone()
        broken[1, 5] = value
        result = linear_method.forward(broken, weights)
        assert not result[1].isfinite().any()
        assert torch.equal(result[[0, 2, 3]], y[[0, 2, 3]])


@pytest.mark.parametrize("method", METHODS)
def test_zeros_and_no_rows(level: Library, method: type[Quantized]) -> None:
    linear_method, weights = make(method, torch.zeros(50, 70))
    assert torch.equal(linear_method.forward(random((3, 70), torch.float32, 0), weights), torch.zeros(3, 50))
    assert linear_method.forward(torch.empty(0, 70), weights).shape == (0, 50)
    linear_method, weights = make(method, random((50, 70), torch.float32, 0))
    assert torch.equal(linear_method.forward(torch.zeros(3, 70), weights), torch.zeros(3, 50))


@pytest.mark.parametrize(("method", "error"), [(Int8, 0.01), (W8A8, 0.01), (Int4, 0.12)])
def test_quantization_error(method: type[Quantized], error: float) -> None:
    """Relative to the standard deviation of a normally distributed weight."""
    weight = random((64, 2048), torch.bfloat16, 0) * 0.02
    difference = dequantize(*method.quantize(weight)) - weight.float()
    assert difference.std() < error * weight.float().std()
