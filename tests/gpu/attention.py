"""Compares the attention backend of this device with the formula in float64 that tests/kernels/test_reference.py uses.

All caches are strided: between two blocks of a layer are those of the other layers.
"""

import numpy as np
import pytest
import torch

from rtp_llm.kernels.attention_backend import AttentionBackend
from rtp_llm.kernels.attention_backends import select_backend
from rtp_llm.kernels.triton_kernels import check_ops, triton_kernels
from tests.kernels import test_reference
from tests.kernels.test_reference import CPU, DIM, LAYOUTS, Layout, Sequence, random_sequences

# Outputs are of the order of 1. The largest errors on CPU are 1e-6 in fp32, 7e-3 in bf16 and 2e-3 in fp16. A GPU adds
# in another order; TF32 must be off. In fp32, one key in a thousand too many or too few changes an output by 1e-3.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}
# Decodes, chunks and whole prompts, around the ends of blocks, tiles and splits of the reference backend.
SEQUENCES = [
    *(Sequence(start, 1) for start in (1200, 255, 256, 511, 30, 0)),
    *(Sequence(start, count) for start, count in ((1000, 70), (250, 10), (0, 300), (3, 14), (523, 21))),
]


class PagedBatch(test_reference.PagedBatch):
    """Uses the backend that a server would choose for the device."""

    def make_backend(self) -> AttentionBackend:
        return select_backend(self.device, [self.group.spec])


def test_triton_kernels_work(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("Triton's kernels are for GPUs")
    kernels = triton_kernels(device)
    assert kernels, "the log says why not"
    for dtype in TOLERANCES:
        check_ops(kernels.ops, device, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(14, 2, 64), (32, 8, 128), (8, 8, 80), (4, 1, 256)])
def test_sizes_of_heads(device: torch.device, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    layout = Layout(16, heads, kv_heads, 0, dtype, dim)
    sequences = [Sequence(700, 1), Sequence(3, 1), Sequence(60, 75)]
    tolerance = TOLERANCES[dtype] * (dim / DIM) ** 0.5  # the error of a score grows with the score
    PagedBatch(layout, sequences, 0, torch.nan, device).check(tolerance)


@pytest.mark.parametrize("window", [0, 1, 5, 16, 1000])
def test_random_batches(device: torch.device, window: int) -> None:
    for seed, layout in enumerate(layout for layout in LAYOUTS if layout.window == window):
        sequences = random_sequences(np.random.default_rng([seed, window]))
        PagedBatch(layout, sequences, seed, torch.nan, device).check(TOLERANCES[layout.dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("window", [0, 100, 256, 700])
def test_long_contexts(device: torch.device, window: int, dtype: torch.dtype) -> None:
    for block_size in (5, 16, 416):
        layout = Layout(block_size, 4, 2, window, dtype)
        PagedBatch(layout, SEQUENCES, 0, torch.nan, device).check(TOLERANCES[dtype])


@pytest.mark.parametrize("unused", [1e4, torch.inf, torch.nan], ids=str)
def test_contents_of_unused_slots_are_ignored(device: torch.device, unused: float) -> None:
    for window in (0, 5):
        PagedBatch(Layout(16, 6, 2, window), SEQUENCES, 1, unused, device).check(TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_cache_is_written_as_on_cpu(device: torch.device, dtype: torch.dtype) -> None:
    """Compares the memory of all layers, so a write beside the slots of this layer is an error too."""
    case, cpu_case = (PagedBatch(Layout(4, 6, 2, 0, dtype), SEQUENCES, 2, 7.0, d) for d in (device, CPU))
    before = cpu_case.memory.clone()
    case.run()
    cpu_case.run()
    assert not torch.equal(cpu_case.memory, before)
    assert torch.equal(case.memory.cpu()[1:], cpu_case.memory[1:])  # a backend may write to the null block
