"""What the engine returns for a request after each step."""

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort", "error"]
# (logprob of the chosen token, its rank from 0, [(token, logprob) of the likeliest])
Logprob = tuple[float, int, list[tuple[int, float]]]


@dataclass
class EngineOutput:
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
    def from_json(cls, data: list[Any]) -> "EngineOutput":
        return cls(*data)
