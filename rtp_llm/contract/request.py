"""A request inside the engine: token ids, no text."""

from llguidance import LLMatcher

from rtp_llm.contract.engine_output import FinishReason, Logprob
from rtp_llm.contract.sampling_params import SamplingParams


class Request:
    """State of one request on rank 0. For the engine a request is one sequence: the API process submits n of them if
    the client asks for n choices.

    A token is computed when its keys and values are in the KV cache. Each step computes some tokens of the request;
    once all are computed, the next token is sampled and appended. A step may be scheduled before the result of the
    previous one is known: tokens that are scheduled to be computed count as computed, and a token that is scheduled to
    be sampled counts as a token with an unknown id (pending).

    id: chosen by the API process, unique while the request runs.
    tokens: known token ids of prompt and output; the first `num_prompt_tokens` are the prompt.
    num_pending_tokens: tokens after `tokens` that steps in flight sample; draft tokens count until they are rejected.
    num_draft_tokens: how many of those are drafts; no step of this request is scheduled until their result is known.
    num_computed_tokens: number of computed tokens once all steps in flight have run.
    num_in_flight: scheduled steps with tokens of this request whose results are not known yet.
    num_tokens_at_start: number of tokens when the request last entered the batch. Later tokens were sampled while it
        was in the batch: the ranks hold them on the device, so steps do not send them.
    last_turn: number of the last turn that this request got, counted over all requests. Running requests take turns if
        there are more of them than a step may have tokens.
    cached_tokens: tokens that the prefix cache provided when the request was first scheduled.
    slot: index of the running request in the batch, 0 … max_num_seqs - 1; -1 while it is not in the batch.
    has_ended: finished or aborted; results of steps in flight are discarded.
    must_wait_for_result: if true, no step of this request is scheduled while one of its tokens is pending.
    block_tables: for each KV cache group, KV blocks in order of position; 0 for a block outside the group's window.
    block_hashes: by block size, prefix-cache keys of the first full blocks, 16 bytes each; computed on demand.
    extra_keys: other inputs on which keys and values depend (an adapter), or a cache salt. Requests share cached blocks
        only if their extra keys are equal.
    skip_prefix_cache: if true, the request uses no blocks of the prefix cache, and computes all of its tokens.
    matcher: `params.grammar`, compiled, in its initial state (not advanced by the output); None without a grammar.
    forced_tokens: (position, tokens): from this position on, the grammar allows only these tokens.
    error: the reason if a logits processor has found that no token may follow; otherwise empty.
    prompt_logprobs: logprobs of prompt tokens (from the second on) that no output has returned yet.
    arrival_time: time.monotonic() when the scheduler received it, in seconds.
    queue_ms: milliseconds from arrival until the request is first scheduled; 0 before.
    """

    __slots__ = (
        "arrival_time",
        "block_hashes",
        "block_tables",
        "cached_tokens",
        "error",
        "extra_keys",
        "forced_tokens",
        "has_ended",
        "id",
        "last_turn",
        "matcher",
        "must_wait_for_result",
        "num_computed_tokens",
        "num_draft_tokens",
        "num_in_flight",
        "num_pending_tokens",
        "num_prompt_tokens",
        "num_tokens_at_start",
        "params",
        "prompt_logprobs",
        "queue_ms",
        "skip_prefix_cache",
        "slot",
        "tokens",
    )

    def __init__(self, id: str, prompt: list[int], params: SamplingParams, output: list[int] | None = None):
        """`output`: tokens that were generated before the ranks restarted; generation continues after them."""
        self.id, self.params = id, params
        self.tokens = prompt + (output or [])
        self.num_prompt_tokens = len(prompt)
        self.num_computed_tokens = self.num_pending_tokens = self.num_draft_tokens = self.num_in_flight = 0
        self.num_tokens_at_start = self.last_turn = self.cached_tokens = 0
        self.slot = -1
        self.has_ended = self.must_wait_for_result = self.skip_prefix_cache = False
        self.block_tables: list[list[int]] = []
        self.block_hashes: dict[int, list[bytes]] = {}
        self.extra_keys: tuple[str | bytes, ...] = ()
        self.matcher: LLMatcher | None = None
        self.forced_tokens: tuple[int, list[int]] = (0, [])
        self.error = ""
        self.prompt_logprobs: list[Logprob] = []
        self.arrival_time = 0.0
        self.queue_ms = 0.0

    @property
    def num_tokens(self) -> int:
        """Returns the number of tokens of prompt and output, including the pending ones, which steps in flight
        sample.
        """
        return len(self.tokens) + self.num_pending_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Returns the number of tokens whose keys and values are not in the KV cache; 1 while decoding."""
        return len(self.tokens) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        """Returns the number of known generated tokens, including those generated before a rank was lost and the
        request was submitted again.
        """
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def output(self) -> list[int]:
        """Returns a copy of the token ids generated so far."""
        return self.tokens[self.num_prompt_tokens :]

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Returns whether a step that is scheduled from now on must compute logits of prompt tokens.

        The request must then bypass the prefix cache, because cached tokens are not computed and have no logits.
        """
        return self.params.prompt_logprobs is not None and self.num_tokens == self.num_prompt_tokens

    def has_reached_limit(self, max_seq_len: int) -> bool:
        """Returns whether the output has max_tokens tokens, or prompt and output together `max_seq_len`, including
        tokens that steps in flight sample.
        """
        return self.num_tokens - self.num_prompt_tokens >= self.params.max_tokens or self.num_tokens >= max_seq_len

    def finish_reason(self, max_seq_len: int) -> FinishReason | None:
        """Returns the reason if the newest known token ends the request, otherwise None. Ignores tokens that
        steps in flight sample.

        The API process checks stop strings.
        """
        if not self.num_output_tokens:
            return None
        # With a grammar, a stop token can come before `min_tokens` only where nothing else may follow.
        may_stop = self.num_output_tokens > self.params.min_tokens or self.params.grammar
        if may_stop and self.tokens[-1] in self.params.stop_token_ids:
            return "stop"
        if self.num_output_tokens >= self.params.max_tokens or len(self.tokens) >= max_seq_len:
            return "length"
        return None
