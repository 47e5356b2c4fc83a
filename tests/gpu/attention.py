"""Compares the attention backend of this device with the formula in float64 that tests/kernels/test_reference.py uses.

All caches are strided: between two blocks of a layer are those of the other layers.
"""

import numpy as np
import pytest
import torch

from tests.kernels.test_reference import CPU, LAYOUTS, Layout, PagedBatch, Sequence, random_sequences

# Outputs are of the order of 1. The largest errors on CPU are 1e-6 in fp32, 7e-3 in bf16 and 2e-3 in fp16. A GPU adds
# in another order; TF32 must be off. In fp32, one key in a thousand too many or too few changes an output by 1e-3.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}
# Decodes, chunks and whole prompts, around the ends of blocks, tiles and splits of the reference backend.
SEQUENCES = [
    *(Sequence(start, 1) for start in (1200, 255, 256, 511, 30, 0)),
    *(Sequence(start, count) for start, count in ((1000, 70), (250, 10), (0, 300), (3, 14), (523, 21))),
]


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
    assert torch.equal(case.memory.cpu(), cpu_case.memory)
