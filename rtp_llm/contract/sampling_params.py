"""What a client asks of the sampler."""

from dataclasses import asdict, dataclass, field
from typing import Any


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
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @property
    def needs_logits_processing(self) -> bool:
        """Whether logits must be edited before a token is chosen."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_tokens
        )
