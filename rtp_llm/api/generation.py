"""A generation request: its choices and their output so far."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from starlette.requests import Request

from rtp_llm.api.params import StopWords, text_params
from rtp_llm.api.schema import OpenAIRequest
from rtp_llm.api.service import Service, SlotReservation
from rtp_llm.api.stream import cancel_on_disconnect, merge
from rtp_llm.api.text_stream import OutputChunk, TextParams
from rtp_llm.contract.sampling_params import SamplingParams


@dataclass
class Choice:
    """One entry of `choices` in the response: one sequence, with its prompt, sampling parameters and output so far."""

    prompt: list[int]
    params: SamplingParams
    chunks: list[OutputChunk] = field(default_factory=list)
    num_reasoning_tokens: int = 0

    def add(self, chunk: OutputChunk) -> None:
        self.chunks.append(chunk)

    @property
    def text(self) -> str:
        return "".join(c.text for c in self.chunks)

    @property
    def num_tokens(self) -> int:
        return sum(len(c.tokens) for c in self.chunks)

    @property
    def finish_reason(self) -> str | None:
        return self.chunks[-1].finish_reason if self.chunks else None


AnyChoice = TypeVar("AnyChoice", bound=Choice)


@dataclass
class GenerationRequest(Generic[AnyChoice]):
    """All sequences of one request, in the order of their choices (n per prompt)."""

    sequences: list[AnyChoice]
    text_params: TextParams
    prompts: list[list[int]]
    reservation: SlotReservation
    prompt_only: bool = False  # echo with max_tokens=0: the prompt alone, without the token that the engine generates

    async def run(self, service: Service) -> AsyncGenerator[tuple[int, OutputChunk]]:
        """Generates all choices at the same time. Yields (index of the choice, chunk of its output) as chunks arrive,
        each after it has been added to its choice.
        """
        text, slots = self.text_params, self.reservation
        async with aclosing(
            merge([service.generate(s.prompt, s.params, text, slots) for s in self.sequences])
        ) as chunks:
            async for index, chunk in chunks:
                self.sequences[index].add(chunk)
                yield index, chunk

    async def collect(self, request: Request, service: Service) -> None:
        """Generates all choices to their end; their output is in `sequences` then. Raises ClientDisconnected if the
        client disconnects.
        """

        async def run() -> None:
            async with aclosing(self.run(service)) as chunks:
                async for _ in chunks:
                    pass

        await cancel_on_disconnect(request, run(), self.reservation)

    def usage(self) -> dict[str, Any]:
        """Returns OpenAI's `usage` object. Each prompt counts once, however many choices it has."""
        prompt_tokens = sum(len(p) for p in self.prompts)
        completion_tokens = 0 if self.prompt_only else sum(s.num_tokens for s in self.sequences)
        choices_per_prompt = max(1, len(self.sequences) // len(self.prompts))
        cached_tokens = sum(c.cached_tokens for s in self.sequences[::choices_per_prompt] for c in s.chunks[:1])
        usage: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }
        if reasoning_tokens := sum(s.num_reasoning_tokens for s in self.sequences):
            usage["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
        return usage


def make_generation(
    make_choice: Callable[[list[int], SamplingParams], AnyChoice],
    service: Service,
    stop_words: StopWords,
    body: OpenAIRequest,
    prompts: list[list[int]],
    params: Sequence[SamplingParams],
) -> GenerationRequest[AnyChoice]:
    """Returns the generation of a request with `body.n` choices (sequences) per prompt, each with its own seed. It has
    reserved a slot for each sequence, and starts with `run` or `collect`.

    params  sampling parameters of each prompt

    Raises RequestError 429 if too few slots are free, 400 if the server has fewer in total, 503 if it is stopping.
    """
    n = body.n or 1
    choices = [
        make_choice(prompt, replace(prompt_params, seed=prompt_params.seed + i))
        for prompt, prompt_params in zip(prompts, params, strict=True)
        for i in range(n)
    ]
    text = text_params(body, stop_words)
    reservation = service.admit(len(choices))  # last: after an error the slots would stay reserved
    service.metrics.params_n.observe(n)
    return GenerationRequest(choices, text, prompts, reservation)
