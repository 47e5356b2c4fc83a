"""Reference attention backend in plain torch. Runs on any device; other backends are tested against it.

Every step is computed as in flash decoding (Dao et al. 2023): the work is split into items, each a tile of queries of
one sequence and a split of its keys. Items of equal shape are batched, so the cost of a step is the sum of the context
lengths. The outputs of a tile over its splits are combined by their log-sum-exp, in order of position.

Tiles and splits begin at fixed positions of the sequence, and an item's bits do not depend on the other items. So on
CPU, the output of a query is bitwise the same in any chunk and in any batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from rtp_llm.contract.kv_cache import NULL_BLOCK, KVCacheSpec
from rtp_llm.kernels.attention_backend import AttentionParams
from rtp_llm.kernels.batch import ForwardBatch
from rtp_llm.kernels.kv_cache import LayerKVCache

Longs = NDArray[np.int64]

TILE = 16  # queries of a chunk that are computed together; a decode is a tile of one query
SPLIT = 256  # keys, rounded to whole blocks: shorter ones cost more to combine, longer ones pad short contexts more
ROW_MULTIPLE = 4  # other numbers of query rows may give a row other bits (MKL, fp32, AVX-512: 1 to 3, 5 and 7)
# Limits the gathered keys of one call, and the values. Small, so that they are still in the CPU's cache when they are
# read. The KV planner counts it (`workspace_bytes`).
MAX_SCRATCH_BYTES = 32 << 20
MASKED = -1e30  # finite: a query that sees no key of a split gets the weight exp(MASKED) = 0, not NaN


@dataclass(frozen=True)
class Call:
    """One call of the attention operation, for items of a `Wave` that have the same number of keys. An item is a tile
    (some queries of one sequence; one in a decode) and one range (split) of the sequence's keys.

    places: [items], index of each item in the wave. queries: [items * tile], rows of q.
    blocks: [items, blocks per item], ids of the blocks with the keys.
    unused: indices of gathered slots to set to zero: those that a tile must not see, in blocks that it sees in part.
        They may hold NaN, which a mask does not remove: 0 * NaN is NaN. A block of which the tile sees no slot is
        replaced by the null block, which is zero.
    mask: [items, tile, keys] float32, 0 or MASKED; None if every query sees every key.
    """

    places: Tensor
    queries: Tensor
    blocks: Tensor
    unused: Tensor
    mask: Tensor | None
    _row_masks: dict[int, Tensor] = field(default_factory=dict)

    def row_mask(self, group_size: int) -> Tensor | None:
        """Returns `mask` for all heads, [items, 1, rows, keys], computed once for all layers; None if there is no mask.

        rows: one for each of an item's queries and each of the `group_size` query heads of a KV head. If the items have
        a single query (decodes), one row, which is broadcast to these heads.
        """
        if self.mask is None or self.mask.shape[1] == 1:
            return self.mask if self.mask is None else self.mask[:, None]
        if group_size not in self._row_masks:
            self._row_masks[group_size] = self.mask.repeat_interleave(group_size, 1)[:, None]
        return self._row_masks[group_size]


@dataclass(frozen=True)
class Wave:
    """Some tiles (queries of one sequence that are computed together) of a step. A tile and one range (split) of its
    keys are an item. Memory limits the tiles of a wave: the outputs of all its items are kept until those of each tile
    are combined.

    tile: queries per tile. tile_of_item: [items], ascending; items of a tile are in order of position.
    rows: [queries], index of each query in the tiles [num_tiles * tile], whose other rows are padding.
    tokens: [queries], index of each query in q.
    """

    tile: int
    num_tiles: int
    tile_of_item: Tensor
    calls: list[Call]
    rows: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class ReferenceMetadata:
    """The metadata of one step for all layers of a KV cache group: the places of the T new tokens in the
    cache, and the waves: the parts of the work that are computed one after another, so that only the intermediate
    results of one are in memory (see `Wave`).
    """

    write_blocks: Tensor  # [T]
    write_offsets: Tensor  # [T]
    waves: list[Wave]


class ReferenceBackend:
    """Implements `AttentionBackend` with operations of torch, on any device.

    Not batch-invariant on a GPU, where the order of additions in `_combine` is not fixed.
    """

    is_capturable = False  # the host plans the waves from the lengths

    def __init__(self, device: torch.device):
        self.batch_invariant = device.type == "cpu"

    def prepare(self, batch: ForwardBatch, group: int, spec: KVCacheSpec, block_size: int) -> ReferenceMetadata:
        """Splits the attention of a KV cache group into waves, which are computed one after another to bound their
        memory (implements `AttentionBackend`).
        """
        slots = batch.slot_mapping[group]
        waves = _Planner(batch, batch.block_tables[group], spec, block_size).waves()
        return ReferenceMetadata(slots // block_size, slots % block_size, list(waves))

    def forward(
        self, layer: AttentionParams, q: Tensor, k: Tensor, v: Tensor, cache: LayerKVCache, metadata: ReferenceMetadata
    ) -> Tensor:
        """Writes the new keys and values, then returns the attention output, see `AttentionBackend`."""
        for tensor, new in ((cache["keys"], k), (cache["values"], v)):
            tensor.index_put_((metadata.write_blocks, metadata.write_offsets), new)
            tensor[NULL_BLOCK] = 0  # `Call.unused` relies on it, and padding may have been written there
        out = torch.empty_like(q)
        for wave in metadata.waves:
            tiles = _attend_wave(q, cache, wave, layer.scale)
            out.index_copy_(0, wave.tokens, tiles.index_select(0, wave.rows))
        return out

    def workspace_bytes(self, spec: KVCacheSpec, num_heads: int, max_tokens: int, max_seq_len: int) -> int:
        """Returns an upper bound of the memory of the metadata and of `forward`, in bytes, see `AttentionBackend`."""
        (_, (kv_heads, head_dim)), *_ = spec.tensors
        row_bytes = num_heads * head_dim * torch.float32.itemsize
        num_items = max(-(-max_seq_len // SPLIT), MAX_SCRATCH_BYTES // (SPLIT * max(spec.row_bytes)))
        partials = 3 * num_items * TILE * row_bytes  # outputs of one call, of the wave, and their weighted copy
        masks = (1 + num_heads // kv_heads) * 2 * (max_tokens + TILE) * SPLIT * torch.float32.itemsize
        return 2 * MAX_SCRATCH_BYTES + partials + masks + 4 * max_tokens * row_bytes


@dataclass(frozen=True)
class _Tiles:
    """Arrays [tiles]: the sequence's index, and positions in it: of row 0 of the tile (a multiple of its size), of the
    first and the last query in this step, and of the lowest key that a query of the tile sees.
    """

    sequence: Longs
    start: Longs
    first: Longs
    last: Longs
    lowest: Longs

    def take(self, indices: slice | Longs) -> "_Tiles":
        return _Tiles(*(getattr(self, f.name)[indices] for f in fields(self)))


class _Planner:
    """Plans the waves of one step and group on the host; copies only indices and positions to the device.

    Splits hold whole blocks, so that keys can be gathered by block.
    """

    def __init__(self, batch: ForwardBatch, block_tables: Tensor, spec: KVCacheSpec, block_size: int):
        self.block_tables, self.block_size, self.window = block_tables, block_size, spec.window
        self.split = block_size * max(1, SPLIT // block_size)
        self.max_items = max(1, MAX_SCRATCH_BYTES // (self.split * max(spec.row_bytes)))
        self.num_decodes = batch.num_decodes
        self.seq_lens = batch.host_seq_lens.astype(np.int64)
        query_start_loc = batch.host_query_start_loc.astype(np.int64)
        self.seq_starts = self.seq_lens - np.diff(query_start_loc)  # positions of the first new tokens
        self.token_offsets = query_start_loc[:-1] - self.seq_starts  # a token's row of q, minus its position

    def waves(self) -> Iterator[Wave]:
        """Yields the attention work in waves: sets of tiles of queries, whose partial outputs (one per part of the
        context) fit the workspace together. First those of decodes, then those of chunks of prompts.
        """
        sequences = np.arange(len(self.seq_lens))
        for indices, size in ((sequences[: self.num_decodes], 1), (sequences[self.num_decodes :], TILE)):
            tiles = self._tiles(indices, size)
            num_items = tiles.last // self.split - tiles.lowest // self.split + 1
            for part in _cut(num_items, self.max_items):
                yield self._wave(tiles.take(part), size, num_items[part])

    def _tiles(self, sequences: Longs, size: int) -> _Tiles:
        first_tile = self.seq_starts[sequences] // size
        owner, index = _ragged(-(-self.seq_lens[sequences] // size) - first_tile)
        sequence, start = sequences[owner], (first_tile[owner] + index) * size
        first = np.maximum(start, self.seq_starts[sequence])
        last = np.minimum(start + size, self.seq_lens[sequence]) - 1
        lowest = np.maximum(0, first + 1 - self.window) if self.window else np.zeros_like(first)
        return _Tiles(sequence, start, first, last, lowest)

    def _wave(self, tiles: _Tiles, size: int, num_items: Longs) -> Wave:
        tile_of_item, index = _ragged(num_items)
        items = tiles.take(tile_of_item)
        keys = (items.lowest // self.split + index) * self.split  # position of the first key of each item
        sees_all = keys + self.split - 1 <= items.first
        if self.window:
            sees_all &= keys > items.last - self.window
        calls = [
            self._call(items.take(part), size, keys[part], part, masked)
            for masked in (False, True)
            for part in _chunks(np.flatnonzero(sees_all != masked), self.max_items)
        ]
        positions = tiles.start[:, None] + np.arange(size)
        is_query = (positions >= tiles.first[:, None]) & (positions <= tiles.last[:, None])
        tokens = positions + self.token_offsets[tiles.sequence, None]
        rows = self._to_device(np.flatnonzero(is_query))
        return Wave(size, len(num_items), self._to_device(tile_of_item), calls, rows, self._to_device(tokens[is_query]))

    def _call(self, items: _Tiles, size: int, keys: Longs, places: Longs, masked: bool) -> Call:
        """Returns the call for these items. The queries that pad a tile are copies of its first or last one."""
        queries = (items.start[:, None] + np.arange(size)).clip(items.first[:, None], items.last[:, None])
        queries += self.token_offsets[items.sequence, None]
        num_blocks = self._num_blocks(items.last - keys + 1) if masked else self.split // self.block_size
        positions = keys[:, None] + np.arange(num_blocks * self.block_size)
        seq_lens = self.seq_lens[items.sequence, None]
        is_used = (positions >= items.lowest[:, None]) & (positions < seq_lens)
        blocks = keys[:, None] // self.block_size + np.arange(num_blocks)
        has_used = (blocks >= items.lowest[:, None] // self.block_size) & (blocks * self.block_size < seq_lens)
        unused = has_used.repeat(self.block_size, 1) & ~is_used
        return Call(
            self._to_device(places),
            self._to_device(queries.flatten()),
            self._block_ids(items.sequence, blocks, has_used),
            self._to_device(np.flatnonzero(unused)),
            self._mask(items.start, size, positions) if masked else None,
        )

    def _num_blocks(self, num_keys: Longs) -> int:
        """Returns how many blocks are gathered for items that see up to these numbers of keys of their split.

        A multiple of a quarter of a split, so that few shapes occur. Masked keys are exact zeros in every sum, so they
        change no bit.
        """
        num_blocks, split_blocks = -(-int(num_keys.max()) // self.block_size), self.split // self.block_size
        unit = max(1, split_blocks // 4)
        return min(-(-num_blocks // unit) * unit, split_blocks)

    def _block_ids(self, sequence: Longs, blocks: Longs, has_used: NDArray[np.bool_]) -> Tensor:
        """Returns the ids of these blocks of the sequences, [items, blocks]; the null block for those without used
        slots.
        """
        columns = self._to_device(np.where(has_used, blocks, 0))
        ids = self.block_tables[self._to_device(sequence)[:, None], columns]
        return ids.masked_fill(torch.from_numpy(~has_used).to(ids.device, non_blocking=True), NULL_BLOCK)

    def _mask(self, start: Longs, size: int, positions: Longs) -> Tensor:
        """Returns the mask [items, size, keys] of queries from `start` on, for keys at `positions` [items, keys]."""
        queries = self._to_device(start)[:, None, None] + torch.arange(size, device=self.block_tables.device)[:, None]
        keys = self._to_device(positions)[:, None]
        is_hidden = keys > queries
        if self.window:
            is_hidden |= keys <= queries - self.window
        return torch.zeros(is_hidden.shape, device=keys.device).masked_fill_(is_hidden, MASKED)

    def _to_device(self, array: Longs) -> Tensor:
        return torch.from_numpy(array).to(self.block_tables.device, non_blocking=True)


def _ragged(counts: Longs) -> tuple[Longs, Longs]:
    """Returns for each of sum(counts) elements its owner, an index of counts, and its index within the owner."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]


def _cut(num_items: Longs, limit: int) -> Iterator[slice]:
    """Yields consecutive slices of tiles with at most `limit` items, or one tile."""
    start, ends = 0, np.cumsum(num_items)
    while start < len(ends):
        used = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, used + limit, side="right")))
        yield slice(start, stop)
        start = stop


def _chunks(array: Longs, size: int) -> list[Longs]:
    return [array[i : i + size] for i in range(0, len(array), size)]


def _attend_wave(q: Tensor, cache: LayerKVCache, wave: Wave, scale: float) -> Tensor:
    """Returns the outputs [num_tiles * tile, heads, head_dim] of a wave's tiles."""
    kv_heads, group_size, dim = cache["keys"].shape[2], q.shape[1] // cache["keys"].shape[2], q.shape[2]
    rows = wave.tile * group_size
    out = q.new_empty(len(wave.tile_of_item), kv_heads, rows, dim)
    lse = torch.empty(out.shape[:3], device=q.device)
    for call in wave.calls:
        queries = q.index_select(0, call.queries).view(-1, wave.tile, kv_heads, group_size, dim)
        keys, values = (_gather(cache[name], call) for name in ("keys", "values"))
        call_out, call_lse = _attend(
            queries.transpose(1, 2).reshape(-1, kv_heads, rows, dim), keys, values, call.row_mask(group_size), scale
        )
        out.index_copy_(0, call.places, call_out)
        lse.index_copy_(0, call.places, call_lse)
    if len(wave.tile_of_item) > wave.num_tiles:
        out = _combine(out, lse, wave)
    return out.view(-1, kv_heads, wave.tile, group_size, dim).transpose(1, 2).reshape(-1, q.shape[1], dim)


def _gather(blocks: Tensor, call: Call) -> Tensor:
    """Returns the keys or values of a call, [items, kv_heads, keys, head_dim], with zeros in unused slots.

    blocks: [num_blocks, block_size, kv_heads, head_dim].
    """
    gathered = blocks.index_select(0, call.blocks.flatten())  # much faster than blocks[call.blocks]
    gathered.flatten(0, 1).index_fill_(0, call.unused, 0)
    return gathered.view(len(call.blocks), -1, *blocks.shape[2:]).transpose(1, 2)


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Returns the output [items, kv_heads, rows, head_dim] and its log-sum-exp [items, kv_heads, rows] float32.

    q: [items, kv_heads, rows, head_dim]. keys, values: [items, kv_heads, keys, head_dim]. mask: added to the scores.
    """
    if q.device.type == "cpu":
        num_items, num_heads, rows, _ = q.shape
        q = pad(q, (0, 0, 0, -rows % ROW_MULTIPLE))
        if num_items * num_heads == 1:  # torch computes a single product with several threads, which changes its bits
            q, keys, values = (tensor.expand(2, -1, -1, -1) for tensor in (q, keys, values))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, keys, values, attn_mask=mask, scale=scale)
        return out[:num_items, :, :rows], lse[:num_items, :, :rows]
    scores = torch.matmul(q.float() * scale, keys.float().mT)
    scores = scores if mask is None else scores + mask
    lse = scores.logsumexp(-1)
    # softmax, not exp(scores - lse): the row of a query that sees no key of this split would add up to more than 1.
    return torch.matmul(scores.softmax(-1).to(values.dtype), values), lse


def _combine(out: Tensor, lse: Tensor, wave: Wave) -> Tensor:
    """Returns the outputs [num_tiles, kv_heads, rows, head_dim] of the tiles, combined from their items."""
    owner = wave.tile_of_item
    index = owner[:, None, None].expand_as(lse)
    top = lse.new_full((wave.num_tiles, *lse.shape[1:]), -torch.inf).scatter_reduce_(0, index, lse, "amax")
    weights = (lse - top.index_select(0, owner)).exp_()
    total = torch.zeros_like(top).index_add_(0, owner, weights)
    summed = out.new_zeros((wave.num_tiles, *out.shape[1:]), dtype=torch.float32)
    summed.index_add_(0, owner, out * weights[..., None])
    return summed.div_(total[..., None]).to(out.dtype)
