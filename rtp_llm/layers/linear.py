"""Tensor-parallel linear layers (Shoeybi et al. 2019, arXiv 1909.08053): a column-parallel layer, whose outputs are
sharded, feeds a row-parallel one, whose partial sums need one all-reduce.
"""

import torch
from torch import Tensor, nn

from rtp_llm.kernels.prepacked import linear, prepack_weight
from rtp_llm.layers.parameter import ShardedParameter, WeightSlice, replicated_parameter, sharded_parameter
from rtp_llm.parallel.group import Group
from rtp_llm.parallel.sharding import HeadShard

Slices = list[tuple[range, range]]  # (range in the checkpoint tensor, range in the parameter)
Columns = list[tuple[str, int, Slices]]  # (tensor name without ".weight", its output size, the slices of this rank)


class PrepackedLinear(nn.Module):
    """A linear layer whose weight [out_size, in_size] can be prepacked (reordered to oneDNN's layout) after loading."""

    weight: ShardedParameter

    def __init__(self) -> None:
        super().__init__()
        self.prepacked: Tensor | None = None

    def prepack(self, *, shared: bool = False) -> None:
        """Prepacks the weight (reorders it to oneDNN's layout) if supported.

        Frees the original, unless another layer uses it too (`shared`).
        """
        self.prepacked = prepack_weight(self.weight)
        if self.prepacked is not None and not shared:
            self.weight.data = torch.empty(0, dtype=self.weight.dtype)


class ColumnParallelLinear(PrepackedLinear):
    """y = x Wᵀ + b with sharded output features.

    `out_size`: number of output features on this rank. `columns`: slices of checkpoint tensors that are stacked in W.
    """

    def __init__(self, in_size: int, out_size: int, columns: Columns, bias: bool):
        super().__init__()
        self.weight = sharded_parameter(
            (out_size, in_size),
            [WeightSlice(f"{name}.weight", 0, src, dst) for name, _, slices in columns for src, dst in slices],
            {f"{name}.weight": (full_size, in_size) for name, full_size, _ in columns},
        )
        self.bias = (
            sharded_parameter(
                (out_size,),
                [WeightSlice(f"{name}.bias", 0, src, dst) for name, _, slices in columns for src, dst in slices],
                {f"{name}.bias": (full_size,) for name, full_size, _ in columns},
            )
            if bias
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_size], equal on all ranks. Returns [num_tokens, out_size], this rank's features."""
        return linear(x, self.weight, self.bias, self.prepacked)


class RowParallelLinear(PrepackedLinear):
    """y = x Wᵀ + b with sharded input features. Adds the bias after the all-reduce, so that it counts once.

    `slices`: the input features of this rank, as (range in the checkpoint tensor, range in W).
    """

    def __init__(
        self,
        name: str,
        full_in_size: int,
        local_in_size: int,
        out_size: int,
        slices: Slices,
        bias: bool,
        group: Group,
    ):
        super().__init__()
        self.group = group
        self.weight = sharded_parameter(
            (out_size, local_in_size),
            [WeightSlice(f"{name}.weight", 1, src, dst) for src, dst in slices],
            {f"{name}.weight": (out_size, full_in_size)},
        )
        self.bias = replicated_parameter(f"{name}.bias", out_size) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, local_in_size]. Returns [num_tokens, out_size], equal on all ranks."""
        y = self.group.all_reduce(linear(x, self.weight, prepacked=self.prepacked))
        return y if self.bias is None else y + self.bias


def merged_columns(names: list[str], full_size: int, shard: range) -> Columns:
    """Returns the slices with which this rank stacks several tensors, such as gate_proj and up_proj, in one weight.

    `shard`: this rank's output features of each tensor. `full_size`: number of output features of each tensor.
    """
    width = len(shard)
    return [(name, full_size, [(shard, range(i * width, (i + 1) * width))]) for i, name in enumerate(names)]


def qkv_columns(prefix: str, heads: HeadShard, head_dim: int, num_heads: int, num_kv_heads: int) -> Columns:
    """Returns the slices with which this rank stacks its query, key and value heads, in this order, in one weight.

    The query heads of each KV head are padded to an equal number, see `HeadShard`.
    """
    columns = [(f"{prefix}.q_proj", num_heads * head_dim, query_head_slices(heads, head_dim))]
    for index, name in enumerate(("k_proj", "v_proj")):
        base = heads.num_heads + index * len(heads.kv_heads)
        slices = [(_head_range(kv, head_dim), _head_range(base + i, head_dim)) for i, kv in enumerate(heads.kv_heads)]
        columns.append((f"{prefix}.{name}", num_kv_heads * head_dim, slices))
    return columns


def query_head_slices(heads: HeadShard, head_dim: int) -> Slices:
    """Returns the slices of this rank's query heads: output features of q_proj and input features of o_proj."""
    return [(_head_range(head, head_dim), _head_range(slot, head_dim)) for slot, head in heads.slots()]


def _head_range(head: int, head_dim: int) -> range:
    return range(head * head_dim, (head + 1) * head_dim)
