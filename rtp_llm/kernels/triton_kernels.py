"""Tries Triton's kernels before they are used: Triton compiles them on the machine where they run."""

import logging
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch

from rtp_llm.contract.kv_cache import KVCacheSpec, make_layout
from rtp_llm.kernels import torch_ops
from rtp_llm.kernels.attention_backend import AttentionBackend, AttentionParams
from rtp_llm.kernels.batch import ForwardBatch
from rtp_llm.kernels.kv_cache import DTYPES, carve
from rtp_llm.kernels.reference import ReferenceBackend

if TYPE_CHECKING:
    from rtp_llm.kernels.triton_attention import TritonBackend

log = logging.getLogger(__name__)

EPS = 1e-5
ROWS, SIZE, HEADS, KV_HEADS, HEAD_DIM = 3, 80, 8, 2, 64
DECODE, CHUNK, BLOCK_SIZE = 700, 40, 16  # tokens: a decode whose keys are several splits, a chunk of several tiles
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class TritonKernels:
    """ops: the module `triton_ops`. attention: the class `TritonBackend`."""

    ops: ModuleType
    attention: "type[TritonBackend]"


@cache
def triton_kernels(device: torch.device) -> TritonKernels | None:
    """Returns Triton's kernels if they run on this device and compute what torch does, otherwise None. Logs why not."""
    if device.type != "cuda":
        return None
    try:
        kernels = import_kernels()
        check_ops(kernels.ops, device, torch.bfloat16)
        check_attention(kernels.attention(), device, torch.bfloat16)
    except Exception as error:
        # Any: Triton needs a C compiler, Python's headers, NVIDIA's assembler and a GPU that it supports.
        log.warning(
            "Triton's kernels do not work here, steps take several times longer: %s: %s", type(error).__name__, error
        )
        return None
    return kernels


def import_kernels() -> TritonKernels:
    """Raises ImportError without Triton: a machine without a GPU has none."""
    from rtp_llm.kernels import triton_ops
    from rtp_llm.kernels.triton_attention import TritonBackend

    return TritonKernels(triton_ops, TritonBackend)


def check_ops(triton_ops: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    """Raises AssertionError if an operation gives something else than its composition of torch operations."""
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(dtype).to(device)

    def check(actual: object, expected: object) -> None:
        torch.testing.assert_close(actual, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])

    x, residual, weight, post_weight = noise(ROWS, SIZE), noise(ROWS, SIZE), noise(SIZE), noise(SIZE)
    check(triton_ops.rms_norm(x, weight, EPS), torch_ops.rms_norm(x, weight, EPS))
    check(triton_ops.silu_and_mul(x), torch_ops.silu_and_mul(x))
    expected = torch_ops.add_rms_norm(x, residual, post_weight, weight, EPS)
    check(triton_ops.add_rms_norm(x, residual, post_weight, weight, EPS), expected)

    qkv, norms = noise(ROWS, (HEADS + 2 * KV_HEADS) * HEAD_DIM), (noise(HEAD_DIM), noise(HEAD_DIM))
    cos_sin = noise(ROWS, 1, HEAD_DIM // 2), noise(ROWS, 1, HEAD_DIM // 2)
    q, k, _ = qkv.view(ROWS, -1, HEAD_DIM).split((HEADS, KV_HEADS, KV_HEADS), 1)
    rotated = torch_ops.norm_rope(q, k, norms, EPS, cos_sin)
    triton_ops.norm_rope(qkv, HEADS, KV_HEADS, norms, EPS, cos_sin)
    check((q, k), rotated)


def check_attention(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int = HEAD_DIM, window: int = 0
) -> None:
    """Raises AssertionError if the outputs for a decode and a chunk differ from those of the reference backend."""
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(dtype).to(device)

    name = next(name for name, known in DTYPES.items() if known == dtype)
    shape = (KV_HEADS, head_dim)
    spec = KVCacheSpec((("keys", shape), ("values", shape)), name, window=window)
    layout, lengths = make_layout([spec], BLOCK_SIZE), np.array([DECODE, CHUNK])
    tables = 1 + np.arange(2 * layout.groups[0].num_blocks(DECODE)).reshape(2, -1)
    batch = ForwardBatch.build(
        token_ids=np.zeros(1 + CHUNK, np.int32),
        query_start_loc=np.array([0, 1, 1 + CHUNK]),
        seq_lens=lengths,
        prompt_lens=lengths,
        block_tables=[tables],
        block_sizes=[BLOCK_SIZE],
        device=device,
    )
    q, k, v = (noise(1 + CHUNK, heads, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS))
    memory = noise(1 + tables.size, layout.block_bytes // dtype.itemsize).view(torch.uint8)
    outputs = []
    tried: list[AttentionBackend] = [backend, ReferenceBackend(device)]
    for each in tried:
        (cache,) = carve(memory.clone(), layout)
        metadata = each.prepare(batch, 0, spec, BLOCK_SIZE)
        outputs.append(each.forward(AttentionParams(head_dim**-0.5), q, k, v, cache, metadata))
    torch.testing.assert_close(*outputs, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
