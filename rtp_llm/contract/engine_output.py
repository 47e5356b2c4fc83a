"""Output of the engine for one request after a step, sent to the API process in an EVENTS frame (`parallel.wire`)."""

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort", "error"]
# (logprob of the token, number of more likely tokens, the N most likely tokens in order as [(token id, logprob)])
Logprob = tuple[float, int, list[tuple[int, float]]]


@dataclass
class EngineOutput:
    """Output of one step for one request. The last output of a request has `finish` set."""

    request_id: str
    tokens: list[int] = field(default_factory=list)  # new token ids: one, or none
    logprobs: list[Logprob] = field(default_factory=list)  # of `tokens`; empty if not requested
    # Of all prompt tokens but the first; only in the first output that has a token.
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    finish: FinishReason | None = None
    cached_tokens: int = 0  # tokens that were in the prefix cache when the request started
    queue_ms: float = 0.0  # milliseconds from arrival to the first step
    error: str = ""  # message for the client if `finish` is "error"

    def to_json(self) -> list[Any]:
        """Returns the fields as a list, in order of definition."""
        # dataclasses.asdict would copy every logprob of a long prompt.
        return [getattr(self, name) for name in self.__dataclass_fields__]

    @classmethod
    def from_json(cls, data: list[Any]) -> "EngineOutput":
        """Builds an output from the list that `to_json` returned."""
        return cls(*data)
