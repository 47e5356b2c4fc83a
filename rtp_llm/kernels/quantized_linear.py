"""Linear layers on CPU whose weights are quantized at load, with the kernels of `rtp_llm.native`.

Without these kernels, torch computes the same from the quantized weights, much more slowly.
"""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, silu

from rtp_llm.kernels.huge_pages import WEIGHTS
from rtp_llm.kernels.linear_method import LinearMethod, Weights
from rtp_llm.native.library import DTYPE_CODES, library

GROUP_SIZE = 32  # inputs that share a scale in INT4
_ROWS_AT_ONCE = 256  # of W that are quantized together, so that the intermediate values stay in the cache


class Quantized(LinearMethod):
    """Base class of the linear methods that read the weight matrix in the model's dtype, and quantize it after loading
    to integers with scales. A subclass defines how weights and inputs are rounded.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._library = library()
        self._dtype, self._output_dtype = DTYPE_CODES[str(self.dtype)], DTYPE_CODES[str(self.output_dtype)]
        self._size = (self.out_size, self.in_size, int(self.gated))

    @staticmethod
    @abstractmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the quantized weight matrix: (integers [out, in] int8, scales [out, groups] float32). weight: [out,
        in].
        """

    @staticmethod
    @abstractmethod
    def round_inputs(x: Tensor) -> Tensor:
        """Returns the layer's input x [num_rows, in_size] as the kernel rounds it before it multiplies, float32."""

    @property
    def weight_bytes(self) -> int:
        """Returns the size of a layer's weight matrix in bytes, as it is kept after loading: integers and scales."""
        if self._library is None:
            return self.out_size * (self.in_size + 4 * self.num_groups(self.in_size))
        return int(getattr(self._library, f"rtp_{self.name}_packed_bytes")(self._dtype, *self._size))

    @staticmethod
    def num_groups(in_size: int) -> int:
        """Returns the number of scales per output feature of a layer with `in_size` inputs: 1 unless a subclass has one
        scale per group of inputs.
        """
        return 1

    def transform(self, loaded: Weights) -> Weights:
        """Quantizes the loaded weight matrix and packs it for the kernel (implements `LinearMethod`)."""
        rows = loaded["weight"].detach().split(_ROWS_AT_ONCE)
        integers, scales = (torch.cat(parts) for parts in zip(*map(self.quantize, rows), strict=True))
        if self._library is None:
            return {"weight": integers, "scales": scales}
        packed = WEIGHTS.allocate(self.weight_bytes)
        getattr(self._library, f"rtp_{self.name}_pack")(
            self._dtype,
            integers.data_ptr(),
            scales.data_ptr(),
            packed.data_ptr(),
            *self._size,
            torch.get_num_threads(),
        )
        return {"weight": packed}

    def apply(self, x: Tensor, weights: Weights, bias: Tensor | None = None) -> Tensor:
        """Returns the layer's output, computed with quantized weights (implements `LinearMethod`). For a gated layer
        (gate_proj and up_proj), that is silu(gate) * up.
        """
        if self._library is None:
            return self._multiply_with_torch(x, weights, bias)
        x = x if x.stride(-1) == 1 else x.contiguous()
        out_size = self.out_size // (1 + self.gated)
        y = torch.empty(len(x), out_size, dtype=self.output_dtype)
        getattr(self._library, f"rtp_{self.name}_linear")(
            self._dtype,
            self._output_dtype,
            x.data_ptr(),
            x.stride(0),
            weights["weight"].data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            out_size,
            len(x),
            *self._size,
            torch.get_num_threads(),
        )
        return y

    apply_gated = apply

    def _multiply_with_torch(self, x: Tensor, weights: Weights, bias: Tensor | None) -> Tensor:
        weight = dequantize(weights["weight"], weights["scales"])
        y = linear(self.round_inputs(x), weight, None if bias is None else bias.float())
        if self.gated:
            gate, up = y.chunk(2, dim=-1)
            y = silu(gate) * up
        return y.to(self.output_dtype)


class Int8(Quantized):
    """8-bit weights with one scale per output feature; activations stay in the model's dtype."""

    name: ClassVar[str] = "int8"

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a weight matrix as 8-bit integers and one scale per row (implements `Quantized`)."""
        return _round_to_scale(weight.float(), 127)

    @staticmethod
    def round_inputs(x: Tensor) -> Tensor:
        """Returns the layer's input as float32: this method does not quantize activations (implements `Quantized`)."""
        return x.float()


class W8A8(Int8):
    """8-bit weights as in `Int8`, and activations rounded to 8 bits with one scale per row."""

    name: ClassVar[str] = "w8a8"

    @staticmethod
    def round_inputs(x: Tensor) -> Tensor:
        """Returns the layer's input as float32, each row rounded to integers of 8 bits times the row's scale
        (implements `Quantized`).
        """
        return dequantize(*_round_to_scale(x.float(), 127))


class Int4(Quantized):
    """4-bit weights with a bf16 scale per GROUP_SIZE inputs, and 8-bit activations with a scale per GROUP_SIZE inputs.

    Each rank groups its own inputs, so a shard can start anywhere.
    """

    name: ClassVar[str] = "int4"

    @staticmethod
    def num_groups(in_size: int) -> int:
        """Returns the number of scales per output feature: one per GROUP_SIZE inputs (implements `Quantized`)."""
        return -(-in_size // GROUP_SIZE)

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a weight matrix as 4-bit integers, stored as int8, and one scale per group (implements `Quantized`).
        The value with the largest magnitude of a group becomes -8; scales can be negative.
        """
        groups = _split_groups(weight.float())
        low, high = groups.aminmax(dim=-1, keepdim=True)
        extreme = torch.where(-low >= high, low, high)
        scales = (extreme / -8).bfloat16().float()
        integers = (groups / scales).nan_to_num_(0, 0, 0).round_().clamp_(-8, 7)
        return integers.to(torch.int8).flatten(1)[:, : weight.shape[1]].contiguous(), scales.squeeze(-1)

    @staticmethod
    def round_inputs(x: Tensor) -> Tensor:
        """Returns the layer's input as float32, each group of a row (GROUP_SIZE inputs) rounded to integers of 8 bits
        times the group's scale (implements `Quantized`).
        """
        groups = _split_groups(x.float())
        integers, scales = _round_to_scale(groups.flatten(0, 1), 127)
        return dequantize(integers, scales).reshape(len(x), -1)[:, : x.shape[1]]


def dequantize(integers: Tensor, scales: Tensor) -> Tensor:
    """Returns a quantized matrix as float32: integers [rows, in] times the scales of their groups. scales: [rows,
    groups].
    """
    if scales.shape[1] > 1:
        scales = scales.repeat_interleave(GROUP_SIZE, 1)[:, : integers.shape[1]]
    return integers * scales


def _round_to_scale(values: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Returns (integers [rows, size] int8, scales [rows, 1] float32): the largest magnitude of a row is `largest`."""
    magnitudes = values.abs().amax(1, keepdim=True)
    scales = magnitudes / largest
    inverses = torch.where(magnitudes > 1e-30, values.new_tensor(largest) / magnitudes, 0)
    return (values * inverses).round_().to(torch.int8), scales


def _split_groups(values: Tensor) -> Tensor:
    """Returns [rows, groups, GROUP_SIZE] of [rows, size]; zeros fill up the last group."""
    return pad(values, (0, -values.shape[1] % GROUP_SIZE)).unflatten(1, (-1, GROUP_SIZE))
