"""The scheduler's decision for one step, and the updates of the requests once the step's results are known."""

from dataclasses import dataclass, field

from rtp_llm.contract.engine_output import FinishReason
from rtp_llm.contract.request import Request


@dataclass(frozen=True)
class ScheduledChunk:
    """The tokens [start, start + num_tokens) of one request, which one step computes; the last ones are draft tokens.

    token_ids: the chunk's tokens that ranks do not hold yet: all except the one that the request's last step sampled.
    draft_tokens: guesses of the tokens that follow; also the last ones of `token_ids`.
    num_sampled: number of rows that are sampled, the last of the chunk: 0 before the end of a prompt and for a pooled
        request, otherwise 1 + draft tokens.
    is_pooled: the chunk ends a pooled request, which returns the hidden state of its last token.
    num_prompt_logprobs: number of rows, from the first, that return the logprob of the prompt token after them.
    is_new: the request enters the batch with this chunk: it was admitted, or resumed after a preemption.
    new_blocks: (KV cache group, index in the block table, block id) of the blocks that the request got for this chunk;
        if it is new, of all its blocks except null blocks.
    """

    request: Request
    start: int
    num_tokens: int
    token_ids: list[int] = field(default_factory=list)
    draft_tokens: list[int] = field(default_factory=list)
    num_sampled: int = 0
    is_pooled: bool = False
    num_prompt_logprobs: int = 0
    is_new: bool = False
    new_blocks: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class SchedulerOutput:
    """One step. If it has no chunks, no step runs, and its other fields are part of the next output.

    A rank applies `ended_slots` first, then new sequences, then `rewinds`.

    chunks: at most one per request; those of one token (decodes) first, each kind in order of arrival.
    ended_slots: slots of the requests that have left the batch since the last step; new requests may reuse them.
    rewinds: (slot, computed tokens) of requests whose draft tokens were rejected in their last step.
    retired_blocks: KV blocks whose memory all ranks return to the kernel before the step, because the host is short of
    memory (CPU only).
    starved: requests that were ended because there is no memory for their KV blocks; the only field that is not kept
        for the next output.
    """

    chunks: list[ScheduledChunk]
    ended_slots: list[int] = field(default_factory=list)
    rewinds: list[tuple[int, int]] = field(default_factory=list)
    retired_blocks: list[int] = field(default_factory=list)
    starved: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Returns the number of tokens that the step computes."""
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(frozen=True)
class RequestUpdate:
    """The effect of one chunk's result on its request, if the chunk samples tokens or is pooled.

    tokens: the tokens that were appended, up to the end of the request; empty if the request is pooled, has failed, or
        had ended before (its result is then discarded).
    finish: why the request ended with this step; None if it continues, or had ended before.
    """

    request: Request
    tokens: list[int]
    finish: FinishReason | None
