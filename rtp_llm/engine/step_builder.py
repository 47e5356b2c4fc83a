"""Builds the step and its sampling metadata from the chunks that the scheduler returned."""

from collections.abc import Sequence

import numpy as np

from rtp_llm.contract.sampling_metadata import SamplingMetadata
from rtp_llm.contract.step import Ints, Step
from rtp_llm.engine.scheduler import ScheduledChunk


def build_step(slices: Sequence[ScheduledChunk], block_size: int, epoch: int, number: int) -> Step:
    """The step that computes these slices. They must be ordered with decodes (count 1) first: see `decodes_first`."""
    counts = np.array([s.num_tokens for s in slices], dtype=np.int32)
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    ids, positions, slots, rows = [], [], [], []
    width = max(len(s.request.block_ids) for s in slices)
    tables = np.zeros((len(slices), width), dtype=np.int32)
    for index, piece in enumerate(slices):
        blocks = np.array(piece.request.block_ids, dtype=np.int32)
        place = np.arange(piece.start, piece.start + piece.num_tokens, dtype=np.int32)
        tables[index, : len(blocks)] = blocks
        ids.append(np.array(piece.request.tokens[piece.start : piece.start + piece.num_tokens], dtype=np.int32))
        positions.append(place)
        slots.append(blocks[place // block_size] * block_size + place % block_size)
        rows.append(logits_offsets(piece) + starts[index])
    return Step(
        epoch=epoch,
        number=number,
        num_decodes=sum(1 for s in slices if s.num_tokens == 1),
        token_ids=np.concatenate(ids),
        positions=np.concatenate(positions),
        slot_mapping=np.concatenate(slots),
        query_start_loc=starts,
        seq_lens=np.array([s.start + s.num_tokens for s in slices], dtype=np.int32),
        prompt_lens=np.array([s.request.num_prompt_tokens for s in slices], dtype=np.int32),
        block_tables=tables,
        logits_indices=np.concatenate(rows).astype(np.int32),
    )


def decodes_first(slices: Sequence[ScheduledChunk]) -> list[ScheduledChunk]:
    """Attention kernels want the sequences with a single query together and in front."""
    return sorted(slices, key=lambda s: s.num_tokens != 1)


def logits_offsets(piece: ScheduledChunk) -> Ints:
    """Offsets within the slice whose logits are wanted: the last token's where it completes, all for prompt
    logprobs.
    """
    if piece.request.wants_prompt_logprobs:
        return np.arange(piece.num_tokens, dtype=np.int32)
    return np.arange(
        piece.num_tokens - 1, piece.num_tokens if piece.is_last_chunk else piece.num_tokens - 1, dtype=np.int32
    )


def build_sampling_metadata(slices: Sequence[ScheduledChunk]) -> SamplingMetadata:
    """Which logits rows of the step become tokens, and which give prompt logprobs; mirrors `step.wanted_rows`."""
    plan = SamplingMetadata([], [], [])
    row = 0
    for piece in slices:
        request = piece.request
        if request.wants_prompt_logprobs:
            top = request.params.logprobs or 0
            targets = request.tokens[piece.start + 1 : piece.start + piece.num_tokens + 1]
            plan.prompt_rows.extend((row + i, token, top) for i, token in enumerate(targets))
            row += piece.num_tokens
        elif piece.is_last_chunk:
            row += 1
        if piece.is_last_chunk:
            plan.rows.append(row - 1)
            plan.requests.append(request)
    return plan
