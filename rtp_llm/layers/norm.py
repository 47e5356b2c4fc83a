"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), with the residual addition that precedes it in a decoder."""

import torch
from torch import Tensor, nn

from rtp_llm.layers.parameter import replicated_parameter


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension. The quotient is computed in float32."""

    def __init__(self, name: str, size: int, eps: float):
        super().__init__()
        self.weight = replicated_parameter(f"{name}.weight", size)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size]. Returns the same shape and dtype."""
        x_float32 = x.float()
        normalized = x_float32 * torch.rsqrt(x_float32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normalized.to(x.dtype)

    def forward_with_residual(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns (norm(x + residual), x + residual). x, residual: [num_tokens, size]; a residual of None is zero."""
        total = x if residual is None else x + residual
        return self(total), total
