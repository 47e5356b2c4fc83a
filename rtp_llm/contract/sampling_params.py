"""Parameters that control how a request is sampled and when it ends."""

from dataclasses import asdict, dataclass, field
from typing import Any

TUPLES = ("stop_token_ids", "logprob_token_ids", "reasoning_start", "reasoning_end", "allowed_token_ids")


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one sequence. The API process has validated them; the engine does not check them again."""

    max_tokens: int  # of output
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # over prompt and output (Keskar et al. 2019, arXiv 1909.05858); 1: off
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: dict[int, float] = field(default_factory=dict)  # token id to a number added to its logit
    allowed_token_ids: tuple[int, ...] = ()  # no other token is sampled; empty: any may be
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids that do not follow one another in the output
    seed: int = 0  # of the random numbers, see `layers.sampler`
    min_tokens: int = 0  # of output; before that many, stop_token_ids cannot be sampled
    stop_token_ids: tuple[int, ...] = ()  # includes the end-of-sequence ids unless the client ignores them
    logprobs: int | None = None  # None: off; N: of the sampled token and the N most likely tokens
    logprob_token_ids: tuple[int, ...] = ()  # with `logprobs`: of these tokens instead of the most likely ones
    grammar: str = ""  # of llguidance (Lark or JSON), which the whole output matches; empty: any text
    # Tokens of reasoning after which it is ended; None: no limit. It begins with the tokens `reasoning_start` at the
    # start of the output (empty: in the prompt), and ends with `reasoning_end`.
    reasoning_budget: int | None = None
    reasoning_start: tuple[int, ...] = ()
    reasoning_end: tuple[int, ...] = ()
    pooling: bool = False  # return the hidden state of the last prompt token, and no tokens
    prompt_logprobs: int | None = None  # None: off; N: as logprobs, of all prompt tokens but the first

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object `params` of a SUBMIT frame, with which the API process submits a request."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "SamplingParams":
        """Builds the parameters from the JSON object that `to_json` returned.

        Undoes the changes of JSON: keys of logit_bias became strings, tuples became lists.
        """
        logit_bias = {int(token): float(bias) for token, bias in data["logit_bias"].items()}
        tuples = {name: tuple(data[name]) for name in TUPLES}
        bad_words = tuple(map(tuple, data["bad_words"]))
        return cls(**{**data, **tuples, "logit_bias": logit_bias, "bad_words": bad_words})

    @property
    def is_greedy(self) -> bool:
        """Returns whether the most likely token is always chosen."""
        return self.temperature == 0 or self.top_k == 1
