"""The attention kernels compared with the formula in float64 of tests/kernels/test_reference.py, at every level."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rtp_llm.contract.kv_cache import KVCacheSpec
from rtp_llm.kernels.attention_backend import AttentionParams
from rtp_llm.kernels.native_attention import NativeBackend
from rtp_llm.native.library import Library
from tests.kernels.test_reference import SCALE, Layout, PagedBatch, Sequence
from tests.quick import slow_except

# Outputs are of the order of 1, and the largest errors seen in bf16 and fp16 are half the last bit of an output.
TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
OPTIONS: Any = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
DTYPES = st.sampled_from(list(TOLERANCES))
# Around the ends of splits, panels of keys, blocks and tiles of queries.
STARTS = st.one_of(st.integers(0, 70), st.integers(250, 260), st.integers(505, 520), st.integers(0, 1500))
SEQUENCES = st.builds(Sequence, STARTS, st.one_of(st.just(1), st.integers(1, 60)))
LAYOUTS = st.builds(
    lambda heads, **sizes: Layout(heads=heads[0], kv_heads=heads[1], **sizes),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (7, 1), (14, 2), (16, 1), (25, 1)]),
    block_size=st.sampled_from([1, 5, 8, 16, 64, 416]),
    window=st.sampled_from([0, 0, 1, 5, 100, 256, 700]),
    dtype=DTYPES,
    dim=st.sampled_from([8, 32, 64, 80, 100, 128, 256]),
)


class NativeBatch(PagedBatch):
    """A step that the kernels of the selected level compute."""

    def make_backend(self) -> NativeBackend:
        return NativeBackend()


@given(layout=LAYOUTS, sequences=st.lists(SEQUENCES, min_size=1, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=60, **OPTIONS)
def test_random_batches(level: Library, layout: Layout, sequences: list[Sequence], seed: int) -> None:
    NativeBatch(layout, sequences, seed, unused=torch.nan).check(TOLERANCES[layout.dtype])


@pytest.mark.parametrize("dtype", slow_except(TOLERANCES, torch.bfloat16), ids=str)
@pytest.mark.parametrize("threads", slow_except([1, 2], 2))
def test_long_contexts(level: Library, dtype: torch.dtype, threads: int) -> None:
    """A decode, and a chunk of a few tokens, whose splits are divided among the threads."""
    torch.set_num_threads(threads)
    for window in (0, 3000):
        layout = Layout(16, 4, 2, window, dtype, dim=64)
        for sequences in ([Sequence(40_000, 1)], [Sequence(20_000, 3)]):
            NativeBatch(layout, sequences, 0, unused=torch.nan).check(TOLERANCES[dtype])


@given(
    heads=st.sampled_from([(7, 1), (2, 2), (16, 2)]),
    window=st.sampled_from([0, 5, 300]),
    dtype=DTYPES,
    dim=st.sampled_from([32, 64, 80, 128]),
    boundaries=st.sets(st.one_of(st.integers(1, 529), st.integers(250, 260)), max_size=8),
    block_size=st.sampled_from([8, 16, 64]),
    others=st.lists(SEQUENCES, max_size=4),
    threads=st.integers(1, 2),
)
@settings(max_examples=25, **OPTIONS)
def test_same_bits_in_any_chunk_and_company(
    level: Library,
    heads: tuple[int, int],
    window: int,
    dtype: torch.dtype,
    dim: int,
    boundaries: set[int],
    block_size: int,
    others: list[Sequence],
    threads: int,
) -> None:
    """Compares a prompt in one step with the same in chunks and decodes, beside others, in other blocks."""
    length = 530
    torch.set_num_threads(1)
    whole = NativeBatch(Layout(16, *heads, window, dtype, dim), [Sequence(0, length)], 0)
    expected = whole.run()[0]
    torch.set_num_threads(threads)
    layout = Layout(block_size, *heads, window, dtype, dim)
    decodes = {end - 1 for end in boundaries} - {0}
    cuts = [0, *sorted(boundaries | decodes), length]
    for start, end in pairwise(cuts):
        case = NativeBatch(layout, [Sequence(start, end - start), *others], start + 1, unused=torch.nan)
        index = case.adopt(whole, start)
        assert torch.equal(case.run()[index], expected[start:end])


@pytest.mark.parametrize(
    "sequences",
    [[Sequence(3000, 1), Sequence(70, 1)], [Sequence(3000, 5)], [Sequence(3000, 40), Sequence(0, 60)]],
    ids=str,
)
@pytest.mark.parametrize("partial_bytes", [0, 1 << 14, 1 << 20])
def test_same_bits_however_the_splits_are_divided(
    level: Library, sequences: list[Sequence], partial_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = NativeBatch(Layout(16, 4, 2, 0, torch.float32, 64), sequences, 0).run()
    monkeypatch.setattr("rtp_llm.kernels.native_attention.PARTIAL_BYTES", partial_bytes)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outputs = NativeBatch(Layout(16, 4, 2, 0, torch.float32, 64), sequences, 0).run()
        assert all(torch.equal(out, other) for out, other in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("window", [0, 100])
def test_nan_reaches_only_rows_that_see_it(
    level: Library, dtype: torch.dtype, value: float, name: str, window: int
) -> None:
    """Of the same chunk too: rows before the token are those of a chunk without it, bit for bit."""
    layout, bad = Layout(16, 4, 2, window, dtype, 64), 311

    def run(poisoned: bool) -> Tensor:
        case = NativeBatch(layout, [Sequence(200, 300)], 0)
        if poisoned:
            getattr(case, name)[0][bad] = value
        return case.run()[0]

    clean, out = run(False), run(True)
    sees = torch.zeros(300, dtype=torch.bool)
    sees[bad - 200 : bad - 200 + window if window else None] = True
    assert torch.equal(out[~sees], clean[~sees])
    if value != value:
        assert out[sees].isnan().all()
    else:
        assert not torch.equal(out[sees], clean[sees])


def test_extreme_scores(level: Library) -> None:
    """The weights of keys vanish beside the highest, and equal scores share."""
    case = NativeBatch(Layout(16, 2, 2, 0, torch.float32, 32), [Sequence(600, 1)], 0)
    case.queries[0] *= 100
    case.check(1e-4)
    case.queries[0].zero_()
    case.check()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_cache_is_written_as_by_torch(level: Library, dtype: torch.dtype) -> None:
    """Compares the memory of all layers, so a write beside the slots of this layer is an error too."""
    sequences = [Sequence(5, 1), Sequence(17, 1), Sequence(2, 70), Sequence(0, 4)]
    layout = Layout(4, 6, 2, 0, dtype, 40)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        case, expected = NativeBatch(layout, sequences, 1, unused=7.0), PagedBatch(layout, sequences, 1, unused=7.0)
        case.run()
        expected.run()
        case.cache["keys"][0] = case.cache["values"][0] = 0  # as the reference keeps the null block
        assert torch.equal(case.memory, expected.memory)


def test_strided_queries(level: Library) -> None:
    """q, k and v are views of the output of one linear layer."""
    layout = Layout(16, 6, 2, 0, torch.bfloat16, 64)
    case = NativeBatch(layout, [Sequence(40, 1), Sequence(3, 30)], 0)
    other = NativeBatch(layout, [Sequence(40, 1), Sequence(3, 30)], 0)
    q = torch.cat(case.queries)
    k, v = (torch.cat([t[s.start :] for s, t in zip(case.sequences, x, strict=True)]) for x in (case.keys, case.values))
    qkv = torch.cat([q, k, v], 1)
    backend = NativeBackend()
    metadata = backend.prepare(case.batch(), 0, case.group.spec, layout.block_size)
    q, k, v = qkv.split([6, 2, 2], 1)
    out = backend.forward(AttentionParams(SCALE), q, k, v, case.cache, metadata)
    assert torch.equal(out, torch.cat(other.run()))
    assert torch.equal(case.memory, other.memory)


def test_supported_caches() -> None:
    def spec(head_dim: int, *names: str) -> KVCacheSpec:
        return KVCacheSpec(tensors=tuple((name, (2, head_dim)) for name in names), dtype="bf16")

    assert NativeBackend.is_supported(spec(256, "keys", "values"))
    assert not NativeBackend.is_supported(spec(264, "keys", "values"))
    assert not NativeBackend.is_supported(spec(64, "latent"))


def test_workspace_is_bounded(level: Library) -> None:
    spec = NativeBatch(Layout(16, 14, 2, 0, torch.bfloat16, 64), [Sequence(0, 1)], 0).group.spec
    assert NativeBackend().workspace_bytes(spec, 14, 512, 131_072) < 32 << 20


def test_exponential_is_accurate(level: Library) -> None:
    """With one key beside a key of score 0, the output of [1, 0] is a logistic function of the score."""
    layout = Layout(16, 1, 1, 0, torch.float32, 32)
    case = NativeBatch(layout, [Sequence(1, 1)], 0)
    largest = 0.0
    for score in np.linspace(-80, 80, 200):
        case.keys[0].zero_()
        case.values[0].zero_()
        case.queries[0].zero_()
        case.keys[0][0, 0, 0], case.queries[0][0, 0, 0], case.values[0][0] = 1.0, float(score) / SCALE, 1.0
        case._fill(0)
        exact = case.expected(0)
        largest = max(largest, float(((case.run()[0] - exact) / exact).abs().max()))
    assert largest <= 1e-5
