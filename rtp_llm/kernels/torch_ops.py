"""The operations of `kernels.ops` as compositions of torch operations, for any device. They define where values are
rounded.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

CosSin = tuple[Tensor, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / rms(x) * weight, see `ops.rms_norm`."""
    x_float32 = x.float()
    normalized = x_float32 * torch.rsqrt(x_float32.square().mean(-1, keepdim=True) + eps)
    return weight * normalized.to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, post_weight: Tensor | None, pre_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns (input of the next sub-block, residual), see `ops.all_reduce_add_rms_norm`. x: summed over the ranks."""
    total = residual + (x if post_weight is None else rms_norm(x, post_weight, eps))
    return (total if pre_weight is None else rms_norm(total, pre_weight, eps)), total


def norm_rope(
    q: Tensor, k: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float, cos_sin: CosSin | None
) -> tuple[Tensor, Tensor]:
    """Returns normalized and rotated queries and keys, see `ops.norm_rope`."""
    if norms:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    if cos_sin:
        q, k = apply_rotary_emb(q, *cos_sin), apply_rotary_emb(k, *cos_sin)
    return q, k


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair of elements (i, i + head_dim / 2) of a head, the layout of Hugging Face checkpoints.

    x: [num_tokens, heads, head_dim]. cos, sin: [num_tokens, 1, head_dim / 2]. Returns the same shape as x.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def silu_and_mul(x: Tensor) -> Tensor:
    """Returns silu(gate) * up, see `ops.silu_and_mul`."""
    gate, up = x.chunk(2, dim=-1)
    return silu(gate) * up
