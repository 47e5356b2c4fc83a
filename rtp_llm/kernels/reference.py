"""Reference attention backend in plain torch. Runs on any device; other backends are tested against it."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rtp_llm.kernels.batch import ForwardBatch, LayerKVCache

QUERIES_PER_TILE = 256  # bounds the scores [heads, queries, keys] that torch may materialise because of the mask
# Limits the bytes of one tensor of gathered keys or values, or of scores, except that the keys of one sequence are
# never split; up to four such tensors exist at a time. The KV cache takes nearly all memory that is free after the
# warm-up, whose sequence is short; without a limit, steps with long sequences could run out of memory.
MAX_SCRATCH_BYTES = 128 << 20


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, cache: LayerKVCache, batch: ForwardBatch, *, window: int, scale: float
) -> Tensor:
    """Implements `AttentionBackend`: gathers the blocks of each sequence, then calls scaled_dot_product_attention."""
    cache.keys.flatten(0, 1).index_copy_(0, batch.slot_mapping, key)
    cache.values.flatten(0, 1).index_copy_(0, batch.slot_mapping, value)
    out = torch.empty_like(query)
    num_decodes = batch.cpu_step.num_decodes
    num_blocks = _max_blocks(batch, cache, slice(num_decodes))
    for rows in _split_rows(num_decodes, num_blocks * cache.keys[0].numel() * cache.keys.itemsize):
        out[rows] = _attend_decodes(query[rows], cache, batch, rows, window, scale)
    for index in range(num_decodes, batch.cpu_step.num_sequences):
        start, end = (int(n) for n in batch.cpu_step.query_start_loc[index : index + 2])
        out[start:end] = _attend_chunk(query[start:end], cache, batch, index, window, scale)
    return out


def _max_blocks(batch: ForwardBatch, cache: LayerKVCache, rows: slice) -> int:
    """Returns the number of KV blocks of the longest sequence in the slice `rows` of the batch; 0 if it is empty."""
    max_seq_len = int(batch.cpu_step.seq_lens[rows].max(initial=0))
    return -(-max_seq_len // cache.keys.shape[1])


def _split_rows(num_rows: int, bytes_per_row: int) -> list[slice]:
    """Returns consecutive slices of `num_rows` sequences, each of at most MAX_SCRATCH_BYTES or one sequence."""
    size = max(1, MAX_SCRATCH_BYTES // max(1, bytes_per_row))
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _attend_decodes(
    query: Tensor, cache: LayerKVCache, batch: ForwardBatch, rows: slice, window: int, scale: float
) -> Tensor:
    """Returns the attention output of the sequences in the slice `rows` of the batch, which have one query each.

    query: [sequences, heads, head_dim]. Pads all sequences to the longest. Passes the query heads of a KV head as
    several queries of one head, which on CPU is ten times as fast as enable_gqa.
    """
    kv_heads, block_size = cache.keys.shape[2], cache.keys.shape[1]
    width = _max_blocks(batch, cache, rows)
    block_tables = batch.block_tables[rows, :width]
    keys, values = (_gather_blocks(blocks, block_tables) for blocks in (cache.keys, cache.values))
    positions = torch.arange(width * block_size, device=query.device)
    seq_lens = batch.seq_lens[rows, None]
    mask = positions < seq_lens
    if window:
        mask &= positions >= seq_lens - window
    grouped_query = query.unflatten(1, (kv_heads, -1))
    attn_mask = mask[:, None, None, :]
    if query.is_cuda:  # without the NaN check below, which would wait for the device
        keys, values = _zero_masked(keys, mask), _zero_masked(values, mask)
    out = scaled_dot_product_attention(grouped_query, keys, values, attn_mask=attn_mask, scale=scale)
    if not query.is_cuda and out.sum().isnan():  # the sum is much cheaper than out.isnan().any()
        keys, values = _zero_masked(keys, mask), _zero_masked(values, mask)
        out = scaled_dot_product_attention(grouped_query, keys, values, attn_mask=attn_mask, scale=scale)
    return out.flatten(1, 2)


def _zero_masked(tensor: Tensor, mask: Tensor) -> Tensor:
    """Returns a copy of keys or values with zeros at the positions where `mask` is False.

    tensor: [sequences, kv_heads, positions, head_dim]. mask: [sequences, positions].

    A NaN left in a slot by another request would propagate through the attention mask (0 * NaN is NaN).
    """
    return tensor.masked_fill(~mask[:, None, :, None], 0)


def _attend_chunk(
    query: Tensor, cache: LayerKVCache, batch: ForwardBatch, index: int, window: int, scale: float
) -> Tensor:
    """Returns the attention output of sequence `index`, whose queries [tokens, heads, head_dim] are consecutive."""
    block_size = cache.keys.shape[1]
    seq_len = int(batch.cpu_step.seq_lens[index])
    block_table = batch.block_tables[index : index + 1, : -(-seq_len // block_size)]
    keys, values = (_gather_blocks(blocks, block_table)[:, :, :seq_len] for blocks in (cache.keys, cache.values))
    positions = torch.arange(seq_len, device=query.device)
    tiles = []
    start = seq_len - len(query)
    max_queries = MAX_SCRATCH_BYTES // (query.shape[1] * seq_len * torch.float32.itemsize)
    for tile in query.split(max(1, min(QUERIES_PER_TILE, max_queries))):
        query_positions = positions[start : start + len(tile), None]
        start += len(tile)
        mask = positions <= query_positions
        if window:
            mask &= positions > query_positions - window
        out = scaled_dot_product_attention(
            tile.transpose(0, 1)[None], keys, values, attn_mask=mask, scale=scale, enable_gqa=True
        )
        tiles.append(out[0].transpose(0, 1))
    return torch.cat(tiles)


def _gather_blocks(blocks: Tensor, block_tables: Tensor) -> Tensor:
    """Returns keys or values in order of position.

    blocks: [num_blocks, block_size, kv_heads, head_dim]. block_tables: [sequences, width], block ids.
    Returns [sequences, kv_heads, width * block_size, head_dim].
    """
    gathered = blocks.index_select(0, block_tables.flatten())  # much faster than blocks[block_tables]
    return gathered.unflatten(0, block_tables.shape).flatten(1, 2).transpose(1, 2)
