"""Paged attention on GPUs, in Triton.

Decodes are computed as in flash decoding (Dao et al. 2023): their keys are cut into splits, each the work of a program,
whose partial outputs a second kernel combines in order of position. A tile of a chunk's queries reads all its keys in
one program, as in FlashAttention-2 (Dao 2023, arXiv 2307.08691).

The kernels read lengths and block tables on the device. The host only chooses the number of programs, for lengths that
may be too large. So a CUDA graph of decodes can be replayed for others.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from rtp_llm.contract.kv_cache import KVCacheSpec
from rtp_llm.kernels.attention_backend import AttentionParams, has_keys_and_values, with_adjacent_heads
from rtp_llm.kernels.batch import ForwardBatch, to_tensor
from rtp_llm.kernels.kv_cache import DTYPES, LayerKVCache

MAX_HEAD_DIM = 256
MIN_DOT = 16  # smallest side of an operand of `tl.dot`
MAX_TILE = 64  # keys that a program reads at a time; queries of a chunk, times the query heads of a KV head
# Numbers of a tile, by bytes per number. Three tiles of keys and of values fit into the 99 KiB of shared memory that
# small GPUs have. Those of fp32 are smaller, since its products need more registers.
TILE_NUMBERS = {2: 8192, 4: 2048}
MIN_SPLIT = 256  # keys
MAX_SPLITS = 32  # of a sequence
UNSPLIT = 1 << 30  # keys
MAX_DECODES = 256  # computed at a time, so that the memory of their partial outputs is bounded
MASKED = tl.constexpr(-1e30)  # finite: a query that sees no key of a tile gets the weight exp2(MASKED) = 0, not NaN
LOG2_E = tl.constexpr(1.4426950408889634)

# Triton compiles a kernel again for a number that is 1 or a multiple of 16, or for a tensor that is aligned otherwise,
# unless told that it does not matter. These change from step to step.
INDICES = ("slots", "tile_sequences", "tile_starts", "query_start_loc", "seq_lens", "block_tables")
NUMBERS = ("table_stride", "split_size", "max_splits", "window")


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def _write_kv_kernel(
    k,
    v,
    keys,
    values,
    slots,
    k_stride,
    v_stride,
    block_stride,
    block_size,
    SIZE: tl.constexpr,
    SIZE_POW2: tl.constexpr,
):
    """Writes key and value of a token, SIZE = kv_heads * head_dim numbers each, to its slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    target = slot // block_size * block_stride + slot % block_size * SIZE
    numbers = tl.arange(0, SIZE_POW2)
    exists = numbers < SIZE
    tl.store(keys + target + numbers, tl.load(k + token * k_stride + numbers, mask=exists), mask=exists)
    tl.store(values + target + numbers, tl.load(v + token * v_stride + numbers, mask=exists), mask=exists)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def _attend_kernel(
    q,
    keys,
    values,
    out,
    lse,
    tile_sequences,
    tile_starts,
    query_start_loc,
    seq_lens,
    block_tables,
    q_stride,
    block_stride,
    table_stride,
    scale,
    split_size,
    window,
    block_size,
    HAS_WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM_POW2: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """Computes the attention of a tile: up to TILE queries of a sequence, for the GROUP query heads of a KV head.

    Programs: [tiles, kv_heads, splits]. Row r of the scores is query r // GROUP and head r % GROUP. With IS_SPLIT, a
    program sees the keys of a split, and `out` and `lse` (log2 of the sum of exponentials) are partial results in
    float32, [tiles, kv_heads, splits, GROUP (, HEAD_DIM)]; TILE is 1. Otherwise out is [T, heads, HEAD_DIM].
    """
    tile, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    sequence = tl.load(tile_sequences + tile)
    first_query = tl.load(tile_starts + tile)
    first_token = tl.load(query_start_loc + sequence)
    num_queries = tl.load(query_start_loc + sequence + 1) - first_token
    first_position = tl.load(seq_lens + sequence) - num_queries  # of the sequence's queries

    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM_POW2)
    queries = first_query + rows // GROUP
    is_query = (rows < TILE * GROUP) & (queries < num_queries)
    positions = first_position + queries
    query_offsets = (first_token + queries)[:, None] * q_stride + (head * GROUP + rows % GROUP)[:, None] * HEAD_DIM
    row_mask = is_query[:, None] & (dims < HEAD_DIM)[None, :]
    q_tile = tl.load(q + query_offsets + dims[None, :], mask=row_mask, other=0.0)

    begin = split * split_size
    if HAS_WINDOW:
        begin = tl.maximum(begin, first_position + first_query - window + 1)
    end = tl.minimum(first_position + tl.minimum(first_query + TILE, num_queries), (split + 1) * split_size)
    top = tl.full([ROWS], MASKED, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM_POW2], tl.float32)
    if begin < end:
        for first_key in range(begin // KEYS * KEYS, end, KEYS):
            key_positions = first_key + tl.arange(0, KEYS)
            exists = (key_positions >= begin) & (key_positions < end)
            blocks = tl.load(block_tables + sequence * table_stride + key_positions // block_size, mask=exists, other=0)
            places = blocks * block_stride + key_positions % block_size * (tl.num_programs(1) * HEAD_DIM)
            places = places[:, None] + head * HEAD_DIM + dims[None, :]
            key_mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
            k_tile = tl.load(keys + places, mask=key_mask, other=0.0)
            v_tile = tl.load(values + places, mask=key_mask, other=0.0)

            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * (scale * LOG2_E)
            is_visible = exists[None, :] & (key_positions[None, :] <= positions[:, None])
            if HAS_WINDOW:
                is_visible = is_visible & (key_positions[None, :] > positions[:, None] - window)
            scores = tl.where(is_visible, scores, MASKED)
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(weights, 1)
            sums = sums * shrink[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
            top = new_top
        if IS_SPLIT:
            row = ((tile * tl.num_programs(1) + head) * tl.num_programs(2) + split) * GROUP + rows
            tl.store(out + row[:, None] * HEAD_DIM + dims[None, :], sums / total[:, None], mask=row_mask)
            tl.store(lse + row, top + tl.log2(total), mask=is_query)
        else:
            out_offsets = (first_token + queries)[:, None] * (tl.num_programs(1) * GROUP * HEAD_DIM)
            out_offsets += (head * GROUP + rows % GROUP)[:, None] * HEAD_DIM + dims[None, :]
            tl.store(out + out_offsets, (sums / total[:, None]).to(out.dtype.element_ty), mask=row_mask)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=INDICES)
def _combine_kernel(
    partials,
    lse,
    out,
    tile_sequences,
    seq_lens,
    split_size,
    max_splits,
    window,
    HAS_WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_POW2: tl.constexpr,
):
    """Combines the partial outputs of a decode and head, which `_attend_kernel` wrote. Programs: [decodes, heads].

    out: [T, heads, HEAD_DIM]; decodes are the first tokens.
    """
    tile, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    sequence = tl.load(tile_sequences + tile)
    seq_len = tl.load(seq_lens + sequence)
    dims = tl.arange(0, DIM_POW2)
    exists = dims < HEAD_DIM
    num_kv_heads = tl.num_programs(1) // GROUP
    top = tl.full([1], MASKED, tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([DIM_POW2], tl.float32)
    first_split = tl.maximum(seq_len - window, 0) // split_size if HAS_WINDOW else 0
    for split in range(first_split, tl.cdiv(seq_len, split_size)):
        row = ((tile * num_kv_heads + head // GROUP) * max_splits + split) * GROUP + head % GROUP
        value = tl.load(lse + row)
        new_top = tl.maximum(top, value)
        weight, shrink = tl.exp2(value - new_top), tl.exp2(top - new_top)
        total = total * shrink + weight
        sums = sums * shrink + weight * tl.load(partials + row * HEAD_DIM + dims, mask=exists, other=0.0)
        top = new_top
    row = sequence * tl.num_programs(1) + head
    tl.store(out + row * HEAD_DIM + dims, (sums / total).to(out.dtype.element_ty), mask=exists)


@dataclass(frozen=True)
class Tiles:
    """Tiles of queries that one call computes. sequences, starts: [tiles] int64, the sequence of each, and its first
    query among the sequence's new tokens. size: most queries of a tile. num_splits: most splits of a sequence's keys.
    """

    sequences: Tensor
    starts: Tensor
    size: int
    split_size: int = UNSPLIT
    num_splits: int = 1


@dataclass(frozen=True)
class TritonMetadata:
    """What the layers of a KV cache group need in a step: the batch, its block table and slots, the tiles of decodes.

    The tiles of chunks depend on the number of query heads, so the first layer makes them.
    """

    batch: ForwardBatch
    block_table: Tensor
    slots: Tensor
    window: int
    block_size: int
    decodes: list[Tiles]
    _chunks: dict[int, Tiles] = field(default_factory=dict)  # by size

    def chunks(self, size: int) -> list[Tiles]:
        """Returns the tiles of `size` queries of all sequences but the decodes; none if all are decodes."""
        num_decodes, counts = self.batch.num_decodes, np.diff(self.batch.host_query_start_loc)
        if num_decodes == len(counts):
            return []
        if size not in self._chunks:
            num_tiles = -(-counts[num_decodes:] // size)
            sequences = np.repeat(np.arange(num_decodes, len(counts)), num_tiles)
            starts = (np.arange(len(sequences)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)) * size
            device = self.slots.device
            self._chunks[size] = Tiles(to_tensor(sequences, device), to_tensor(starts, device), size)
        return [self._chunks[size]]


class TritonBackend:
    """Implements `AttentionBackend` with Triton kernels, for GPUs.

    Not batch-invariant: a decode adds up splits, a chunk does not, and the compiler may order sums by the tile's size.
    """

    batch_invariant = False
    is_capturable = True

    @staticmethod
    def is_supported(spec: KVCacheSpec) -> bool:
        """Returns whether the kernels can read a KV cache with these tensors, see `has_keys_and_values`."""
        return has_keys_and_values(spec, MAX_HEAD_DIM)

    def prepare(self, batch: ForwardBatch, group: int, spec: KVCacheSpec, block_size: int) -> TritonMetadata:
        """Cuts the decodes of a step into sets whose partial outputs fit the workspace (see `AttentionBackend`)."""
        device, num_decodes = batch.seq_lens.device, batch.num_decodes
        longest = int(batch.host_seq_lens[:num_decodes].max(initial=1))
        split_size = -(-longest // (MAX_SPLITS * MIN_SPLIT)) * MIN_SPLIT
        num_splits = -(-longest // split_size)
        sequences = torch.arange(num_decodes, device=device)
        starts = torch.zeros(min(num_decodes, MAX_DECODES), dtype=torch.int64, device=device)
        decodes = [Tiles(part, starts, 1, split_size, num_splits) for part in sequences.split(MAX_DECODES) if len(part)]
        return TritonMetadata(
            batch, batch.block_tables[group], batch.slot_mapping[group], spec.window, block_size, decodes
        )

    def forward(
        self, layer: AttentionParams, q: Tensor, k: Tensor, v: Tensor, cache: LayerKVCache, metadata: TritonMetadata
    ) -> Tensor:
        """Writes the new keys and values, then returns the attention output, see `AttentionBackend`."""
        q, k, v = with_adjacent_heads(q), with_adjacent_heads(k), with_adjacent_heads(v)
        _write_kv(k, v, cache, metadata)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        chunk_size = max(1, _tile_rows(k) * k.shape[1] // q.shape[1])
        for tiles in metadata.decodes + metadata.chunks(chunk_size):
            self._attend(q, cache, metadata, tiles, layer.scale, out)
        return out

    def workspace_bytes(self, spec: KVCacheSpec, num_heads: int, max_tokens: int, max_seq_len: int) -> int:
        """Returns an upper bound of the memory of the partial outputs and of the tiles, see `AttentionBackend`."""
        head_dim = spec.tensors[0][1][1]
        partials = min(max_tokens, MAX_DECODES) * MAX_SPLITS * num_heads * (head_dim + 1) * torch.float32.itemsize
        copies = (num_heads + sum(heads for _, (heads, _) in spec.tensors)) * head_dim * DTYPES[spec.dtype].itemsize
        return partials + max_tokens * (copies + 2 * torch.int64.itemsize)

    def _attend(
        self, q: Tensor, cache: LayerKVCache, metadata: TritonMetadata, tiles: Tiles, scale: float, out: Tensor
    ) -> None:
        """Writes the outputs of these tiles to `out`, [T, heads, head_dim]."""
        keys, (num_heads, head_dim) = cache["keys"], q.shape[1:]
        kv_heads, num_tiles = keys.shape[2], len(tiles.sequences)
        group, is_split = num_heads // kv_heads, tiles.num_splits > 1
        dim_pow2 = max(MIN_DOT, triton.next_power_of_2(head_dim))
        result = lse = out
        if is_split:
            lse = torch.empty(num_tiles, kv_heads, tiles.num_splits, group, dtype=torch.float32, device=q.device)
            result = torch.empty(*lse.shape, head_dim, dtype=torch.float32, device=q.device)
        _attend_kernel[(num_tiles, kv_heads, tiles.num_splits)](
            q,
            keys,
            cache["values"],
            result,
            lse,
            tiles.sequences,
            tiles.starts,
            metadata.batch.query_start_loc,
            metadata.batch.seq_lens,
            metadata.block_table,
            q.stride(0),
            keys.stride(0),
            metadata.block_table.stride(0),
            scale,
            tiles.split_size if is_split else UNSPLIT,
            metadata.window,
            metadata.block_size,
            HAS_WINDOW=metadata.window > 0,
            GROUP=group,
            HEAD_DIM=head_dim,
            TILE=tiles.size,
            ROWS=max(MIN_DOT, triton.next_power_of_2(tiles.size * group)),
            KEYS=_tile_rows(keys),
            DIM_POW2=dim_pow2,
            IS_SPLIT=is_split,
            num_stages=3,
        )
        if is_split:
            _combine_kernel[(num_tiles, num_heads)](
                result,
                lse,
                out,
                tiles.sequences,
                metadata.batch.seq_lens,
                tiles.split_size,
                tiles.num_splits,
                metadata.window,
                HAS_WINDOW=metadata.window > 0,
                GROUP=group,
                HEAD_DIM=head_dim,
                DIM_POW2=dim_pow2,
            )


def _tile_rows(x: Tensor) -> int:
    """Returns how many rows of head_dim numbers a tile has, a power of two. x: [..., head_dim]."""
    numbers = TILE_NUMBERS[x.element_size()]
    return min(MAX_TILE, max(MIN_DOT, numbers // max(MIN_DOT, triton.next_power_of_2(x.shape[-1]))))


def _write_kv(k: Tensor, v: Tensor, cache: LayerKVCache, metadata: TritonMetadata) -> None:
    """Writes the new keys and values [T, kv_heads, head_dim] to their slots."""
    num_tokens, kv_heads, head_dim = k.shape
    size = kv_heads * head_dim
    _write_kv_kernel[(num_tokens,)](
        k,
        v,
        cache["keys"],
        cache["values"],
        metadata.slots,
        k.stride(0),
        v.stride(0),
        cache["keys"].stride(0),
        metadata.block_size,
        SIZE=size,
        SIZE_POW2=triton.next_power_of_2(size),
    )
