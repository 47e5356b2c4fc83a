"""Attention in plain torch: runs anywhere, and is the oracle that every other backend is tested against."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rtp_llm.kernels.batch import ForwardBatch, LayerKVCache

TILE = 256  # queries at once: with a mask torch may hold the scores of all of them, heads x queries x context
# Limits the bytes of one gathered tensor or one matrix of scores. The KV cache takes the memory that the warm-up leaves
# free, and the warm-up has no long sequences. Up to four such tensors exist at a time.
SCRATCH_BYTES = 128 << 20


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, cache: LayerKVCache, batch: ForwardBatch, *, window: int, scale: float
) -> Tensor:
    """See `AttentionBackend`. Gathers the pages of each sequence and calls torch's scaled_dot_product_attention."""
    cache.keys.flatten(0, 1).index_copy_(0, batch.slot_mapping, key)
    cache.values.flatten(0, 1).index_copy_(0, batch.slot_mapping, value)
    out = torch.empty_like(query)
    decodes = batch.cpu_step.num_decodes
    width = _blocks_of_longest(batch, cache, decodes)
    for part in _parts(decodes, width * cache.keys[0].numel() * cache.keys.itemsize):
        out[part] = _decode(query[part], cache, batch, part, window, scale)
    for index in range(decodes, batch.cpu_step.num_sequences):
        start, end = (int(n) for n in batch.cpu_step.query_start_loc[index : index + 2])
        out[start:end] = _chunk(query[start:end], cache, batch, index, window, scale)
    return out


def _blocks_of_longest(batch: ForwardBatch, cache: LayerKVCache, count: int) -> int:
    """Returns the number of blocks of the longest of the first `count` sequences, 0 for none."""
    longest = int(batch.cpu_step.seq_lens[:count].max(initial=0))
    return -(-longest // cache.keys.shape[1])


def _parts(count: int, each: int) -> list[slice]:
    """Splits `count` items of `each` bytes into as few parts as `SCRATCH_BYTES` allows."""
    most = max(1, SCRATCH_BYTES // max(1, each))
    return [slice(first, min(first + most, count)) for first in range(0, count, most)]


def _decode(query: Tensor, cache: LayerKVCache, batch: ForwardBatch, part: slice, window: int, scale: float) -> Tensor:
    """One query per sequence, those of `part` at once, padded to the longest.

    The query heads of a KV head stand in as its queries: ten times faster on CPU than enable_gqa, same result.
    """
    kv_heads, block_size = cache.keys.shape[2], cache.keys.shape[1]
    width = -(-int(batch.cpu_step.seq_lens[part].max()) // block_size)
    tables = batch.block_tables[part, :width]
    keys, values = (_gather_pages(pages, tables) for pages in (cache.keys, cache.values))
    positions = torch.arange(width * block_size, device=query.device)
    lengths = batch.seq_lens[part, None]
    visible = positions < lengths
    if window:
        visible &= positions >= lengths - window
    grouped = query.unflatten(1, (kv_heads, -1))
    mask = visible[:, None, None, :]
    if query.is_cuda:  # where asking afterwards, as below, would wait for the device
        keys, values = _zero_masked(keys, visible), _zero_masked(values, visible)
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    if not query.is_cuda and out.sum().isnan():  # any of them: much cheaper than looking at each
        keys, values = _zero_masked(keys, visible), _zero_masked(values, visible)
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return out.flatten(1, 2)


def _zero_masked(pages: Tensor, mask: Tensor) -> Tensor:
    """A masked NaN is still one (0 x NaN), and unseen slots hold what other requests have left there."""
    return pages.masked_fill(~mask[:, None, :, None], 0)


def _chunk(query: Tensor, cache: LayerKVCache, batch: ForwardBatch, index: int, window: int, scale: float) -> Tensor:
    """Several consecutive queries of one sequence."""
    block_size = cache.keys.shape[1]
    length = int(batch.cpu_step.seq_lens[index])
    table = batch.block_tables[index : index + 1, : -(-length // block_size)]
    keys, values = (_gather_pages(pages, table)[:, :, :length] for pages in (cache.keys, cache.values))
    positions = torch.arange(length, device=query.device)
    tiles = []
    first = length - len(query)
    fitting = SCRATCH_BYTES // (query.shape[1] * length * torch.float32.itemsize)
    for tile in query.split(max(1, min(TILE, fitting))):
        own = positions[first : first + len(tile), None]
        first += len(tile)
        visible = positions <= own
        if window:
            visible &= positions > own - window
        out = scaled_dot_product_attention(
            tile.transpose(0, 1)[None], keys, values, attn_mask=visible, scale=scale, enable_gqa=True
        )
        tiles.append(out[0].transpose(0, 1))
    return torch.cat(tiles)


def _gather_pages(pages: Tensor, tables: Tensor) -> Tensor:
    """[blocks, block_size, heads, dim] by [S, W] to [S, heads, W x block_size, dim]."""
    picked = pages.index_select(0, tables.flatten())  # copies whole pages: much faster than pages[tables]
    return picked.unflatten(0, tables.shape).flatten(1, 2).transpose(1, 2)
