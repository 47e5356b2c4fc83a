"""The reference backend compared with the attention formula: one sequence, head and query at a time, in float64.

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

from rtp_llm.contract.kv_cache import KVCacheSpec, make_layout
from rtp_llm.kernels import reference
from rtp_llm.kernels.attention_backend import AttentionBackend, AttentionParams
from rtp_llm.kernels.batch import ForwardBatch
from rtp_llm.kernels.kv_cache import carve
from rtp_llm.kernels.reference import ReferenceBackend

CPU = torch.device("cpu")
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
    dim: int = DIM


class PagedBatch:
    """Sequences with random contents in randomly ordered blocks, and the step that computes their new tokens.

    `unused`: value of all slots that hold no token. `device`: of the cache and the backend; all else is on CPU.
    """

    def __init__(
        self, layout: Layout, sequences: list[Sequence], seed: int, unused: float = 0.0, device: torch.device = CPU
    ):
        self.layout, self.first, self.device = layout, sequences[0], device
        self.sequences = sorted(sequences, key=lambda s: s.num_tokens != 1)
        self.random = np.random.default_rng(seed)
        self.block_tables = self._make_block_tables()
        num_blocks = sum(map(len, self.block_tables)) + 3
        spec = KVCacheSpec(
            tensors=(("keys", (layout.kv_heads, layout.dim)), ("values", (layout.kv_heads, layout.dim))),
            dtype={torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[layout.dtype],
            window=layout.window,
        )
        cache_layout = make_layout([spec] * 3, layout.block_size)
        self.group = cache_layout.groups[0]
        self.memory = torch.zeros(num_blocks, cache_layout.block_bytes, dtype=torch.uint8, device=device)
        self.memory.view(layout.dtype).fill_(unused)
        self.cache = carve(self.memory, cache_layout)[
            1
        ]  # blocks are not adjacent: between them is the cache of two layers
        seq_lens = [s.seq_len for s in self.sequences]
        self.queries = [self._noise(s.num_tokens, layout.heads) for s in self.sequences]
        self.keys, self.values = ([self._noise(n, layout.kv_heads) for n in seq_lens] for _ in range(2))
        for index in range(len(self.sequences)):
            self._fill(index)

    def _noise(self, num_tokens: int, heads: int) -> Tensor:
        return torch.from_numpy(self.random.standard_normal((num_tokens, heads, self.layout.dim))).to(self.layout.dtype)

    def _make_block_tables(self) -> list[list[int]]:
        counts = [-(-s.seq_len // self.layout.block_size) for s in self.sequences]
        order = self.random.permutation(range(1, sum(counts) + 3)).tolist()  # two are unused, and the null block
        return [[order.pop() for _ in range(count)] for count in counts]

    def slot(self, index: int, position: int) -> tuple[int, int]:
        """Returns (block, offset) of a position of sequence `index`."""
        return self.block_tables[index][position // self.layout.block_size], position % self.layout.block_size

    def adopt(self, other: "PagedBatch", start: int) -> int:
        """Gives the first added sequence the contents of the only sequence of `other`. Returns its index."""
        index = next(i for i, s in enumerate(self.sequences) if s == self.first)
        self.queries[index] = other.queries[0][start : self.first.seq_len]
        self.keys[index], self.values[index] = other.keys[0], other.values[0]
        self._fill(index)
        return index

    def _fill(self, index: int) -> None:
        """Writes the keys and values of the tokens before the step."""
        positions = torch.arange(self.sequences[index].start)
        blocks = torch.tensor(self.block_tables[index])[positions // self.layout.block_size]
        for name, contents in (("keys", self.keys), ("values", self.values)):
            values = contents[index][positions].to(self.device)
            self.cache[name][blocks, positions % self.layout.block_size] = values

    def batch(self) -> ForwardBatch:
        def ints(values: object) -> NDArray[np.int32]:
            return np.array(values, dtype=np.int32)

        width = max(map(len, self.block_tables))
        seq_lens = ints([s.seq_len for s in self.sequences])
        query_start_loc = ints(np.cumsum([0, *(s.num_tokens for s in self.sequences)]))
        batch = ForwardBatch.build(
            token_ids=ints([0] * query_start_loc[-1]),
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            prompt_lens=seq_lens,
            block_tables=[ints([table + [0] * (width - len(table)) for table in self.block_tables])],
            block_sizes=[self.layout.block_size],
            device=self.device,
        )
        assert batch.num_decodes == sum(1 for s in self.sequences if s.num_tokens == 1)
        return batch

    def make_backend(self) -> AttentionBackend:
        """Returns the backend to test."""
        return ReferenceBackend(self.device)

    def run(self) -> list[Tensor]:
        """Returns the backend's output by sequence, [num_tokens, heads, dim] each."""
        new_keys, new_values = (
            torch.cat([t[s.start : s.seq_len] for s, t in zip(self.sequences, tensors, strict=True)])
            for tensors in (self.keys, self.values)
        )
        backend = self.make_backend()
        metadata = backend.prepare(self.batch(), 0, self.group.spec, self.group.block_size)
        q, k, v = (tensor.to(self.device) for tensor in (torch.cat(self.queries), new_keys, new_values))
        out = backend.forward(AttentionParams(SCALE), q, k, v, self.cache, metadata)
        assert out.dtype == self.layout.dtype
        return list(out.cpu().split([s.num_tokens for s in self.sequences]))

    def expected(self, index: int) -> Tensor:
        """Returns [num_tokens, heads, dim] float64: softmax(SCALE q k) v over the keys that each query attends to."""
        sequence, layout = self.sequences[index], self.layout
        out = torch.empty(sequence.num_tokens, layout.heads, layout.dim, dtype=torch.float64)
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


@pytest.mark.parametrize("window", [0, 100, 256, 300, 700])
@pytest.mark.parametrize("block_size", [1, 5, 16, 416])
def test_contexts_of_several_splits(block_size: int, window: int) -> None:
    sequences = [
        *(Sequence(start, 1) for start in (1200, 255, 256, 511, 30)),
        *(Sequence(start, count) for start, count in ((1000, 70), (250, 10), (0, 300), (3, 14), (523, 21))),
    ]
    PagedBatch(Layout(block_size, 4, 2, window), sequences, 0, unused=torch.nan).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [0, 5, 300])
@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 1), (2, 2)])
def test_same_bits_in_any_chunk_and_company(dtype: torch.dtype, window: int, heads: int, kv_heads: int) -> None:
    """Compares each token computed alone with the same token in a prompt, in chunks, and beside other sequences."""
    length = 530
    layout = Layout(16, heads, kv_heads, window, dtype)
    whole = PagedBatch(layout, [Sequence(0, length)], 0)
    expected = whole.run()[0]
    for boundaries in ([300], [7, 8, 30, 256, 257, 511, 512]):
        for start, end in zip([0, *boundaries], [*boundaries, length], strict=True):
            others = [Sequence(3, 1), Sequence(start, 1), Sequence(700, 1), Sequence(40, 33), Sequence(0, 3)]
            for company in ([], others[: 1 + start % 5]):
                case = PagedBatch(layout, [Sequence(start, end - start), *company], start + 1, unused=torch.nan)
                index = case.adopt(whole, start)
                assert torch.equal(case.run()[index], expected[start:end])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    sequences = [Sequence(20, 1), Sequence(3, 1), Sequence(7, 9)]
    PagedBatch(Layout(16, 6, 2, 0, dtype), sequences, 0).check(tolerance=2e-2)


@pytest.mark.parametrize("scratch", [1, 1500, 3000])
@pytest.mark.parametrize("window", [0, 5])
def test_little_memory_at_a_time(scratch: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits the bytes of gathered keys, except of one split of one tile, without changing the output."""
    monkeypatch.setattr(reference, "MAX_SCRATCH_BYTES", scratch)
    monkeypatch.setattr(reference, "SPLIT", 16)
    attend, sizes = reference._attend, []

    def recording_attend(q: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        sizes.append(keys.numel() * keys.itemsize)
        assert sizes[-1] <= scratch or len(keys) == 1
        return attend(q, keys, *rest)

    monkeypatch.setattr(reference, "_attend", recording_attend)
    sequences = [Sequence(20, 1), Sequence(3, 1), Sequence(41, 1), Sequence(0, 1), Sequence(7, 19), Sequence(0, 9)]
    PagedBatch(Layout(16, 6, 2, window), sequences, 0).check()
    assert len(sizes) > 3


def test_new_keys_and_values_are_written_and_nothing_else() -> None:
    case = PagedBatch(Layout(4, 6, 2, 0), [Sequence(5, 1), Sequence(2, 7), Sequence(0, 4)], 1, unused=7.0)
    before = [case.cache["keys"].clone(), case.cache["values"].clone()]
    case.run()
    for blocks, old, contents in zip(
        (case.cache["keys"], case.cache["values"]), before, (case.keys, case.values), strict=True
    ):
        for index, sequence in enumerate(case.sequences):
            for position in range(sequence.seq_len):
                block, offset = case.slot(index, position)
                assert torch.equal(blocks[block, offset], contents[index][position])
                old[block, offset] = blocks[block, offset]
        old[0] = 0  # the null block, which holds no token and is kept zero
        assert torch.equal(blocks, old)


@pytest.mark.parametrize("unused", [1e4, -1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("window", [0, 5])
def test_contents_of_unused_slots_are_ignored(unused: float, window: int) -> None:
    """Freed blocks keep their content; an overflow in another request may have left inf or NaN there."""
    sequences = [Sequence(0, 1), Sequence(41, 1), Sequence(16, 1), Sequence(5, 6), Sequence(0, 17)]
    PagedBatch(Layout(16, 6, 2, window), sequences, 2, unused).check()


@pytest.mark.parametrize("window", [0, 5])
def test_nan_in_one_sequence_does_not_affect_others(window: int) -> None:
    """Block tables are padded with the null block, whose content is NaN too."""
    case = PagedBatch(Layout(16, 6, 2, window), [Sequence(41, 1), Sequence(3, 1), Sequence(16, 1), Sequence(5, 6)], 3)
    for tensors in (case.keys, case.values):
        tensors[0].fill_(torch.nan)
    for block in (0, *case.block_tables[0]):
        case.cache["keys"][block] = case.cache["values"][block] = torch.nan
    outputs = case.run()
    assert outputs[0].isnan().all()
    for index in range(1, 4):
        assert (outputs[index].double() - case.expected(index)).abs().max() <= 2e-6
