"""A request inside the engine. Tokens only, no text."""

from rtp_llm.contract.engine_output import FinishReason, Logprob
from rtp_llm.contract.sampling_params import SamplingParams


class Request:
    """State of one sequence on rank 0. `num_computed` must catch up with `num_tokens`; that is all the scheduler
    knows.
    """

    __slots__ = (
        "arrival_time",
        "block_hashes",
        "block_ids",
        "cache_salt",
        "cached_tokens",
        "id",
        "num_computed_tokens",
        "num_prompt_tokens",
        "params",
        "prompt_logprobs",
        "queue_ms",
        "tokens",
    )

    def __init__(self, id: str, prompt: list[int], params: SamplingParams, output: list[int] | None = None):
        """`output`: tokens already produced in an earlier epoch; generation goes on behind them."""
        self.id, self.params = id, params
        self.tokens = prompt + (output or [])
        self.num_prompt_tokens = len(prompt)
        self.num_computed_tokens = 0
        self.cached_tokens = 0
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []
        self.cache_salt = b""
        self.prompt_logprobs: list[Logprob] = []
        self.arrival_time = 0.0
        self.queue_ms = 0.0

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 while decoding."""
        return len(self.tokens) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Until they are complete, prompt positions need logits and may not come from the prefix cache."""
        return self.params.prompt_logprobs and not self.num_output_tokens

    def finish_reason(self, max_seq_len: int) -> FinishReason | None:
        """Whether the newest token ends the request. Stop strings are the API's: the engine knows no text."""
        if not self.num_output_tokens:
            return None
        if self.tokens[-1] in self.params.stop_token_ids and self.num_output_tokens > self.params.min_tokens:
            return "stop"
        if self.num_output_tokens >= self.params.max_tokens or self.num_tokens >= max_seq_len:
            return "length"
        return None
