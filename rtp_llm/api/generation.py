"""One request to an OpenAI endpoint while it is answered: its choices, and what they have produced so far."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from rtp_llm.api.service import OutputChunk, Service, SlotReservation, TextParams
from rtp_llm.api.stream import merge
from rtp_llm.contract.sampling_params import SamplingParams


@dataclass
class Choice:
    """One choice being generated."""

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
    def finish(self) -> str | None:
        return self.chunks[-1].finish if self.chunks else None


@dataclass
class GenerationRequest:
    """All sequences of one request, in the order of their choices; `prompts` counts distinct prompts."""

    sequences: list[Choice]
    text: TextParams
    prompts: list[list[int]]
    admission: SlotReservation
    prompt_only: bool = False  # echo with max_tokens=0: the token that is computed is not the client's

    def start(self, service: Service) -> AsyncGenerator[tuple[int, OutputChunk]]:
        return merge([service.generate(s.prompt, s.params, self.text, self.admission) for s in self.sequences])

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(p) for p in self.prompts)
        completion = 0 if self.prompt_only else sum(s.num_tokens for s in self.sequences)
        per_prompt = max(1, len(self.sequences) // len(self.prompts))
        cached = sum(c.cached_tokens for s in self.sequences[::per_prompt] for c in s.chunks[:1])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
