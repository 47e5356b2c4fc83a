"""Compiles Triton's kernels to the machine code of GPUs, on a machine without one.

`python -m tests.kernels.compile_triton` prints a line per kernel and GPU: name, compute capability, dtype, bytes of
shared memory. The arguments are those of `rtp_llm.kernels.triton_kernels`, which tries the kernels on a GPU.
"""

from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rtp_llm.kernels import triton_attention, triton_ops
from rtp_llm.kernels.triton_kernels import check_attention, check_ops

CAPABILITIES = (80, 90)  # A100, H100
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WARP_SIZE = 32
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
OPTIONS = {"num_stages", "num_warps"}


class CompiledKernel:
    """Takes the place of a kernel: compiles it for the arguments of a launch instead of launching it."""

    def __init__(self, kernel: Any, dtype: torch.dtype):
        self._kernel, self._dtype = kernel, dtype

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.compile

    def compile(self, *args: Any, **kwargs: Any) -> None:
        options = {name: value for name, value in kwargs.items() if name in OPTIONS}
        arguments = dict(zip(self._kernel.arg_names, args, strict=False))
        names = self._kernel.arg_names
        constants = {(names.index(name),): value for name, value in kwargs.items() if name not in OPTIONS}
        signature = {name: _type_of(arguments[name]) if name in arguments else "constexpr" for name in names}
        # As at a launch: 16 divides addresses and most strides, which decides how wide loads are.
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if isinstance(arguments.get(name), Tensor) or (name.endswith("stride") and arguments[name] % 16 == 0)
        }
        for capability in CAPABILITIES:
            source = ASTSource(self._kernel, signature, constants, aligned)
            compiled = triton.compile(source, GPUTarget("cuda", capability, WARP_SIZE), options)
            assert compiled.asm["cubin"]
            print(self._kernel.__name__, capability, NAMES[self._dtype], compiled.metadata.shared)


def _type_of(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return f"*{NAMES[argument.dtype]}"
    return "fp32" if isinstance(argument, float) else "i32"


def main() -> None:
    cpu = torch.device("cpu")
    for dtype in DTYPES:
        with ExitStack() as stack:
            for module in (triton_attention, triton_ops):
                for name in [name for name in vars(module) if name.endswith("_kernel")]:
                    kernel = CompiledKernel(getattr(module, name), dtype)
                    stack.enter_context(mock.patch.object(module, name, kernel))
            stack.enter_context(mock.patch("torch.testing.assert_close"))  # nothing is computed
            check_ops(triton_ops, cpu, dtype)
            for head_dim, window in ((64, 0), (64, 100), (128, 0), (256, 0)):
                check_attention(triton_attention.TritonBackend(), cpu, dtype, head_dim, window)
            qkv = torch.zeros(1, 4 * 64, dtype=dtype)
            triton_ops.norm_rope(qkv, 2, 1, (qkv[0], qkv[0]), 1e-5, None)
            triton_ops.norm_rope(qkv, 2, 1, None, 1e-5, (qkv, qkv))
            triton_ops.add_rms_norm(qkv, qkv, None, qkv[0], 1e-5)
            triton_ops.add_rms_norm(qkv, qkv, qkv[0], None, 1e-5)


if __name__ == "__main__":
    main()
