"""Output of the engine for one request after a step, sent to the API process in an EVENTS frame (`parallel.wire`)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error", "out_of_memory", "invalid"]
# (logprob of the token, number of more likely tokens, [(token id, logprob)] of the N most likely tokens in order, or of
# SamplingParams.logprob_token_ids)
Logprob = tuple[float, int, list[tuple[int, float]]]


@dataclass
class EngineOutput:
    """New tokens of one request (one sequence) after a step. The last output of a request has `finish` set."""

    request_id: str
    tokens: list[int] = field(default_factory=list)  # new token ids
    logprobs: Sequence[Logprob] = field(default_factory=list)  # of `tokens`; empty if not requested
    # Of all prompt tokens but the first; only in the first output that has a token.
    prompt_logprobs: Sequence[Logprob] = field(default_factory=list)
    finish: FinishReason | None = None
    cached_tokens: int = 0  # tokens that were in the prefix cache when the request started
    queue_ms: float = 0.0  # milliseconds from arrival to the first step
    hidden_state: bytes = b""  # of a pooled request, in its last output: [hidden_size] float32 in native byte order
    error: str = ""  # message for the client if `finish` is "error", "out_of_memory" or "invalid"
