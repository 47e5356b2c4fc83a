"""Parameters that list the slices of checkpoint tensors that they hold; `model.weights` reads only these slices."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

Box = tuple[range, ...]  # the indices of a part of a tensor, for each of its dimensions


@dataclass(frozen=True)
class WeightSlice:
    """A slice of a checkpoint tensor and its place in a parameter.

    name: name of the checkpoint tensor. source: ranges in that tensor. target: ranges in the parameter, with as many
    elements in the same order. target may have fewer dimensions, for example for the matrix of one expert.
    """

    name: str
    source: Box
    target: Box

    @property
    def num_elements(self) -> int:
        return prod(map(len, self.target))


class ShardedParameter(nn.Parameter):
    """One rank's shard of one or several checkpoint tensors. Elements outside all slices are zero (padding).

    It is created on the meta device, without memory. `materialize` allocates it on `target_device`.
    """

    slices: tuple[WeightSlice, ...]
    full_shapes: dict[str, tuple[int, ...]]  # expected shapes of the checkpoint tensors, by name
    target_device: torch.device

    def materialize(self) -> "ShardedParameter":
        """Returns the parameter with memory on `target_device`: zeroed, or uninitialized if the slices cover it
        completely.
        """
        is_filled = sum(weight_slice.num_elements for weight_slice in self.slices) == self.numel()
        allocate = torch.empty if is_filled else torch.zeros
        data = allocate(self.shape, dtype=self.dtype, device=self.target_device)
        return _make_parameter(data, self.slices, self.full_shapes, self.target_device)


def _make_parameter(
    data: Tensor, slices: Sequence[WeightSlice], full_shapes: dict[str, tuple[int, ...]], device: torch.device
) -> ShardedParameter:
    parameter = ShardedParameter(data, requires_grad=False)
    parameter.slices, parameter.full_shapes, parameter.target_device = tuple(slices), full_shapes, device
    return parameter


def sharded_parameter(
    shape: Sequence[int],
    slices: Sequence[WeightSlice],
    full_shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype | None = None,
) -> ShardedParameter:
    """Returns a `ShardedParameter`, still without memory, for torch's default device. dtype: None means torch's default
    dtype.
    """
    data = torch.empty(tuple(shape), dtype=dtype, device="meta")
    return _make_parameter(data, slices, full_shapes, torch.get_default_device())


def replicated_parameter(name: str, size: int) -> ShardedParameter:
    """Returns a vector [size] that every rank holds completely: a norm's weight or a row-parallel bias."""
    box = (range(size),)
    return sharded_parameter((size,), [WeightSlice(name, box, box)], {name: (size,)})
