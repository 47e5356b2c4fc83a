"""Parameters that list the slices of checkpoint tensors that they hold; `model.weights` reads only these slices."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

Box = tuple[range, ...]  # the indices of a part of a tensor, for each of its dimensions


@dataclass(frozen=True)
class WeightSlice:
    """A part of a checkpoint tensor and its place in a parameter.

    name: of the checkpoint tensor. source: in the checkpoint tensor. target: in the parameter; it has as many elements
    in the same order, but may have fewer dimensions, as the matrix of one expert has.
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
        """Returns the parameter in memory: zeros, or undefined values if the slices fill it entirely."""
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
    """Returns a parameter without memory, to be materialized on torch's default device. dtype: None is the default."""
    data = torch.empty(tuple(shape), dtype=dtype, device="meta")
    return _make_parameter(data, slices, full_shapes, torch.get_default_device())


def replicated_parameter(name: str, size: int) -> ShardedParameter:
    """Returns a vector [size] that a rank holds entirely: a norm's weight or a row-parallel bias."""
    box = (range(size),)
    return sharded_parameter((size,), [WeightSlice(name, box, box)], {name: (size,)})
