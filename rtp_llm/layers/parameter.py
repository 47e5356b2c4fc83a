"""Parameters that list the slices of checkpoint tensors that they hold; `model.weights` reads only these slices."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class WeightSlice:
    """A slice of a checkpoint tensor and its place in the parameter.

    name: of the checkpoint tensor. dim: the dimension that is sliced: 0 for rows, 1 for columns.
    source: indices of `dim` in the checkpoint tensor. target: indices of `dim` in the parameter.
    """

    name: str
    dim: int
    source: range
    target: range


class ShardedParameter(nn.Parameter):
    """One rank's shard of one or several checkpoint tensors. Elements outside all slices stay zero (padding)."""

    slices: tuple[WeightSlice, ...]
    full_shapes: dict[str, tuple[int, ...]]  # expected shapes of the checkpoint tensors, by name


def sharded_parameter(
    shape: Sequence[int], slices: Sequence[WeightSlice], full_shapes: dict[str, tuple[int, ...]]
) -> ShardedParameter:
    """Returns a zeroed parameter of torch's default dtype and device."""
    parameter = ShardedParameter(torch.zeros(*shape), requires_grad=False)
    parameter.slices = tuple(slices)
    parameter.full_shapes = full_shapes
    return parameter


def replicated_parameter(name: str, size: int) -> ShardedParameter:
    """Returns a vector [size] that every rank holds entirely: a norm's weight or a row-parallel bias."""
    return sharded_parameter((size,), [WeightSlice(name, 0, range(size), range(size))], {name: (size,)})
