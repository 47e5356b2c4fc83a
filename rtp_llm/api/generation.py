"""One request to an OpenAI endpoint: its choices and their output so far."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from rtp_llm.api.service import OutputChunk, Service, SlotReservation, TextParams
from rtp_llm.api.stream import merge
from rtp_llm.contract.sampling_params import SamplingParams


@dataclass
class Choice:
    """One entry of `choices` in the response: its prompt, its sampling parameters and the output so far."""

    prompt: list[int]
    params: SamplingParams
    chunks: list[OutputChunk] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(c.text for c in self.chunks)

    @property
    def num_tokens(self) -> int:
        return sum(len(c.tokens) for c in self.chunks)

    @property
    def finish_reason(self) -> str | None:
        return self.chunks[-1].finish_reason if self.chunks else None


@dataclass
class GenerationRequest:
    """All sequences of one request, in the order of their choices (n per prompt)."""

    sequences: list[Choice]
    text_params: TextParams
    prompts: list[list[int]]
    reservation: SlotReservation
    prompt_only: bool = (
        False  # echo with max_tokens=0: returns the prompt only, without the token that the engine generates
    )

    def start(self, service: Service) -> AsyncGenerator[tuple[int, OutputChunk]]:
        return merge([service.generate(s.prompt, s.params, self.text_params, self.reservation) for s in self.sequences])

    def usage(self) -> dict[str, Any]:
        """Returns OpenAI's usage object. Each prompt counts once, however many choices it has."""
        prompt_tokens = sum(len(p) for p in self.prompts)
        completion_tokens = 0 if self.prompt_only else sum(s.num_tokens for s in self.sequences)
        choices_per_prompt = max(1, len(self.sequences) // len(self.prompts))
        cached_tokens = sum(c.cached_tokens for s in self.sequences[::choices_per_prompt] for c in s.chunks[:1])
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }
