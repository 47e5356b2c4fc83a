"""Operations that a device may compute as one kernel. This is their composition in torch, which runs on any device."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import silu


class AllReduce(Protocol):
    """The ranks whose partial results add up."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums the tensor over all ranks in place. Returns the same tensor."""
        ...


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / rms(x) * weight over the last dimension, [..., size]. The quotient is computed in float32."""
    x_float32 = x.float()
    normalized = x_float32 * torch.rsqrt(x_float32.square().mean(-1, keepdim=True) + eps)
    return weight * normalized.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (norm(x + residual), x + residual), each [num_tokens, size] as x and residual."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, ranks: AllReduce, post_weight: Tensor | None, pre_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Ends a sub-block of the decoder. Returns (input of the next sub-block, residual), each [num_tokens, size].

    x: this rank's partial output of the sub-block; overwritten. post_weight: norm of the output before it is added to
    the residual. pre_weight: norm of the next input. None: no norm there.
    """
    x = ranks.all_reduce(x)
    if post_weight is not None:
        x = rms_norm(x, post_weight, eps)
    if pre_weight is not None:
        return add_rms_norm(x, residual, pre_weight, eps)
    total = x + residual
    return total, total


def silu_and_mul(x: Tensor) -> Tensor:
    """Returns silu(gate) * up, [num_tokens, size]. x: [num_tokens, 2 * size], gate and up side by side."""
    gate, up = x.chunk(2, dim=-1)
    return silu(gate) * up
