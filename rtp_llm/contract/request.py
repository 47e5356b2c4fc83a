"""A request inside the engine: token ids, no text."""

from rtp_llm.contract.engine_output import FinishReason, Logprob
from rtp_llm.contract.sampling_params import SamplingParams


class Request:
    """State of one request on rank 0.

    A token is computed when its keys and values are in the KV cache. Each step computes some tokens of the request;
    once all are computed, the next token is sampled and appended.

    id: chosen by the API process, unique while the request runs.
    tokens: token ids of prompt and output; `num_prompt_tokens` of them are the prompt.
    num_computed_tokens: the first `num_computed_tokens` of `tokens` are computed.
    cached_tokens: tokens that the prefix cache provided when the request was first scheduled.
    block_ids: KV blocks in order of position (the request's block table).
    block_hashes: prefix-cache keys of its first full blocks, 16 bytes each; computed on demand.
    cache_salt: at most 16 bytes; requests share cached blocks only if their salts are equal.
    prompt_logprobs: logprobs of prompt tokens (from the second on) that no output has returned yet.
    arrival_time: time.monotonic() when the scheduler received it, in seconds.
    queue_ms: milliseconds from arrival until the request is first scheduled; 0 before.
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
        """`output`: tokens that were generated before the ranks restarted; generation continues after them."""
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
        """Returns the number of tokens of prompt and output."""
        return len(self.tokens)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Returns the number of tokens whose keys and values are not in the KV cache; 1 while decoding."""
        return len(self.tokens) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        """Returns the number of generated tokens, including those from before a restart of the ranks."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def output(self) -> list[int]:
        """Returns a copy of the generated tokens."""
        return self.tokens[self.num_prompt_tokens :]

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Returns whether the logits of prompt tokens are still needed.

        The request must then bypass the prefix cache, because cached tokens are not computed and have no logits.
        """
        return self.params.prompt_logprobs and not self.num_output_tokens

    def finish_reason(self, max_seq_len: int) -> FinishReason | None:
        """Returns why the newest token ends the request; None if it does not. The API process checks stop strings."""
        if not self.num_output_tokens:
            return None
        if self.tokens[-1] in self.params.stop_token_ids and self.num_output_tokens > self.params.min_tokens:
            return "stop"
        if self.num_output_tokens >= self.params.max_tokens or self.num_tokens >= max_seq_len:
            return "length"
        return None
