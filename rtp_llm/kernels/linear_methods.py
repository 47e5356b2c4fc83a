"""The table of linear methods by name, and the choice of the method for a layer."""

from functools import cache
from math import lcm

import torch

from rtp_llm.kernels.linear_method import LinearMethod, Plain, Prepacked
from rtp_llm.kernels.packed_linear import Packed
from rtp_llm.kernels.quantized_linear import W8A8, Int4, Int8
from rtp_llm.native.library import Library, library

# Below this, a call of oneDNN (9 µs more than torch's) costs more than it gains.
MIN_PREPACKED_ELEMENTS = 1 << 15
LINEAR_METHODS: dict[str, type[LinearMethod]] = {
    method.name: method for method in (Plain, Prepacked, Packed, Int8, W8A8, Int4)
}


def shard_granularity(name: str) -> int:
    """Returns the granularity of the shards of a weight matrix: the matrix may be cut, along outputs and along inputs,
    only at multiples of this number of features.

    `name`: linear method, a key of LINEAR_METHODS; "": no quantization, returns 1.
    """
    return lcm(*LINEAR_METHODS[name].shard_granularity) if name else 1


def select_linear_method(
    name: str,
    out_size: int,
    in_size: int,
    dtype: torch.dtype,
    device: torch.device,
    gated: bool = False,
    output_dtype: torch.dtype | None = None,
) -> LinearMethod:
    """Returns the method for a layer with the weight matrix [out_size, in_size]; `name`: a key of LINEAR_METHODS, or ""
    for the fastest.

    gated, output_dtype: see `LinearMethod`.
    """
    name = name or _fastest_method(out_size * in_size, dtype, device)
    return _make_method(LINEAR_METHODS[name], out_size, in_size, dtype, device, gated, output_dtype, library())


def _fastest_method(num_elements: int, dtype: torch.dtype, device: torch.device) -> str:
    if device.type != "cpu":
        return "plain"
    if Packed.is_supported(dtype):
        return "packed"
    return "prepacked" if num_elements >= MIN_PREPACKED_ELEMENTS and Prepacked.is_supported(dtype) else "plain"


@cache
def _make_method(
    method: type[LinearMethod],
    out_size: int,
    in_size: int,
    dtype: torch.dtype,
    device: torch.device,
    gated: bool,
    output_dtype: torch.dtype | None,
    kernels: Library | None,
) -> LinearMethod:
    """Returns one shared instance for equal arguments. device, kernels: the method depends on both."""
    return method(out_size, in_size, dtype, gated, output_dtype)
