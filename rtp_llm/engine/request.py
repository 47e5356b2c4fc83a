"""A request inside the engine, what it asks of the sampler, and the events it produces. Plain Python; tokens only,
no text.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Validated at the API; the engine trusts it."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output (Keskar et al. 2019, arXiv 1909.05858)
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()  # end of sequence among them, unless ignored
    logprobs: int | None = None  # None: none; N: the chosen token's and the N likeliest
    prompt_logprobs: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "SamplingParams":
        bias = {int(token): float(bias) for token, bias in data["logit_bias"].items()}
        return cls(**{**data, "stop_token_ids": tuple(data["stop_token_ids"]), "logit_bias": bias})

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @property
    def changes_logits(self) -> bool:
        """Whether logits must be edited before a token is chosen."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_tokens
        )


# (logprob of the chosen token, its rank from 0, [(token, logprob) of the likeliest])
Logprob = tuple[float, int, list[tuple[int, float]]]


@dataclass
class Event:
    """What one step did to one request; the last one carries a finish reason."""

    request_id: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)  # of prompt[1:], complete, once
    finish: FinishReason | None = None
    cached_tokens: int = 0
    queue_ms: float = 0.0
    error: str = ""

    def to_json(self) -> list[Any]:
        # Not asdict: it copies every record of a long prompt's logprobs.
        return [getattr(self, name) for name in self.__dataclass_fields__]

    @classmethod
    def from_json(cls, data: list[Any]) -> "Event":
        return cls(*data)


class Request:
    """State of one sequence on rank 0. `num_computed` must catch up with `num_tokens`; that is all the scheduler
    knows.
    """

    __slots__ = (
        "arrived",
        "block_hashes",
        "block_ids",
        "cache_salt",
        "cached_tokens",
        "id",
        "num_computed",
        "num_prompt",
        "params",
        "prompt_logprobs",
        "queue_ms",
        "tokens",
    )

    def __init__(self, id: str, prompt: list[int], params: SamplingParams, output: list[int] | None = None):
        """`output`: tokens already produced in an earlier epoch; generation goes on behind them."""
        self.id, self.params = id, params
        self.tokens = prompt + (output or [])
        self.num_prompt = len(prompt)
        self.num_computed = 0
        self.cached_tokens = 0
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []
        self.cache_salt = b""
        self.prompt_logprobs: list[Logprob] = []
        self.arrived = 0.0
        self.queue_ms = 0.0

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_missing(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Until they are complete, prompt positions need logits and may not come from the prefix cache."""
        return self.params.prompt_logprobs and not self.num_output

    def finish_reason(self, max_seq_len: int) -> FinishReason | None:
        """Whether the newest token ends the request. Stop strings are the API's: the engine knows no text."""
        if not self.num_output:
            return None
        if self.tokens[-1] in self.params.stop_token_ids and self.num_output > self.params.min_tokens:
            return "stop"
        if self.num_output >= self.params.max_tokens or self.num_tokens >= max_seq_len:
            return "length"
        return None
