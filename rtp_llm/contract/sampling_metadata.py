"""The sampler's input and output on rank 0, besides the logits."""

from dataclasses import dataclass

from rtp_llm.contract.engine_output import Logprob
from rtp_llm.contract.request import Request


@dataclass(frozen=True)
class SampledToken:
    """One sampled token.

    token_id: None if the logits contain NaN.
    logprob: None unless the request asks for logprobs.
    """

    token_id: int | None
    logprob: Logprob | None = None


@dataclass(frozen=True)
class SamplingMetadata:
    """Selects the rows of a step's logits that are sampled, and those that give prompt logprobs.

    The logits have the shape [R, vocab_size]; row i belongs to entry i of `Step.logits_indices`, which has length R.

    logits_rows: one row per request; the next token of `requests[i]` is sampled from row `logits_rows[i]`.
    requests: the requests whose tokens are all computed after this step.
    prompt_logits_rows: one (row, token id, N) per prompt logprob of this step. The logits of `row` give the logprob of
        the next prompt token, which is `token id`, and the logprobs of the N most likely tokens.
    """

    logits_rows: list[int]
    requests: list[Request]
    prompt_logits_rows: list[tuple[int, int, int]]
