"""Builds the step and its sampling metadata from the scheduler's output."""

from collections.abc import Iterable, Sequence

import numpy as np

from rtp_llm.contract.sampling_metadata import SamplingMetadata
from rtp_llm.contract.step import ROW_SIZES, Ints, Step
from rtp_llm.engine.scheduler_output import ScheduledChunk, SchedulerOutput


def build_step(output: SchedulerOutput, epoch: int, number: int) -> Step:
    """Returns the step that computes the chunks of `output`.

    `epoch`, `number`: see `Step`. The step's digest is still 0: rank 0 replaces it by `StepInputs.digest` once it has
    applied the step to its batch.
    """
    chunks = output.chunks
    slots = [c.request.slot for c in chunks]
    new = [(c.request.slot, c.request.num_prompt_tokens, c.start) for c in chunks if c.is_new]
    blocks = [(slot, *block) for slot, c in zip(slots, chunks, strict=True) for block in c.new_blocks]
    return Step(
        epoch=epoch,
        number=number,
        digest=0,
        ended_slots=_ints(output.ended_slots),
        new_sequences=_table("new_sequences", new),
        rewinds=_table("rewinds", output.rewinds),
        retired_blocks=_ints(output.retired_blocks),
        new_blocks=_table("new_blocks", blocks),
        slots=_ints(slots),
        counts=_ints(c.num_tokens for c in chunks),
        num_sampled=_ints(c.num_sampled for c in chunks),
        token_ids=_ints(token for c in chunks for token in c.token_ids),
        logprob_indices=_ints(
            index for start, c in _starts(chunks) for index in range(start, start + c.num_prompt_logprobs)
        ),
    )


def build_sampling_metadata(chunks: Sequence[ScheduledChunk]) -> SamplingMetadata:
    """Returns the data that rank 0 needs to sample the step of these chunks."""
    metadata = SamplingMetadata()
    for start, chunk in _starts(chunks):
        request = chunk.request
        if chunk.is_new:
            metadata.new_requests.append((request.slot, request))
        if chunk.num_prompt_logprobs:
            next_tokens = request.tokens[chunk.start + 1 : chunk.start + 1 + chunk.num_prompt_logprobs]
            metadata.prompt_logprobs.extend((token, request.params.prompt_logprobs or 0) for token in next_tokens)
        if chunk.is_pooled:
            metadata.hidden_indices.append(start + chunk.num_tokens - 1)
    return metadata


def _starts(chunks: Sequence[ScheduledChunk]) -> Iterable[tuple[int, ScheduledChunk]]:
    """Yields (index of the chunk's first token in the step, chunk)."""
    start = 0
    for chunk in chunks:
        yield start, chunk
        start += chunk.num_tokens


def _ints(values: Iterable[int]) -> Ints:
    return np.fromiter(values, np.int32)


def _table(name: str, rows: Sequence[tuple[int, ...]]) -> Ints:
    """Returns the rows as the array `name` of a step."""
    return np.array(rows, np.int32).reshape(-1, ROW_SIZES[name])
