"""Linear layers on CPU with the kernels of `rtp_llm.native`."""

from typing import Any

import torch
from torch import Tensor

from rtp_llm.kernels.huge_pages import WEIGHTS
from rtp_llm.kernels.linear_method import LinearMethod, Weights
from rtp_llm.native.library import DTYPE_CODES, Library, library

MAX_PROBED_OUTPUTS = 1 << 13


class Packed(LinearMethod):
    """Stores the weight matrix of a linear layer, after loading, in blocks that the kernel reads sequentially
    (src/linear.cpp). The bits of a row of the result never depend on the other rows.
    """

    name = "packed"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        kernels = library()
        assert kernels, "is_supported comes first"
        self._library: Library = kernels
        self._dtype, self._output_dtype = DTYPE_CODES[str(self.dtype)], DTYPE_CODES[str(self.output_dtype)]

    @staticmethod
    def is_supported(dtype: torch.dtype) -> bool:
        """Returns whether the kernels of this machine multiply weights of `dtype` faster than torch."""
        kernels = library()
        return kernels is not None and kernels.level != "portable" and str(dtype) in DTYPE_CODES

    @property
    def weight_bytes(self) -> int:
        """Returns the size of a layer's weight matrix in bytes, in the blocked layout in which it is kept."""
        return int(self._library.rtp_linear_packed_bytes(self._dtype, self.gated, self.out_size, self.in_size))

    def transform(self, loaded: Weights) -> Weights:
        """Copies the loaded weight matrix into blocks for the kernel (implements `LinearMethod`)."""
        weight = loaded["weight"].detach().contiguous()
        packed = WEIGHTS.allocate(self.weight_bytes)
        self._library.rtp_linear_pack(
            self._dtype,
            self.gated,
            weight.data_ptr(),
            packed.data_ptr(),
            self.out_size,
            self.in_size,
            torch.get_num_threads(),
        )
        return {"weight": packed}

    def apply(self, x: Tensor, weights: Weights, bias: Tensor | None = None) -> Tensor:
        """Returns the layer's output, computed from the blocks of the weight matrix (implements `LinearMethod`). For a
        gated layer (gate_proj and up_proj), that is silu(gate) * up.
        """
        if x.stride(-1) != 1:
            x = x.contiguous()
        num_columns = self.out_size // 2 if self.gated else self.out_size
        num_rows = x.shape[0]  # len() of a tensor takes a microsecond
        y = torch.empty(num_rows, num_columns, dtype=self.output_dtype)
        self._library.rtp_linear(
            self._dtype,
            self._output_dtype,
            self.gated,
            x.data_ptr(),
            x.stride(0),
            weights["weight"].data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            num_columns,
            num_rows,
            self.out_size,
            self.in_size,
            torch.get_num_threads(),
        )
        return y

    apply_gated = apply

    def measure_batch_invariance(self, weights: Weights) -> None:
        """Measures whether the result for a row (token) depends on the other rows of the batch (implements
        `LinearMethod`). Computes only the first outputs of a large weight matrix: outputs do not affect each other.
        """
        if self.gated or self.out_size <= MAX_PROBED_OUTPUTS:
            super().measure_batch_invariance(weights)
            return
        probed = Packed(MAX_PROBED_OUTPUTS, self.in_size, self.dtype, output_dtype=self.output_dtype)
        probed.measure_batch_invariance(weights)
        self.batch_invariant = probed.batch_invariant
