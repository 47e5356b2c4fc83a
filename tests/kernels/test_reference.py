"""The torch backend against attention written out plainly: one sequence, one head, one query at a time, in float64.

Every other backend is tested against this one, so it is tested against nothing but the formula.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rtp_llm.contract.step import Step
from rtp_llm.kernels import reference
from rtp_llm.kernels.batch import ForwardBatch, LayerKVCache
from rtp_llm.kernels.reference import reference_attention

DIM = 8
SCALE = 0.4  # not dim ** -0.5: it must come from the caller


@dataclass(frozen=True)
class Sequence:
    """`count` new tokens behind `start` that are in the cache already."""

    start: int
    count: int

    @property
    def length(self) -> int:
        return self.start + self.count


@dataclass(frozen=True)
class Layout:
    """Sizes of a case."""

    block_size: int
    heads: int
    kv_heads: int
    window: int
    dtype: torch.dtype = torch.float32


class PagedBatch:
    """Sequences with random contents on blocks in random order, and the step that computes their new tokens."""

    def __init__(self, layout: Layout, sequences: list[Sequence], seed: int, unused: float = 0.0):
        self.layout, self.sequences = layout, sorted(sequences, key=lambda s: s.count != 1)
        self.random = np.random.default_rng(seed)
        self.tables = self._tables()
        num_blocks = sum(map(len, self.tables)) + 2
        shape = (num_blocks, layout.block_size, layout.kv_heads, DIM)
        self.cache = LayerKVCache(*(torch.full(shape, unused, dtype=layout.dtype) for _ in range(2)))
        lengths = [s.length for s in self.sequences]
        self.queries = [self._noise(s.count, layout.heads) for s in self.sequences]
        self.keys, self.values = ([self._noise(n, layout.kv_heads) for n in lengths] for _ in range(2))
        for index, sequence in enumerate(self.sequences):
            for place in range(sequence.start):
                block, offset = self.slot(index, place)
                self.cache.keys[block, offset] = self.keys[index][place]
                self.cache.values[block, offset] = self.values[index][place]

    def _noise(self, count: int, heads: int) -> Tensor:
        return torch.from_numpy(self.random.standard_normal((count, heads, DIM))).to(self.layout.dtype)

    def _tables(self) -> list[list[int]]:
        counts = [-(-s.length // self.layout.block_size) for s in self.sequences]
        # Two blocks belong to nobody; block 0, which pads all tables, is the first sequence's.
        order = [*self.random.permutation(range(1, sum(counts) + 2)).tolist(), 0]
        return [[order.pop() for _ in range(count)] for count in counts]

    def slot(self, index: int, place: int) -> tuple[int, int]:
        return self.tables[index][place // self.layout.block_size], place % self.layout.block_size

    def batch(self) -> ForwardBatch:
        def ints(values: object) -> NDArray[np.int32]:
            return np.array(values, dtype=np.int32)

        size = self.layout.block_size
        places = [(i, place) for i, s in enumerate(self.sequences) for place in range(s.start, s.length)]
        slots = [block * size + offset for block, offset in (self.slot(*place) for place in places)]
        width = max(map(len, self.tables))
        step = Step(
            epoch=1,
            number=1,
            num_decodes=sum(1 for s in self.sequences if s.count == 1),
            token_ids=ints([0] * len(places)),
            positions=ints([place for _, place in places]),
            slot_mapping=ints(slots),
            query_start_loc=ints(np.cumsum([0, *(s.count for s in self.sequences)])),
            seq_lens=ints([s.length for s in self.sequences]),
            prompt_lens=ints([s.length for s in self.sequences]),
            block_tables=ints([table + [0] * (width - len(table)) for table in self.tables]),
            logits_indices=ints([]),
        )
        return ForwardBatch.from_step(step, torch.device("cpu"))

    def run(self) -> list[Tensor]:
        """What the backend says, by sequence."""
        new_keys, new_values = (
            torch.cat([t[s.start :] for s, t in zip(self.sequences, tensors, strict=True)])
            for tensors in (self.keys, self.values)
        )
        out = reference_attention(
            torch.cat(self.queries),
            new_keys,
            new_values,
            self.cache,
            self.batch(),
            window=self.layout.window,
            scale=SCALE,
        )
        assert out.dtype == self.layout.dtype
        return list(out.split([s.count for s in self.sequences]))

    def expected(self, index: int) -> Tensor:
        """[count, heads, dim] in float64: softmax(scale q k) v over the keys that each query may see."""
        sequence, layout = self.sequences[index], self.layout
        out = torch.empty(sequence.count, layout.heads, DIM, dtype=torch.float64)
        for row, head in product(range(sequence.count), range(layout.heads)):
            own = sequence.start + row
            first = max(0, own + 1 - layout.window) if layout.window else 0
            kv_head = head // (layout.heads // layout.kv_heads)
            keys, values = (t[index][first : own + 1, kv_head].double() for t in (self.keys, self.values))
            out[row, head] = (SCALE * keys @ self.queries[index][row, head].double()).softmax(0) @ values
        return out

    def check(self, tolerance: float = 2e-6) -> None:
        for index, found in enumerate(self.run()):
            assert (found.double() - self.expected(index)).abs().max() <= tolerance, self.sequences[index]


def random_sequences(random: np.random.Generator) -> list[Sequence]:
    """Decodes, whole prompts and chunks of all kinds; at least one."""
    kinds = random.integers(0, 3, random.integers(1, 7))
    starts = random.integers(0, 40, len(kinds))
    counts = random.integers(2, 20, len(kinds))
    return [
        Sequence(0 if kind == 1 else int(start), 1 if kind == 0 else int(count))
        for kind, start, count in zip(kinds, starts, counts, strict=True)
    ]


LAYOUTS = [
    Layout(block_size, heads, kv_heads, window)
    for block_size, (heads, kv_heads), window in product(
        (1, 3, 16, 32), ((1, 1), (4, 4), (6, 2), (7, 1)), (0, 1, 5, 16, 1000)
    )
]


@pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda x: f"block{x.block_size}-heads{x.heads}/{x.kv_heads}-window{x.window}"
)
def test_random_batches(layout: Layout) -> None:
    for seed in range(3):
        sequences = random_sequences(np.random.default_rng([seed, layout.block_size, layout.heads, layout.window]))
        PagedBatch(layout, sequences, seed).check()


@pytest.mark.parametrize(
    "sequences",
    [
        [Sequence(0, 1)],  # the first token of all: it sees itself
        [Sequence(0, 16)],  # a block exactly
        [Sequence(0, 17)],
        [Sequence(15, 1), Sequence(16, 1), Sequence(17, 1)],  # around the end of a block
        [Sequence(15, 2), Sequence(16, 2), Sequence(1, 31)],
        [Sequence(100, 1), Sequence(0, 1)],  # very different lengths in one batch of decodes
        [Sequence(100, 1), Sequence(0, 1), Sequence(60, 5), Sequence(0, 40)],
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [0, 1, 16, 17])
def test_edges(sequences: list[Sequence], window: int) -> None:
    PagedBatch(Layout(16, 6, 2, window), sequences, 0).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    sequences = [Sequence(20, 1), Sequence(3, 1), Sequence(7, 9)]
    PagedBatch(Layout(16, 6, 2, 0, dtype), sequences, 0).check(tolerance=2e-2)


@pytest.mark.parametrize("scratch", [1, 3000, 9000])
@pytest.mark.parametrize("window", [0, 5])
def test_little_memory_at_a_time(scratch: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers; more is held than allowed only where a single sequence or query takes more."""
    monkeypatch.setattr(reference, "SCRATCH_BYTES", scratch)
    sizes = []

    def attention(query: Tensor, keys: Tensor, values: Tensor, **rest: Any) -> Tensor:
        scores = query[..., 0].numel() * keys.shape[-2] * 4
        sizes.append(keys.numel() * keys.itemsize if query.shape[0] > 1 else scores)
        single = query.shape[0] == 1 and query.shape[-2] in (1, 3)  # a decode's heads of one KV head, or one query
        assert sizes[-1] <= scratch or single
        return scaled_dot_product_attention(query, keys, values, **rest)

    monkeypatch.setattr(reference, "scaled_dot_product_attention", attention)
    sequences = [Sequence(20, 1), Sequence(3, 1), Sequence(41, 1), Sequence(0, 1), Sequence(7, 19), Sequence(0, 9)]
    PagedBatch(Layout(16, 6, 2, window), sequences, 0).check()
    assert len(sizes) > 3


def test_new_keys_and_values_are_written_and_nothing_else() -> None:
    case = PagedBatch(Layout(4, 6, 2, 0), [Sequence(5, 1), Sequence(2, 7), Sequence(0, 4)], 1, unused=7.0)
    before = [case.cache.keys.clone(), case.cache.values.clone()]
    case.run()
    for pages, old, contents in zip(
        (case.cache.keys, case.cache.values), before, (case.keys, case.values), strict=True
    ):
        for index, sequence in enumerate(case.sequences):
            for place in range(sequence.length):
                block, offset = case.slot(index, place)
                assert torch.equal(pages[block, offset], contents[index][place])
                old[block, offset] = pages[block, offset]
        assert torch.equal(pages, old)


@pytest.mark.parametrize("unused", [1e4, -1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("window", [0, 5])
def test_what_lies_in_unused_slots_does_not_matter(unused: float, window: int) -> None:
    """Freed blocks keep what they held, and a request whose numbers overflowed may have left NaN there."""
    sequences = [Sequence(0, 1), Sequence(41, 1), Sequence(16, 1), Sequence(5, 6), Sequence(0, 17)]
    PagedBatch(Layout(16, 6, 2, window), sequences, 2, unused).check()


@pytest.mark.parametrize("window", [0, 5])
def test_a_sequence_of_nan_stays_among_itself(window: int) -> None:
    """Its neighbours in the batch are served as if it were not there, though their tables are padded with its block."""
    case = PagedBatch(Layout(16, 6, 2, window), [Sequence(41, 1), Sequence(3, 1), Sequence(16, 1), Sequence(5, 6)], 3)
    assert case.tables[0][0] == 0
    for tensors in (case.keys, case.values):
        tensors[0].fill_(torch.nan)
    for block in case.tables[0]:
        case.cache.keys[block] = case.cache.values[block] = torch.nan
    found = case.run()
    assert found[0].isnan().all()
    for index in range(1, 4):
        assert (found[index].double() - case.expected(index)).abs().max() <= 2e-6
