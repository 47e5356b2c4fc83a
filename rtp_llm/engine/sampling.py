"""What rank 0 wants from the logits of a step, and what it gets: between the engine and the sampler."""

from collections.abc import Sequence
from dataclasses import dataclass

from rtp_llm.engine.request import Logprob, Request
from rtp_llm.engine.scheduler import Slice


@dataclass(frozen=True)
class Sampled:
    """One chosen token, with its logprob record where one was asked for; None where the logits were not numbers."""

    token: int | None
    logprob: Logprob | None = None


@dataclass(frozen=True)
class Sampling:
    """What rank 0 wants from the logits of a step; indices count the step's `rows`.

    `requests[i]` gets its next token from logits row `rows[i]`; `prompt_rows` are (row, token, number of likeliest)
    whose logprobs are wanted.
    """

    rows: list[int]
    requests: list[Request]
    prompt_rows: list[tuple[int, int, int]]


def plan_sampling(slices: Sequence[Slice]) -> Sampling:
    """Which logits rows of the step become tokens, and which give prompt logprobs; mirrors `step.wanted_rows`."""
    plan = Sampling([], [], [])
    row = 0
    for piece in slices:
        request = piece.request
        if request.wants_prompt_logprobs:
            top = request.params.logprobs or 0
            targets = request.tokens[piece.start + 1 : piece.start + piece.count + 1]
            plan.prompt_rows.extend((row + i, token, top) for i, token in enumerate(targets))
            row += piece.count
        elif piece.completes:
            row += 1
        if piece.completes:
            plan.rows.append(row - 1)
            plan.requests.append(request)
    return plan
