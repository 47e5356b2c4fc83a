"""The operations of `kernels.ops` for GPUs, in Triton.

Each reads and writes its tensors once. It rounds to their dtype where the composition of torch operations does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers of a program of `silu_and_mul`


@triton.jit
def _normalize(x, weight, EPS: tl.constexpr, SIZE: tl.constexpr):
    """Returns x / rms(x) * weight. x: [N] with zeros beyond SIZE."""
    x_float32 = x.to(tl.float32)
    mean_square = tl.sum(x_float32 * x_float32, 0) / SIZE
    return (x_float32 * tl.rsqrt(mean_square + EPS)).to(x.dtype) * weight


@triton.jit
def _rms_norm_kernel(x, weight, y, x_stride, EPS: tl.constexpr, SIZE: tl.constexpr, SIZE_POW2: tl.constexpr):
    """Normalizes one row per program."""
    row, numbers = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE_POW2)
    exists = numbers < SIZE
    values = tl.load(x + row * x_stride + numbers, mask=exists, other=0.0)
    weights = tl.load(weight + numbers, mask=exists, other=0.0)
    tl.store(y + row * SIZE + numbers, _normalize(values, weights, EPS, SIZE), mask=exists)


@triton.jit
def _add_rms_norm_kernel(
    x,
    residual,
    post_weight,
    pre_weight,
    EPS: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_POW2: tl.constexpr,
    HAS_POST: tl.constexpr,
    HAS_PRE: tl.constexpr,
):
    """Adds one row of x, with a norm if HAS_POST, to the residual, in place. With HAS_PRE, x becomes its norm."""
    row, numbers = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE_POW2)
    exists = numbers < SIZE
    values = tl.load(x + row * SIZE + numbers, mask=exists, other=0.0)
    if HAS_POST:
        values = _normalize(values, tl.load(post_weight + numbers, mask=exists, other=0.0), EPS, SIZE)
    total = tl.load(residual + row * SIZE + numbers, mask=exists, other=0.0) + values
    tl.store(residual + row * SIZE + numbers, total, mask=exists)
    if HAS_PRE:
        weights = tl.load(pre_weight + numbers, mask=exists, other=0.0)
        tl.store(x + row * SIZE + numbers, _normalize(total, weights, EPS, SIZE), mask=exists)


@triton.jit
def _norm_rope_kernel(
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    qkv_stride,
    EPS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_POW2: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
):
    """Normalizes and rotates a query or key head of a token in place. Programs: [tokens, query heads + key heads]."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    numbers = tl.arange(0, HALF_POW2)
    exists = numbers < HALF
    first_place = qkv + token * qkv_stride + head * (2 * HALF) + numbers
    first = tl.load(first_place, mask=exists, other=0.0)
    second = tl.load(first_place + HALF, mask=exists, other=0.0)
    if HAS_NORM:
        if head < NUM_HEADS:
            first_weight = tl.load(q_weight + numbers, mask=exists, other=0.0)
            second_weight = tl.load(q_weight + HALF + numbers, mask=exists, other=0.0)
        else:
            first_weight = tl.load(k_weight + numbers, mask=exists, other=0.0)
            second_weight = tl.load(k_weight + HALF + numbers, mask=exists, other=0.0)
        a, b = first.to(tl.float32), second.to(tl.float32)
        scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * HALF) + EPS)
        first = (a * scale).to(first.dtype) * first_weight
        second = (b * scale).to(second.dtype) * second_weight
    if HAS_ROPE:
        c = tl.load(cos + token * HALF + numbers, mask=exists, other=0.0)
        s = tl.load(sin + token * HALF + numbers, mask=exists, other=0.0)
        first, second = first * c - second * s, second * c + first * s
    tl.store(first_place, first, mask=exists)
    tl.store(first_place + HALF, second, mask=exists)


@triton.jit
def _silu_and_mul_kernel(x, y, x_stride, size, BLOCK: tl.constexpr):
    """Computes BLOCK numbers of a row. Programs: [rows, blocks of a row]."""
    row, numbers = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = numbers < size
    gate = tl.load(x + row * x_stride + numbers, mask=exists, other=0.0)
    up = tl.load(x + row * x_stride + size + numbers, mask=exists, other=0.0)
    gate_float32 = gate.to(tl.float32)
    activated = (gate_float32 * tl.sigmoid(gate_float32)).to(gate.dtype)
    tl.store(y + row * size + numbers, activated * up, mask=exists)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / rms(x) * weight over the last dimension, [..., size], see `ops.rms_norm`."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    size = rows.shape[1]
    if len(rows):
        _rms_norm_kernel[(len(rows),)](
            rows,
            weight,
            y,
            rows.stride(0),
            EPS=eps,
            SIZE=size,
            SIZE_POW2=triton.next_power_of_2(size),
            num_warps=_num_warps(size),
        )
    return y.view(x.shape)


def add_rms_norm(
    x: Tensor, residual: Tensor, post_weight: Tensor | None, pre_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Adds x, summed over the ranks, to the residual, see `ops.all_reduce_add_rms_norm`. Overwrites both."""
    num_rows, size = x.shape
    if num_rows:
        _add_rms_norm_kernel[(num_rows,)](
            x,
            residual,
            x if post_weight is None else post_weight,
            x if pre_weight is None else pre_weight,
            EPS=eps,
            SIZE=size,
            SIZE_POW2=triton.next_power_of_2(size),
            HAS_POST=post_weight is not None,
            HAS_PRE=pre_weight is not None,
            num_warps=_num_warps(size),
        )
    return (residual if pre_weight is None else x), residual


def norm_rope(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cos_sin: tuple[Tensor, Tensor] | None,
) -> None:
    """Normalizes and rotates the query and key heads in place, see `ops.norm_rope`. head_dim is even."""
    num_tokens, half = qkv.shape[0], qkv.shape[1] // (num_heads + 2 * num_kv_heads) // 2
    if num_tokens and (norms or cos_sin):
        _norm_rope_kernel[(num_tokens, num_heads + num_kv_heads)](
            qkv,
            *(norms or (qkv, qkv)),
            *(cos_sin or (qkv, qkv)),
            qkv.stride(0),
            EPS=eps,
            NUM_HEADS=num_heads,
            HALF=half,
            HALF_POW2=triton.next_power_of_2(half),
            HAS_NORM=norms is not None,
            HAS_ROPE=cos_sin is not None,
            num_warps=1,
        )


def silu_and_mul(x: Tensor) -> Tensor:
    """Returns silu(gate) * up, [num_tokens, size], see `ops.silu_and_mul`."""
    num_tokens, size = x.shape[0], x.shape[1] // 2
    y = torch.empty(num_tokens, size, dtype=x.dtype, device=x.device)
    if num_tokens:
        _silu_and_mul_kernel[(num_tokens, triton.cdiv(size, BLOCK))](x, y, x.stride(0), size, BLOCK=BLOCK)
    return y


def _num_warps(size: int) -> int:
    """Returns the warps of a program that keeps `size` numbers in registers."""
    return min(16, max(1, triton.next_power_of_2(size) // 512))
