"""What rank 0 wants from the logits of a step, and what it gets: between the engine and the sampler."""

from dataclasses import dataclass

from rtp_llm.contract.engine_output import Logprob
from rtp_llm.contract.request import Request


@dataclass(frozen=True)
class SampledToken:
    """One chosen token, with its logprob record where one was asked for; None where the logits were not numbers."""

    token_id: int | None
    logprob: Logprob | None = None


@dataclass(frozen=True)
class SamplingMetadata:
    """What rank 0 wants from the logits of a step; indices count the step's `rows`.

    `requests[i]` gets its next token from logits row `rows[i]`; `prompt_rows` are (row, token, number of likeliest)
    whose logprobs are wanted.
    """

    rows: list[int]
    requests: list[Request]
    prompt_rows: list[tuple[int, int, int]]
