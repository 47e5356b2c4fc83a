"""The engine of rank 0: requests in, events out, one step at a time. Knows the scheduler and the runner, but no
sockets.

The same object serves the loop (which feeds it from a socket) and the tests (which call it).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from rtp_llm.contract.engine_output import EngineOutput, Logprob
from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SampledToken, SamplingMetadata
from rtp_llm.contract.step import Step
from rtp_llm.engine.scheduler import ScheduledChunk, Scheduler
from rtp_llm.engine.step_builder import build_sampling_metadata, build_step, decodes_first


class StepExecutor(Protocol):
    """Rank 0's device work: see `runner.runner`."""

    def execute_and_sample(self, step: Step, sampling: SamplingMetadata) -> tuple[list[SampledToken], list[Logprob]]:
        """Chosen tokens for `sampling.rows`, and logprob records for `sampling.prompt_rows`."""
        ...


BroadcastStep = Callable[[Step], None]


class Engine:
    """Drives scheduler and runner; `publish` hands each step to the other ranks before rank 0 computes it."""

    def __init__(
        self, scheduler: Scheduler, runner: StepExecutor, max_seq_len: int, epoch: int, publish: BroadcastStep
    ):
        self.scheduler, self.runner, self.max_seq_len = scheduler, runner, max_seq_len
        self.epoch, self.broadcast = epoch, publish
        self.num_steps = 0
        self.last_step_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def add(self, request: Request) -> EngineOutput | None:
        """Queues a request. Returns its terminal event where there is nothing left to compute (a resumed request
        that was done).
        """
        reason = request.finish_reason(self.max_seq_len)
        if reason or request.num_tokens >= self.max_seq_len:
            return EngineOutput(request.id, finish=reason or "length")
        self.scheduler.add(request)
        return None

    def abort(self, request_id: str) -> EngineOutput | None:
        """Ends a request early; None where it had ended already."""
        found = self.scheduler.remove(request_id)
        return EngineOutput(request_id, finish="abort") if found else None

    def step(self) -> list[EngineOutput]:
        """Computes one step. Returns an event per request that got a token."""
        slices = decodes_first(self.scheduler.schedule())
        if not slices:
            return []
        self.num_steps += 1
        step = build_step(slices, self.scheduler.blocks.block_size, self.epoch, self.num_steps)
        self.last_step_tokens = step.num_tokens
        self.broadcast(step)
        sampling = build_sampling_metadata(slices)
        sampled, prompt_logprobs = self.runner.execute_and_sample(step, sampling)
        self.scheduler.update_after_step(slices)
        _assign_prompt_logprobs(slices, prompt_logprobs)
        return [self._apply_sample(request, result) for request, result in zip(sampling.requests, sampled, strict=True)]

    def _apply_sample(self, request: Request, result: SampledToken) -> EngineOutput:
        if result.token_id is None:
            self.scheduler.finish_invalid(request)
            return EngineOutput(request.id, finish="error", error="the model's logits are not numbers (NaN)")
        event = EngineOutput(
            request.id, tokens=[result.token_id], cached_tokens=request.cached_tokens, queue_ms=request.queue_ms
        )
        if result.logprob is not None:
            event.logprobs = [result.logprob]
        if request.prompt_logprobs:
            event.prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, []
        request.tokens.append(result.token_id)
        event.finish = request.finish_reason(self.max_seq_len)
        if event.finish:
            self.scheduler.finish(request)
        return event


def _assign_prompt_logprobs(slices: Sequence[ScheduledChunk], records: list[Logprob]) -> None:
    """Gives each request its share of the prompt logprobs, which come in the order of the slices."""
    rest = iter(records)
    for piece in slices:
        if piece.request.wants_prompt_logprobs:
            have = min(piece.num_tokens, piece.request.num_tokens - 1 - piece.start)
            piece.request.prompt_logprobs.extend(next(rest) for _ in range(have))
