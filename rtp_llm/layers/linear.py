"""Tensor-parallel linear layers (Shoeybi et al. 2019, arXiv 1909.08053): a column-parallel layer, whose outputs are
sharded, feeds a row-parallel one, whose partial sums the caller sums over the ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rtp_llm.errors import ConfigError
from rtp_llm.kernels.linear_method import Weights, WeightTensor
from rtp_llm.kernels.linear_methods import select_linear_method
from rtp_llm.layers.parameter import (
    ShardedParameter,
    WeightSlice,
    replicated_parameter,
    sharded_parameter,
)
from rtp_llm.parallel.sharding import HeadShard

Slices = list[tuple[range, range]]  # (range in the checkpoint tensor, range in the parameter)
Columns = list[tuple[str, int, Slices]]  # (tensor name without ".weight", its output size, the slices of this rank)
FullSizes = dict[str, tuple[int, int]]  # (output, input) features of whole layers of the checkpoint, by name


class ParallelLinear(nn.Module):
    """y = x Wᵀ + b, where the weight matrix W [out_size, in_size] is one rank's shard of one or several linear layers
    of the checkpoint.

    slices: the slices of checkpoint tensors that make up W. linear_method, gated, output_dtype: see
    `select_linear_method`.
    """

    def __init__(
        self,
        out_size: int,
        in_size: int,
        slices: Sequence[WeightSlice],
        full_sizes: FullSizes,
        bias: ShardedParameter | None,
        linear_method: str,
        gated: bool = False,
        output_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        self.method = select_linear_method(linear_method, out_size, in_size, dtype, device, gated, output_dtype)
        for suffix, tensor in self.method.tensors.items():
            self.register_parameter(suffix, _make_weight((out_size, in_size), slices, full_sizes, suffix, tensor))
        self.bias = bias
        self.weights: Weights = {}

    def process_weights_after_loading(self) -> None:
        """Lets the linear method repack or quantize the loaded weights for `forward`, and frees the loaded tensors (as
        in vLLM).
        """
        loaded = self._loaded_weights()
        self.weights = self.method.transform(loaded)
        for suffix, parameter in loaded.items():
            if self.weights.get(suffix) is not parameter:
                self._parameters.pop(suffix, None)
        self.method.measure_batch_invariance(self.weights)

    def _loaded_weights(self) -> Weights:
        return {suffix: self.get_parameter(suffix) for suffix in self.method.tensors}

    def forward(self, x: Tensor) -> Tensor:
        """Returns y [num_tokens, out_size], or [num_tokens, out_size / 2] if gated. x: the input [num_tokens,
        in_size].
        """
        return self.method.forward(x, self.weights, self.bias)


def _make_weight(
    size: tuple[int, int], slices: Sequence[WeightSlice], full_sizes: FullSizes, suffix: str, tensor: WeightTensor
) -> ShardedParameter:
    """Returns the parameter for one of the tensors of a linear method, cut as `slices` cut W.

    Raises ConfigError if a cut goes through a block or a packed word of the method.
    """
    for axis, step in tensor.dims:
        for cut in slices:
            source, target, full = cut.source[axis], cut.target[axis], full_sizes[cut.name][axis]
            is_aligned = source.start % step == 0 and (source.stop % step == 0 or source.stop == full)
            if step > 1 and (not is_aligned or target.start % step or source.step != 1):
                raise ConfigError(
                    f"TP_SIZE: {cut.name}.{suffix} can be split only at multiples of {step} features, not at"
                    f" {source.start} to {source.stop}; allowed: a smaller TP_SIZE"
                )
    cuts = [WeightSlice(f"{cut.name}.{suffix}", tensor.box(cut.source), tensor.box(cut.target)) for cut in slices]
    return sharded_parameter(
        tensor.shape(size),
        list(dict.fromkeys(cuts)),  # slices of W along an axis that the tensor does not have are one slice of it
        {f"{name}.{suffix}": tensor.shape(full_size) for name, full_size in full_sizes.items()},
        tensor.dtype,
    )


class ColumnParallelLinear(ParallelLinear):
    """A linear layer with sharded output features.

    `out_size`: output features of this rank. `columns`: the slices of checkpoint tensors that are stacked in the weight
    matrix of this rank, as from `merged_columns` or `qkv_columns`.
    """

    def __init__(
        self, in_size: int, out_size: int, columns: Columns, bias: bool, linear_method: str = "", gated: bool = False
    ):
        inputs = range(in_size)
        super().__init__(
            out_size,
            in_size,
            [WeightSlice(name, (src, inputs), (dst, inputs)) for name, _, slices in columns for src, dst in slices],
            {name: (full_size, in_size) for name, full_size, _ in columns},
            _column_bias(out_size, columns) if bias else None,
            linear_method,
            gated,
        )


def _column_bias(out_size: int, columns: Columns) -> ShardedParameter:
    return sharded_parameter(
        (out_size,),
        [WeightSlice(f"{name}.bias", (src,), (dst,)) for name, _, slices in columns for src, dst in slices],
        {f"{name}.bias": (full_size,) for name, full_size, _ in columns},
    )


class RowParallelLinear(ParallelLinear):
    """A linear layer with sharded input features. Its output is partial: y is the sum over all ranks.

    `slices`: the input features of this rank. `bias`: whether this rank adds the bias; exactly one rank must.
    """

    def __init__(
        self,
        name: str,
        full_in_size: int,
        local_in_size: int,
        out_size: int,
        slices: Slices,
        bias: bool,
        linear_method: str = "",
    ):
        outputs = range(out_size)
        super().__init__(
            out_size,
            local_in_size,
            [WeightSlice(name, (outputs, src), (outputs, dst)) for src, dst in slices],
            {name: (out_size, full_in_size)},
            replicated_parameter(f"{name}.bias", out_size) if bias else None,
            linear_method,
        )


def merged_columns(names: list[str], full_size: int, shard: range) -> Columns:
    """Returns which slices of several checkpoint tensors (such as gate_proj and up_proj) are stacked, in this order, in
    the weight matrix of this rank: the output features `shard` of each tensor.

    One entry per tensor: (its name without ".weight", `full_size`, slices). A slice is (range of output features in the
    checkpoint tensor, range in the weight matrix). `full_size`: number of output features of each tensor.
    """
    width = len(shard)
    return [(name, full_size, [(shard, range(i * width, (i + 1) * width))]) for i, name in enumerate(names)]


def qkv_columns(prefix: str, heads: HeadShard, head_dim: int, num_heads: int, num_kv_heads: int) -> Columns:
    """Returns which output features of the checkpoint's q_proj, k_proj and v_proj this rank has (its heads), stacked in
    this order; the format is that of `merged_columns`. `prefix`: what the tensor names begin with.

    The query heads of each KV head are padded to an equal number, see `HeadShard`.
    """
    columns = [(f"{prefix}.q_proj", num_heads * head_dim, query_head_slices(heads, head_dim))]
    for index, name in enumerate(("k_proj", "v_proj")):
        base = heads.num_heads + index * len(heads.kv_heads)
        slots = [(base + i, kv) for i, kv in enumerate(heads.kv_heads)]
        columns.append((f"{prefix}.{name}", num_kv_heads * head_dim, _head_slices(slots, head_dim)))
    return columns


def query_head_slices(heads: HeadShard, head_dim: int) -> Slices:
    """Returns the slices of this rank's query heads, each (range of features in the checkpoint, range on this rank).
    The features are outputs of q_proj and inputs of o_proj.
    """
    return _head_slices(heads.slots(), head_dim)


def _head_slices(slots: list[tuple[int, int]], head_dim: int) -> Slices:
    """Returns the slices of (local index, head) pairs; heads that are adjacent in both are one slice."""
    slices: Slices = []
    for slot, head in slots:
        src, dst = (range(i * head_dim, (i + 1) * head_dim) for i in (head, slot))
        if slices and slices[-1][0].stop == src.start and slices[-1][1].stop == dst.start:
            previous = slices.pop()
            src, dst = range(previous[0].start, src.stop), range(previous[1].start, dst.stop)
        slices.append((src, dst))
    return slices
