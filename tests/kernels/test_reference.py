"""The reference attention backend compared with the attention formula: one sequence, head and query at a time, in
float64.

Other backends are tested against the reference backend.
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
SCALE = 0.4  # not DIM ** -0.5, so that a backend that ignores the argument fails


@dataclass(frozen=True)
class Sequence:
    """A sequence with `start` tokens in the cache and `num_tokens` new ones."""

    start: int
    num_tokens: int

    @property
    def seq_len(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True)
class Layout:
    """Sizes of an attention layer and its cache."""

    block_size: int
    heads: int
    kv_heads: int
    window: int
    dtype: torch.dtype = torch.float32


class PagedBatch:
    """Sequences with random contents in randomly ordered blocks, and the step that computes their new tokens.

    `unused`: value of all slots that hold no token.
    """

    def __init__(self, layout: Layout, sequences: list[Sequence], seed: int, unused: float = 0.0):
        self.layout, self.sequences = layout, sorted(sequences, key=lambda s: s.num_tokens != 1)
        self.random = np.random.default_rng(seed)
        self.block_tables = self._make_block_tables()
        num_blocks = sum(map(len, self.block_tables)) + 2
        shape = (num_blocks, layout.block_size, layout.kv_heads, DIM)
        self.cache = LayerKVCache(*(torch.full(shape, unused, dtype=layout.dtype) for _ in range(2)))
        seq_lens = [s.seq_len for s in self.sequences]
        self.queries = [self._noise(s.num_tokens, layout.heads) for s in self.sequences]
        self.keys, self.values = ([self._noise(n, layout.kv_heads) for n in seq_lens] for _ in range(2))
        for index, sequence in enumerate(self.sequences):
            for position in range(sequence.start):
                block, offset = self.slot(index, position)
                self.cache.keys[block, offset] = self.keys[index][position]
                self.cache.values[block, offset] = self.values[index][position]

    def _noise(self, num_tokens: int, heads: int) -> Tensor:
        return torch.from_numpy(self.random.standard_normal((num_tokens, heads, DIM))).to(self.layout.dtype)

    def _make_block_tables(self) -> list[list[int]]:
        counts = [-(-s.seq_len // self.layout.block_size) for s in self.sequences]
        # Two blocks are unused. Block 0, which pads all block tables, belongs to the first sequence.
        order = [*self.random.permutation(range(1, sum(counts) + 2)).tolist(), 0]
        return [[order.pop() for _ in range(count)] for count in counts]

    def slot(self, index: int, position: int) -> tuple[int, int]:
        """Returns (block, offset) of a position of sequence `index`."""
        return self.block_tables[index][position // self.layout.block_size], position % self.layout.block_size

    def batch(self) -> ForwardBatch:
        def ints(values: object) -> NDArray[np.int32]:
            return np.array(values, dtype=np.int32)

        block_size = self.layout.block_size
        tokens = [(i, position) for i, s in enumerate(self.sequences) for position in range(s.start, s.seq_len)]
        slots = [block * block_size + offset for block, offset in (self.slot(*token) for token in tokens)]
        width = max(map(len, self.block_tables))
        step = Step(
            epoch=1,
            number=1,
            num_decodes=sum(1 for s in self.sequences if s.num_tokens == 1),
            token_ids=ints([0] * len(tokens)),
            positions=ints([position for _, position in tokens]),
            slot_mapping=ints(slots),
            query_start_loc=ints(np.cumsum([0, *(s.num_tokens for s in self.sequences)])),
            seq_lens=ints([s.seq_len for s in self.sequences]),
            prompt_lens=ints([s.seq_len for s in self.sequences]),
            block_tables=ints([table + [0] * (width - len(table)) for table in self.block_tables]),
            logits_indices=ints([]),
        )
        return ForwardBatch.from_step(step, torch.device("cpu"))

    def run(self) -> list[Tensor]:
        """Returns the backend's output by sequence, [num_tokens, heads, DIM] each."""
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
        return list(out.split([s.num_tokens for s in self.sequences]))

    def expected(self, index: int) -> Tensor:
        """Returns [num_tokens, heads, DIM] float64: softmax(SCALE q k) v over the keys that each query attends to."""
        sequence, layout = self.sequences[index], self.layout
        out = torch.empty(sequence.num_tokens, layout.heads, DIM, dtype=torch.float64)
        for row, head in product(range(sequence.num_tokens), range(layout.heads)):
            position = sequence.start + row
            first = max(0, position + 1 - layout.window) if layout.window else 0
            kv_head = head // (layout.heads // layout.kv_heads)
            keys, values = (t[index][first : position + 1, kv_head].double() for t in (self.keys, self.values))
            out[row, head] = (SCALE * keys @ self.queries[index][row, head].double()).softmax(0) @ values
        return out

    def check(self, tolerance: float = 2e-6) -> None:
        for index, out in enumerate(self.run()):
            assert (out.double() - self.expected(index)).abs().max() <= tolerance, self.sequences[index]


def random_sequences(random: np.random.Generator) -> list[Sequence]:
    """Returns 1 to 6 sequences: decodes, whole prompts and chunks."""
    kinds = random.integers(0, 3, random.integers(1, 7))
    starts = random.integers(0, 40, len(kinds))
    lengths = random.integers(2, 20, len(kinds))
    return [
        Sequence(0 if kind == 1 else int(start), 1 if kind == 0 else int(length))
        for kind, start, length in zip(kinds, starts, lengths, strict=True)
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
        [Sequence(0, 1)],  # the first token: it attends to itself
        [Sequence(0, 16)],  # exactly one block
        [Sequence(0, 17)],
        [Sequence(15, 1), Sequence(16, 1), Sequence(17, 1)],  # around a block boundary
        [Sequence(15, 2), Sequence(16, 2), Sequence(1, 31)],
        [Sequence(100, 1), Sequence(0, 1)],  # decodes of very different lengths
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
    """The bytes of gathered keys and of scores stay below MAX_SCRATCH_BYTES, unless one sequence or query alone needs
    more, and the limit does not change the output."""
    monkeypatch.setattr(reference, "MAX_SCRATCH_BYTES", scratch)
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
    for blocks, old, contents in zip(
        (case.cache.keys, case.cache.values), before, (case.keys, case.values), strict=True
    ):
        for index, sequence in enumerate(case.sequences):
            for position in range(sequence.seq_len):
                block, offset = case.slot(index, position)
                assert torch.equal(blocks[block, offset], contents[index][position])
                old[block, offset] = blocks[block, offset]
        assert torch.equal(blocks, old)


@pytest.mark.parametrize("unused", [1e4, -1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("window", [0, 5])
def test_contents_of_unused_slots_are_ignored(unused: float, window: int) -> None:
    """Freed blocks keep their content; an overflow in another request may have left inf or NaN there."""
    sequences = [Sequence(0, 1), Sequence(41, 1), Sequence(16, 1), Sequence(5, 6), Sequence(0, 17)]
    PagedBatch(Layout(16, 6, 2, window), sequences, 2, unused).check()


@pytest.mark.parametrize("window", [0, 5])
def test_nan_in_one_sequence_does_not_affect_others(window: int) -> None:
    """Block tables are padded with block 0, which here belongs to the sequence with NaN."""
    case = PagedBatch(Layout(16, 6, 2, window), [Sequence(41, 1), Sequence(3, 1), Sequence(16, 1), Sequence(5, 6)], 3)
    assert case.block_tables[0][0] == 0
    for tensors in (case.keys, case.values):
        tensors[0].fill_(torch.nan)
    for block in case.block_tables[0]:
        case.cache.keys[block] = case.cache.values[block] = torch.nan
    outputs = case.run()
    assert outputs[0].isnan().all()
    for index in range(1, 4):
        assert (outputs[index].double() - case.expected(index)).abs().max() <= 2e-6
