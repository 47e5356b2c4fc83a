"""The Triton backend compared with the attention formula, in Triton's interpreter, as the reference backend is."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels of GPUs need Triton: make test-all installs it")

from rtp_llm.kernels import triton_attention, triton_ops
from rtp_llm.kernels.attention_backend import AttentionBackend
from rtp_llm.kernels.triton_attention import TritonBackend
from rtp_llm.kernels.triton_kernels import check_attention
from tests.kernels import test_reference
from tests.kernels.test_reference import CPU, LAYOUTS, Layout, Sequence, random_sequences

TIMEOUT_SECONDS = 300
# The interpreter multiplies the bits of bf16 as if they were integers. tests/gpu has all dtypes.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 5e-3}


class PagedBatch(test_reference.PagedBatch):
    def make_backend(self) -> AttentionBackend:
        return TritonBackend()


@pytest.mark.parametrize("window", [0, 1, 5, 16, 1000])
def test_random_batches(window: int) -> None:
    for seed, layout in enumerate(layout for layout in LAYOUTS if layout.window == window):
        sequences = random_sequences(np.random.default_rng([seed, window]))
        PagedBatch(layout, sequences, seed, torch.nan).check()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("window", [0, 100, 256, 700])
def test_contexts_of_several_splits(window: int, dtype: torch.dtype) -> None:
    sequences = [
        *(Sequence(start, 1) for start in (1200, 255, 256, 511, 30)),
        *(Sequence(start, count) for start, count in ((1000, 70), (250, 10), (0, 100), (3, 14), (523, 21))),
    ]
    PagedBatch(Layout(5, 4, 2, window, dtype), sequences, 0, torch.nan).check(TOLERANCES[dtype])


@pytest.mark.parametrize("dim", [24, 80, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (14, 2), (20, 1)])
def test_sizes_of_heads(dim: int, heads: int, kv_heads: int) -> None:
    sequences = [Sequence(300, 1), Sequence(7, 1), Sequence(60, 25)]
    PagedBatch(Layout(16, heads, kv_heads, 0, dim=dim), sequences, 0, torch.nan).check(1e-5)


def test_more_decodes_than_one_call_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtp_llm.kernels.triton_attention.MAX_DECODES", 3)
    PagedBatch(Layout(16, 4, 2, 0), [Sequence(start, 1) for start in (400, 3, 0, 60, 270, 9, 33)], 0, torch.nan).check()


def test_cache_is_written_as_by_the_reference_backend() -> None:
    """Compares the memory of all layers, so a write beside the slots of this layer is an error too."""
    cases = [
        kind(Layout(4, 6, 2, 0), [Sequence(20, 1), Sequence(3, 9)], 2, 7.0)
        for kind in (PagedBatch, test_reference.PagedBatch)
    ]
    for case in cases:
        case.run()
    ours, reference = (case.memory.view(torch.float32)[1:] for case in cases)  # which zeroes the null block
    assert torch.equal(ours, reference)


def test_check_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    check_attention(TritonBackend(), CPU, torch.float32)
    monkeypatch.setattr("rtp_llm.kernels.triton_attention.LOG2_E", 1.4)
    with pytest.raises(AssertionError, match="not close"):
        check_attention(TritonBackend(), CPU, torch.float32)


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """Not in the interpreter, and so in a process of its own. The last number is the shared memory of an RTX 3090."""
    program = [sys.executable, "-W", "ignore", "-m", "tests.kernels.compile_triton"]
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    completed = subprocess.run(program, env=env, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert completed.returncode == 0, completed.stderr
    rows = [line.split() for line in completed.stdout.splitlines()]
    kernels = [name for module in (triton_attention, triton_ops) for name in vars(module) if name.endswith("_kernel")]
    assert {tuple(row[:3]) for row in rows} == set(product(kernels, ("80", "90"), ("fp32", "bf16", "fp16")))
    assert max(int(shared) for *_, shared in rows) <= 101_376
