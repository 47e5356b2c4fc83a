"""What the engine returns for a request after each step (the EVENTS frame)."""

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort", "error"]
# (logprob of the token, its rank in the vocabulary counted from 0, top N as [(token id, logprob)], most likely first)
Logprob = tuple[float, int, list[tuple[int, float]]]


@dataclass
class EngineOutput:
    """Output of one step for one request. The last output of a request has `finish` set."""

    request_id: str
    tokens: list[int] = field(default_factory=list)  # new token ids: one, or none
    logprobs: list[Logprob] = field(default_factory=list)  # of `tokens`; empty if not requested
    prompt_logprobs: list[Logprob] = field(default_factory=list)  # of prompt[1:], in the first output that has a token
    finish: FinishReason | None = None
    cached_tokens: int = 0  # tokens found in the prefix cache
    queue_ms: float = 0.0  # milliseconds from arrival to the first step
    error: str = ""  # set if `finish` is "error"

    def to_json(self) -> list[Any]:
        """Returns the fields as a list, in order of definition."""
        # dataclasses.asdict would copy every logprob of a long prompt.
        return [getattr(self, name) for name in self.__dataclass_fields__]

    @classmethod
    def from_json(cls, data: list[Any]) -> "EngineOutput":
        """Builds an output from the list that `to_json` returned."""
        return cls(*data)
