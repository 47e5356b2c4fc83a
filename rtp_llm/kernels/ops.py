"""Operations between the linear layers and attention.

Each is a kernel of `rtp_llm.native` for tensors on a CPU that has it, a Triton kernel on a GPU, otherwise a composition
of torch operations. In bf16 and fp16 all round at the same places; only the order of the sum in a norm differs, and so
rarely its last bit. In fp32, and on a GPU, the kernels may also use fused multiply-add.
"""

from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from rtp_llm.kernels import torch_ops
from rtp_llm.kernels.torch_ops import CosSin
from rtp_llm.kernels.triton_kernels import triton_kernels
from rtp_llm.native.library import DTYPE_CODES, Library, library


class AllReduce(Protocol):
    """The interface of a group of tensor-parallel ranks, as far as it sums their partial results."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums the tensor over all ranks in place. Returns the same tensor."""
        ...


def _kernels_for(x: Tensor) -> Library | None:
    """Returns the kernels that compute with x, None if torch does."""
    return library() if x.is_cpu and str(x.dtype) in DTYPE_CODES else None


def _triton_for(x: Tensor) -> ModuleType | None:
    """Returns the module of the Triton kernels that compute with x, None if torch does."""
    triton = triton_kernels(x.device) if x.is_cuda else None
    return triton.ops if triton else None


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / rms(x) * weight over the last dimension, [..., size]. The quotient is computed in float32."""
    kernels = _kernels_for(x)
    if kernels is None:
        return (_triton_for(x) or torch_ops).rms_norm(x, weight, eps)
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = torch.empty_like(rows, memory_format=torch.contiguous_format)
    kernels.rtp_rms_norm(
        DTYPE_CODES[str(x.dtype)],
        rows.data_ptr(),
        rows.stride(0),
        weight.data_ptr(),
        y.data_ptr(),
        *rows.shape,
        eps,
        torch.get_num_threads(),
    )
    return y.view(x.shape)


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, ranks: AllReduce, post_weight: Tensor | None, pre_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Ends a sub-block (attention or FFN) of the decoder: all-reduce, residual addition, norms. Returns (input of the
    next sub-block, residual), each [num_tokens, size].

    x: this rank's partial output of the sub-block. post_weight: norm of the output before it is added to the residual.
    pre_weight: norm of the next input. None: no norm there. x and residual are contiguous, and may be overwritten.
    """
    x = ranks.all_reduce(x)
    kernels = _kernels_for(x)
    if kernels is None:
        return (_triton_for(x) or torch_ops).add_rms_norm(x, residual, post_weight, pre_weight, eps)
    kernels.rtp_add_rms_norm(
        DTYPE_CODES[str(x.dtype)],
        x.data_ptr(),
        residual.data_ptr(),
        _pointer(post_weight),
        _pointer(pre_weight),
        *x.shape,
        eps,
        torch.get_num_threads(),
    )
    return (residual if pre_weight is None else x), residual


def norm_rope(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cos_sin: CosSin | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalizes and rotates query and key heads. Returns q [T, heads, head_dim], and k and v [T, kv_heads, head_dim].

    qkv: [T, (heads + 2 * kv_heads) * head_dim], all query heads, key heads, value heads; may be overwritten. The
    results may be views of it. norms: weights [head_dim] of the queries' and of the keys' norm, None: no norms.
    cos_sin: see `torch_ops.apply_rotary_emb`, None: no rotation.
    """
    head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    num_tokens = qkv.shape[0]  # len() of a tensor takes a microsecond
    heads = qkv.view(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), 1)
    kernels = _kernels_for(qkv)
    if kernels is None or qkv.stride(1) != 1:
        triton_ops = _triton_for(qkv)
        if triton_ops is None or head_dim % 2 or qkv.stride(1) != 1:
            return *torch_ops.norm_rope(q, k, norms, eps, cos_sin), v
        triton_ops.norm_rope(qkv, num_heads, num_kv_heads, norms, eps, cos_sin)
        return q, k, v
    kernels.rtp_norm_rope(
        DTYPE_CODES[str(qkv.dtype)],
        qkv.data_ptr(),
        qkv.stride(0),
        *map(_pointer, norms or (None, None)),
        *map(_pointer, cos_sin or (None, None)),
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        eps,
        torch.get_num_threads(),
    )
    return q, k, v


def silu_and_mul(x: Tensor) -> Tensor:
    """Returns silu(gate) * up, [num_tokens, size]. x: [num_tokens, 2 * size], gate and up side by side."""
    return (_triton_for(x) or torch_ops).silu_and_mul(x)
