"""Builds the step and its sampling metadata from the chunks that the scheduler returned."""

from collections.abc import Sequence

import numpy as np

from rtp_llm.contract.sampling_metadata import SamplingMetadata
from rtp_llm.contract.step import Ints, Step
from rtp_llm.engine.scheduler import ScheduledChunk


def build_step(chunks: Sequence[ScheduledChunk], block_size: int, epoch: int, number: int) -> Step:
    """Returns the step that computes these chunks. Decodes must come first: see `sort_decodes_first`.

    `block_size`: tokens per KV block. `epoch`, `number`: see `Step`.
    """
    counts = np.array([c.num_tokens for c in chunks], dtype=np.int32)
    query_start_loc = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    token_ids, positions, slot_mapping, logits_indices = [], [], [], []
    width = max(len(c.request.block_ids) for c in chunks)
    block_tables = np.zeros((len(chunks), width), dtype=np.int32)
    for index, chunk in enumerate(chunks):
        block_ids = np.array(chunk.request.block_ids, dtype=np.int32)
        end = chunk.start + chunk.num_tokens
        chunk_positions = np.arange(chunk.start, end, dtype=np.int32)
        block_tables[index, : len(block_ids)] = block_ids
        token_ids.append(np.array(chunk.request.tokens[chunk.start : end], dtype=np.int32))
        positions.append(chunk_positions)
        slot_mapping.append(block_ids[chunk_positions // block_size] * block_size + chunk_positions % block_size)
        logits_indices.append(logits_offsets(chunk) + query_start_loc[index])
    return Step(
        epoch=epoch,
        number=number,
        num_decodes=sum(1 for c in chunks if c.num_tokens == 1),
        token_ids=np.concatenate(token_ids),
        positions=np.concatenate(positions),
        slot_mapping=np.concatenate(slot_mapping),
        query_start_loc=query_start_loc,
        seq_lens=np.array([c.start + c.num_tokens for c in chunks], dtype=np.int32),
        prompt_lens=np.array([c.request.num_prompt_tokens for c in chunks], dtype=np.int32),
        block_tables=block_tables,
        logits_indices=np.concatenate(logits_indices).astype(np.int32),
    )


def sort_decodes_first(chunks: Sequence[ScheduledChunk]) -> list[ScheduledChunk]:
    """Returns the chunks with one token (decodes), then the others, each in the given order.

    Attention backends can then compute all decodes in one call.
    """
    return sorted(chunks, key=lambda c: c.num_tokens != 1)


def logits_offsets(chunk: ScheduledChunk) -> Ints:
    """Returns which tokens of the chunk need logits, as offsets in the chunk.

    If the request wants prompt logprobs: all tokens. Otherwise the last token if this is the request's last chunk, else
    none.
    """
    if chunk.request.wants_prompt_logprobs:
        return np.arange(chunk.num_tokens, dtype=np.int32)
    last = chunk.num_tokens - 1
    return np.arange(last, chunk.num_tokens if chunk.is_last_chunk else last, dtype=np.int32)


def build_sampling_metadata(chunks: Sequence[ScheduledChunk]) -> SamplingMetadata:
    """Returns which logits rows are sampled and which give prompt logprobs.

    The logits have one row for each token that `logits_offsets` returns, in order of the chunks.
    """
    metadata = SamplingMetadata([], [], [])
    row = 0
    for chunk in chunks:
        request = chunk.request
        if request.wants_prompt_logprobs:
            top = request.params.logprobs or 0
            next_tokens = request.tokens[chunk.start + 1 : chunk.start + chunk.num_tokens + 1]
            metadata.prompt_logits_rows.extend((row + i, token, top) for i, token in enumerate(next_tokens))
            row += chunk.num_tokens
        elif chunk.is_last_chunk:
            row += 1
        if chunk.is_last_chunk:
            metadata.logits_rows.append(row - 1)
            metadata.requests.append(request)
    return metadata
