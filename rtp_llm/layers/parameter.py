"""A parameter that knows which bytes of the checkpoint are its own: weights are pulled, not pushed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class WeightSlice:
    """Rows (`dim` 0) or columns (`dim` 1) `source` of checkpoint tensor `name`, which go to `target` of the
    parameter.
    """

    name: str
    dim: int
    source: range
    target: range


class ShardedParameter(nn.Parameter):
    """One rank's share of one or several checkpoint tensors; what no piece covers stays zero (padding)."""

    slices: tuple[WeightSlice, ...]
    full_shapes: dict[str, tuple[int, ...]]  # of the checkpoint tensors, to check them against


def sharded_parameter(
    shape: Sequence[int], slices: Sequence[WeightSlice], full_shapes: dict[str, tuple[int, ...]]
) -> ShardedParameter:
    """A zeroed parameter in torch's default dtype and device."""
    parameter = ShardedParameter(torch.zeros(*shape), requires_grad=False)
    parameter.slices = tuple(slices)
    parameter.full_shapes = full_shapes
    return parameter


def replicated_parameter(name: str, size: int) -> ShardedParameter:
    """A vector that every rank holds entirely: a norm's weight, a row-parallel bias."""
    return sharded_parameter((size,), [WeightSlice(name, 0, range(size), range(size))], {name: (size,)})
