"""Triton's kernels between linear layers and attention, compared with the compositions of torch operations."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels of GPUs need Triton: make test-all installs it")

from rtp_llm.kernels import torch_ops, triton_ops
from rtp_llm.kernels.triton_kernels import check_ops

EPS = 1e-5
DTYPES = [torch.float32, torch.float16]  # the interpreter computes with the bits of bf16 as if they were integers
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2 * 2**-11}
rows_and_sizes = pytest.mark.parametrize(("rows", "size"), [(0, 64), (1, 2), (3, 18), (7, 100), (5, 896)])


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@rows_and_sizes
def test_rms_norm(dtype: torch.dtype, rows: int, size: int) -> None:
    wide, weight = noise(rows, size + 5, dtype=dtype), noise(size, dtype=dtype, seed=1)
    x = wide[:, :size]
    assert_close(triton_ops.rms_norm(x, weight, EPS), torch_ops.rms_norm(x, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_post", [False, True])
@pytest.mark.parametrize("has_pre", [False, True])
@rows_and_sizes
def test_add_rms_norm(dtype: torch.dtype, has_post: bool, has_pre: bool, rows: int, size: int) -> None:
    x, residual = noise(rows, size, dtype=dtype), noise(rows, size, dtype=dtype, seed=1)
    post, pre = (noise(size, dtype=dtype, seed=2 + i) if has else None for i, has in enumerate((has_post, has_pre)))
    expected = torch_ops.add_rms_norm(x, residual, post, pre, EPS)
    actual = triton_ops.add_rms_norm(x.clone(), residual.clone(), post, pre, EPS)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("has_rope", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 2), (7, 1, 64), (6, 2, 20)])
def test_norm_rope(
    dtype: torch.dtype, has_norms: bool, has_rope: bool, heads: int, kv_heads: int, head_dim: int
) -> None:
    rows = 3
    qkv = noise(rows, (heads + 2 * kv_heads) * head_dim + 6, dtype=dtype)[:, :-6]  # a token's heads are a part of a row
    norms = (noise(head_dim, dtype=dtype, seed=1), noise(head_dim, dtype=dtype, seed=2)) if has_norms else None
    cos, sin = noise(2, rows, 1, head_dim // 2, dtype=dtype, seed=3).unbind()
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split((heads, kv_heads, kv_heads), 1)
    v = v.clone()
    expected = torch_ops.norm_rope(q.clone(), k.clone(), norms, EPS, (cos, sin) if has_rope else None)
    triton_ops.norm_rope(qkv, heads, kv_heads, norms, EPS, (cos, sin) if has_rope else None)
    tolerance = 4 * TOLERANCES[dtype]  # sums of two products, of which one may be rounded
    torch.testing.assert_close((q, k), expected, rtol=tolerance, atol=4 * tolerance)
    assert torch.equal(qkv.unflatten(1, (-1, head_dim))[:, heads + kv_heads :], v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(0, 8), (1, 1), (3, 1500), (2, 1024)])
def test_silu_and_mul(dtype: torch.dtype, rows: int, size: int) -> None:
    x = noise(rows, 2 * size + 3, dtype=dtype)[:, : 2 * size]
    assert_close(triton_ops.silu_and_mul(x), torch_ops.silu_and_mul(x))


def test_check_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    check_ops(triton_ops, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(triton_ops, "silu_and_mul", lambda x: torch_ops.silu_and_mul(x) * 1.01)
    with pytest.raises(AssertionError, match="not close"):
        check_ops(triton_ops, torch.device("cpu"), torch.float32)
