"""Linear layers cut over the tensor-parallel group (Shoeybi et al. 2019, arXiv 1909.08053): columns out, rows in,
one all-reduce.
"""

import torch
from torch import Tensor, nn

from rtp_llm.kernels.prepacked import linear, prepack_weight
from rtp_llm.layers.parameter import ShardedParameter, WeightSlice, replicated_parameter, sharded_parameter
from rtp_llm.parallel.group import Group
from rtp_llm.parallel.sharding import HeadShard


class PrepackedLinear(nn.Module):
    """A weight [out, in] that may be laid out for the processor once it is loaded."""

    weight: ShardedParameter

    def __init__(self) -> None:
        super().__init__()
        self.prepacked: Tensor | None = None

    def prepack(self, *, shared: bool = False) -> None:
        """Call after loading. The plain weight goes, unless it is `shared` with another layer."""
        self.prepacked = prepack_weight(self.weight)
        if self.prepacked is not None and not shared:
            self.weight.data = torch.empty(0, dtype=self.weight.dtype)


class ColumnParallelLinear(PrepackedLinear):
    """y = x Wᵀ + b with the output features cut: x [T, in] whole on all ranks, y [T, own out].

    Several checkpoint tensors may be stacked: `columns` lists (tensor name, its full output size, pieces as (source,
    target)).
    """

    def __init__(
        self, in_size: int, out_size: int, columns: list[tuple[str, int, list[tuple[range, range]]]], bias: bool
    ):
        super().__init__()
        self.weight = sharded_parameter(
            (out_size, in_size),
            [WeightSlice(f"{name}.weight", 0, src, dst) for name, _, cuts in columns for src, dst in cuts],
            {f"{name}.weight": (full, in_size) for name, full, _ in columns},
        )
        self.bias = (
            sharded_parameter(
                (out_size,),
                [WeightSlice(f"{name}.bias", 0, src, dst) for name, _, cuts in columns for src, dst in cuts],
                {f"{name}.bias": (full,) for name, full, _ in columns},
            )
            if bias
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.prepacked)


class RowParallelLinear(PrepackedLinear):
    """y = x Wᵀ + b with the input features cut: x [T, own in], y [T, out] summed over ranks; the bias is added once,
    after the sum.
    """

    def __init__(
        self,
        name: str,
        full_in: int,
        own_in: int,
        out_size: int,
        cuts: list[tuple[range, range]],
        bias: bool,
        group: Group,
    ):
        super().__init__()
        self.group = group
        self.weight = sharded_parameter(
            (out_size, own_in),
            [WeightSlice(f"{name}.weight", 1, src, dst) for src, dst in cuts],
            {f"{name}.weight": (out_size, full_in)},
        )
        self.bias = replicated_parameter(f"{name}.bias", out_size) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.group.all_reduce(linear(x, self.weight, prepacked=self.prepacked))
        return y if self.bias is None else y + self.bias


def merged_columns(names: list[str], full: int, share: range) -> list[tuple[str, int, list[tuple[range, range]]]]:
    """The same columns of several tensors, stacked: gate and up."""
    width = len(share)
    return [(name, full, [(share, range(i * width, (i + 1) * width))]) for i, name in enumerate(names)]


def qkv_columns(
    prefix: str, heads: HeadShard, head_dim: int, num_heads: int, num_kv_heads: int
) -> list[tuple[str, int, list[tuple[range, range]]]]:
    """Query heads (padded to whole groups), then key heads, then value heads, of one rank."""
    query = [(_rows(head, head_dim), _rows(slot, head_dim)) for slot, head in heads.slots()]
    columns = [(f"{prefix}.q_proj", num_heads * head_dim, query)]
    for index, name in enumerate(("k_proj", "v_proj")):
        base = heads.num_heads + index * len(heads.kv_heads)
        cuts = [(_rows(kv, head_dim), _rows(base + i, head_dim)) for i, kv in enumerate(heads.kv_heads)]
        columns.append((f"{prefix}.{name}", num_kv_heads * head_dim, cuts))
    return columns


def head_rows(heads: HeadShard, head_dim: int) -> list[tuple[range, range]]:
    """Which input columns of the output projection belong to a rank's query heads."""
    return [(_rows(head, head_dim), _rows(slot, head_dim)) for slot, head in heads.slots()]


def _rows(head: int, head_dim: int) -> range:
    return range(head * head_dim, (head + 1) * head_dim)
