"""Linear methods: how the weight of a linear layer is read, stored in memory and multiplied (as in vLLM).

A quantized format is one class and one entry in `linear_methods.LINEAR_METHODS`; layers do not depend on the format.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from rtp_llm.kernels.ops import silu_and_mul

PROBE_ROWS = (1, 2, 3, 16, 64)  # numbers of rows between which libraries are known to change kernels
REFERENCE_ROWS = 128
PROBE_OUTPUTS = 1 << 16  # compared for each; a changed order of additions shows in one of some thousand bf16 outputs
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class WeightTensor:
    """A tensor of a checkpoint that holds the weight matrix W [out_size, in_size] of a linear layer, or a part of it.

    dims: for each dimension of the tensor, the axis of W that it corresponds to (0: out, 1: in), and how many rows or
    columns of W one index covers: 8 for 4-bit values packed into int32, 128 for the scales of fp8 blocks.
    """

    dtype: torch.dtype
    dims: tuple[tuple[int, int], ...] = ((0, 1), (1, 1))

    def shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Returns the shape of this tensor in the checkpoint, for a weight matrix W of `size` (out_size, in_size)."""
        return tuple(-(-size[axis] // step) for axis, step in self.dims)

    def box(self, box: Sequence[range]) -> tuple[range, ...]:
        """Returns the ranges of this tensor that hold the rows and columns `box` of the weight matrix W."""
        ranges = [(box[axis], step) for axis, step in self.dims]
        return tuple(r if step == 1 else range(r.start // step, -(-r.stop // step)) for r, step in ranges)


class LinearMethod(ABC):
    """Reads, stores and multiplies the weight matrix W [out_size, in_size] of a linear layer y = x Wᵀ + bias; one
    instance serves all layers of the same size.

    shard_granularity: the bounds of a shard of W are multiples of these numbers of (output, input) features.
    gated: W stacks a gate and an up projection of equal size, and the layer computes silu(gate) * up.
    dtype: of the input x. output_dtype: of the output y, None for `dtype`. batch_invariant: whether the bits of a row
    of y are independent of the other rows and of their number; None until `measure_batch_invariance`.
    """

    name: ClassVar[str]
    shard_granularity: ClassVar[tuple[int, int]] = (1, 1)

    def __init__(
        self,
        out_size: int,
        in_size: int,
        dtype: torch.dtype,
        gated: bool = False,
        output_dtype: torch.dtype | None = None,
    ):
        self.out_size, self.in_size, self.dtype, self.gated = out_size, in_size, dtype, gated
        self.output_dtype = output_dtype or dtype
        self.batch_invariant: bool | None = None

    @property
    def tensors(self) -> dict[str, WeightTensor]:
        """Returns the tensors to read from the checkpoint, by the last component of their names, such as `weight`."""
        return {"weight": WeightTensor(self.dtype)}

    @property
    def weight_bytes(self) -> int:
        """Returns the size of a layer's weight matrix in bytes, as it is kept after loading (`transform` may repack or
        quantize it).
        """
        size = (self.out_size, self.in_size)
        return sum(prod(tensor.shape(size)) * tensor.dtype.itemsize for tensor in self.tensors.values())

    def transform(self, loaded: Weights) -> Weights:
        """Returns the tensors that `apply` uses, computed from the tensors `loaded` from the checkpoint: for example a
        repacked weight matrix. The caller frees the loaded ones that are not returned.
        """
        return loaded

    def forward(self, x: Tensor, weights: Weights, bias: Tensor | None = None) -> Tensor:
        """Returns the layer's output: `apply_gated` if it is gated, otherwise `apply`."""
        y = self.apply_gated(x, weights, bias) if self.gated else self.apply(x, weights, bias)
        return y.to(self.output_dtype)

    @abstractmethod
    def apply(self, x: Tensor, weights: Weights, bias: Tensor | None = None) -> Tensor:
        """Returns x Wᵀ + bias, [num_rows, out_size]. x: the layer's input [num_rows, in_size]. W: its weight matrix.
        bias: [out_size].
        """

    def apply_gated(self, x: Tensor, weights: Weights, bias: Tensor | None = None) -> Tensor:
        """Returns silu(gate) * up, [num_rows, out_size / 2]. gate and up are the halves of x Wᵀ + bias, where x
        [num_rows, in_size] is the input and W the weight matrix.
        """
        return silu_and_mul(self.apply(x, weights, bias))

    def measure_batch_invariance(self, weights: Weights) -> None:
        """Measures `batch_invariant` on the first call: whether a row's result has the same bits whatever rows are
        in the batch with it. That depends on the size of the weight matrix, not on its values.
        """
        if self.batch_invariant is None:
            self.batch_invariant = not self._differing_row_counts(weights)

    @torch.inference_mode()
    def _differing_row_counts(self, weights: Weights) -> list[int]:
        """Returns which of PROBE_ROWS give other bits than the same rows in one product of REFERENCE_ROWS or more."""
        num_rows = max(REFERENCE_ROWS, -(-PROBE_OUTPUTS // self.out_size))
        x = torch.randn(num_rows, self.in_size, generator=torch.Generator().manual_seed(0), device="cpu")
        x = x.to(next(iter(weights.values())).device, self.dtype)
        y = self.forward(x, weights)

        def differs(rows: int) -> bool:
            num_products = -(-PROBE_OUTPUTS // (rows * self.out_size))
            products = zip(x.split(rows)[:num_products], y.split(rows), strict=False)
            return not all(torch.equal(self.forward(part, weights), expected) for part, expected in products)

        return [rows for rows in PROBE_ROWS if differs(rows)]


class Plain(LinearMethod):
    """The linear method without repacking or quantization: keeps the weight matrix as it is in the checkpoint and
    multiplies with torch.
    """

    name = "plain"

    def apply(self, x: Tensor, weights: Weights, bias: Tensor | None = None) -> Tensor:
        """Returns the layer's output, computed by torch (implements `LinearMethod`)."""
        return linear(x, weights["weight"], bias)


class Prepacked(LinearMethod):
    """Stores the weight matrix W in oneDNN's layout, for CPU: reordered once after loading instead of at every call.

    Speedup on one core (AMD EPYC, AVX-512 BF16, torch 2.13, W 4096 x 2048): bf16 with 1 row of input 2.1 to 5.2 times,
    fp32 with 8 rows 2.6 times. If oneDNN uses another kernel for one row than for several, a single row is padded to
    two, so that its bits are the same in every batch: 2 to 20 % slower.
    """

    name = "prepacked"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._pads_single_row = False

    @staticmethod
    def is_supported(dtype: torch.dtype) -> bool:
        """Returns whether this machine can prepack weights of `dtype`."""
        if not torch.backends.mkldnn.is_available():
            return False
        if dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())

    def transform(self, loaded: Weights) -> Weights:
        """Reorders the loaded weight matrix to oneDNN's layout (implements `LinearMethod`)."""
        return {"weight": torch.ops.mkldnn._reorder_linear_weight(loaded["weight"].detach(), None)}

    def measure_batch_invariance(self, weights: Weights) -> None:
        """Measures whether the result for a row (token) depends on the other rows of the batch (implements
        `LinearMethod`). If only a row that is alone in its batch gets other bits, such rows are padded from now on.
        """
        if self.batch_invariant is None:
            differing = self._differing_row_counts(weights)
            self._pads_single_row = differing == [1]
            self.batch_invariant = not differing or self._pads_single_row

    def apply(self, x: Tensor, weights: Weights, bias: Tensor | None = None) -> Tensor:
        """Returns the layer's output, computed by oneDNN (implements `LinearMethod`)."""
        is_padded = self._pads_single_row and len(x) == 1
        if is_padded:
            x = torch.cat((x, x))
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weights["weight"], bias, "none", [], "")
        return y[:1] if is_padded else y
