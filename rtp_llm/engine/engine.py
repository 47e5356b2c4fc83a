"""The engine of rank 0: requests in, outputs out, one step at a time. Uses scheduler and runner, but no sockets, so
that the leader loop and the tests can use the same object.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from rtp_llm.contract.engine_output import EngineOutput, Logprob
from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SampledToken, SamplingMetadata
from rtp_llm.contract.step import Step
from rtp_llm.engine.scheduler import ScheduledChunk, Scheduler
from rtp_llm.engine.step_builder import build_sampling_metadata, build_step, sort_decodes_first


class StepExecutor(Protocol):
    """Interface of `runner.model_runner.ModelRunner` as the engine uses it."""

    def execute_and_sample(
        self, step: Step, sampling_metadata: SamplingMetadata
    ) -> tuple[list[SampledToken], list[Logprob]]:
        """Computes a step and samples from its logits.

        Returns a token per entry of `sampling_metadata.logits_rows`, and a logprob per entry of
        `sampling_metadata.prompt_logits_rows`.
        """
        ...


BroadcastStep = Callable[[Step], None]


class Engine:
    """Runs scheduler and runner. `broadcast` sends each step to the other ranks before rank 0 computes it."""

    def __init__(
        self, scheduler: Scheduler, runner: StepExecutor, max_seq_len: int, epoch: int, broadcast: BroadcastStep
    ):
        self.scheduler, self.runner, self.max_seq_len = scheduler, runner, max_seq_len
        self.epoch, self.broadcast = epoch, broadcast
        self.num_steps = 0
        self.last_step_tokens = 0

    @property
    def has_work(self) -> bool:
        """Returns whether any request is waiting or running."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def add(self, request: Request) -> EngineOutput | None:
        """Queues a request and returns None.

        If no token is left to generate, returns the request's final output instead. This happens if the ranks restarted
        after the request's last token.
        """
        reason = request.finish_reason(self.max_seq_len)
        if reason or request.num_tokens >= self.max_seq_len:
            return EngineOutput(request.id, finish=reason or "length")
        self.scheduler.add(request)
        return None

    def abort(self, request_id: str) -> EngineOutput | None:
        """Ends a request early. Returns its final output, or None if it has ended already."""
        request = self.scheduler.remove(request_id)
        return EngineOutput(request_id, finish="abort") if request else None

    def step(self) -> list[EngineOutput]:
        """Computes one step. Returns an output per request that got a token or failed."""
        chunks = sort_decodes_first(self.scheduler.schedule())
        if not chunks:
            return []
        self.num_steps += 1
        step = build_step(chunks, self.scheduler.blocks.block_size, self.epoch, self.num_steps)
        self.last_step_tokens = step.num_tokens
        self.broadcast(step)
        sampling_metadata = build_sampling_metadata(chunks)
        sampled_tokens, prompt_logprobs = self.runner.execute_and_sample(step, sampling_metadata)
        self.scheduler.update_after_step(chunks)
        _assign_prompt_logprobs(chunks, prompt_logprobs)
        return [
            self._apply_sample(request, sampled)
            for request, sampled in zip(sampling_metadata.requests, sampled_tokens, strict=True)
        ]

    def _apply_sample(self, request: Request, sampled: SampledToken) -> EngineOutput:
        if sampled.token_id is None:
            self.scheduler.finish_invalid(request)
            return EngineOutput(request.id, finish="error", error="the model's logits contain NaN")
        output = EngineOutput(
            request.id, tokens=[sampled.token_id], cached_tokens=request.cached_tokens, queue_ms=request.queue_ms
        )
        if sampled.logprob is not None:
            output.logprobs = [sampled.logprob]
        if request.prompt_logprobs:
            output.prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, []
        request.tokens.append(sampled.token_id)
        output.finish = request.finish_reason(self.max_seq_len)
        if output.finish:
            self.scheduler.finish(request)
        return output


def _assign_prompt_logprobs(chunks: Sequence[ScheduledChunk], logprobs: list[Logprob]) -> None:
    """Appends the prompt logprobs of a step to the requests. `logprobs` has the order of `chunks`."""
    remaining = iter(logprobs)
    for chunk in chunks:
        if chunk.request.wants_prompt_logprobs:
            num_logprobs = min(chunk.num_tokens, chunk.request.num_tokens - 1 - chunk.start)
            chunk.request.prompt_logprobs.extend(next(remaining) for _ in range(num_logprobs))
