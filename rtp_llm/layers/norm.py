"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), and the residual connection with the norms around it."""

from torch import Tensor, nn

from rtp_llm.kernels.ops import all_reduce_add_rms_norm, rms_norm
from rtp_llm.layers.parameter import replicated_parameter
from rtp_llm.parallel.group import Group


class RMSNorm(nn.Module):
    """Root mean square norm of x: x / rms(x) * weight over the last dimension. `name`: name of the checkpoint tensor,
    without ".weight".
    """

    def __init__(self, name: str, size: int, eps: float):
        super().__init__()
        self.weight = replicated_parameter(f"{name}.weight", size)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalized x, of the same shape and dtype. x: [..., size]."""
        return rms_norm(x, self.weight, self.eps)


class ResidualNorm(nn.Module):
    """Ends a sub-block (attention or FFN): sums its output over the ranks, adds it to the residual, normalizes the next
    input.

    post_norm: norm of the sub-block's output, before the addition. pre_norm: norm of the next sub-block's input. Both
    have the same eps.
    """

    def __init__(self, group: Group, post_norm: RMSNorm | None, pre_norm: RMSNorm | None):
        super().__init__()
        self.group, self.post_norm, self.pre_norm = group, post_norm, pre_norm
        self.eps = next((norm.eps for norm in (post_norm, pre_norm) if norm is not None), 0.0)

    def forward(self, partial: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (input of the next sub-block, residual), both of the same shape. partial, residual: [num_tokens,
        size]; `partial` is this rank's share of the sub-block's output.
        """
        post, pre = self.post_norm, self.pre_norm
        post_weight, pre_weight = None if post is None else post.weight, None if pre is None else pre.weight
        return all_reduce_add_rms_norm(partial, residual, self.group, post_weight, pre_weight, self.eps)
