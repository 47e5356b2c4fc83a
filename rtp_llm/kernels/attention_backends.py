"""Chooses the attention backend of a rank."""

from collections.abc import Sequence

import torch

from rtp_llm.contract.kv_cache import KVCacheSpec
from rtp_llm.kernels.attention_backend import AttentionBackend
from rtp_llm.kernels.native_attention import NativeBackend
from rtp_llm.kernels.reference import ReferenceBackend
from rtp_llm.kernels.triton_kernels import triton_kernels
from rtp_llm.native.library import library


def select_backend(device: torch.device, specs: Sequence[KVCacheSpec]) -> AttentionBackend:
    """Returns the fastest backend for this device that supports all caches of keys and values: the native kernels on
    CPU, Triton's on a GPU, otherwise plain torch. `specs`: of the model's KV cache groups.
    """
    specs = [spec for spec in specs if "keys" in dict(spec.tensors)]
    if device.type == "cpu" and library() and all(map(NativeBackend.is_supported, specs)):
        return NativeBackend()
    triton = triton_kernels(device)
    if triton and all(map(triton.attention.is_supported, specs)):
        return triton.attention()
    return ReferenceBackend(device)
