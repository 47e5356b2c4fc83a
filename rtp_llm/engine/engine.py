"""The engine of rank 0: requests in, events out, one step at a time. Knows the scheduler and the runner, but no
sockets.

The same object serves the loop (which feeds it from a socket) and the tests (which call it).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from rtp_llm.engine.request import Event, Logprob, Request
from rtp_llm.engine.sampling import Sampled, Sampling, plan_sampling
from rtp_llm.engine.scheduler import Scheduler, Slice
from rtp_llm.engine.step import Step, build_step, decodes_first


class StepRunner(Protocol):
    """Rank 0's device work: see `runner.runner`."""

    def run(self, step: Step, sampling: Sampling) -> tuple[list[Sampled], list[Logprob]]:
        """Chosen tokens for `sampling.rows`, and logprob records for `sampling.prompt_rows`."""
        ...


Publish = Callable[[Step], None]


class Engine:
    """Drives scheduler and runner; `publish` hands each step to the other ranks before rank 0 computes it."""

    def __init__(self, scheduler: Scheduler, runner: StepRunner, max_seq_len: int, epoch: int, publish: Publish):
        self.scheduler, self.runner, self.max_seq_len = scheduler, runner, max_seq_len
        self.epoch, self.publish = epoch, publish
        self.num_steps = 0
        self.last_step_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def add(self, request: Request) -> Event | None:
        """Queues a request. Returns its terminal event where there is nothing left to compute (a resumed request
        that was done).
        """
        reason = request.finish_reason(self.max_seq_len)
        if reason or request.num_tokens >= self.max_seq_len:
            return Event(request.id, finish=reason or "length")
        self.scheduler.add(request)
        return None

    def abort(self, request_id: str) -> Event | None:
        """Ends a request early; None where it had ended already."""
        found = self.scheduler.remove(request_id)
        return Event(request_id, finish="abort") if found else None

    def step(self) -> list[Event]:
        """Computes one step. Returns an event per request that got a token."""
        slices = decodes_first(self.scheduler.schedule())
        if not slices:
            return []
        self.num_steps += 1
        step = build_step(slices, self.scheduler.blocks.block_size, self.epoch, self.num_steps)
        self.last_step_tokens = step.num_tokens
        self.publish(step)
        sampling = plan_sampling(slices)
        sampled, prompt_logprobs = self.runner.run(step, sampling)
        self.scheduler.advance(slices)
        _hand_out(slices, prompt_logprobs)
        return [self._take(request, result) for request, result in zip(sampling.requests, sampled, strict=True)]

    def _take(self, request: Request, result: Sampled) -> Event:
        if result.token is None:
            self.scheduler.discard(request)
            return Event(request.id, finish="error", error="the model's logits are not numbers (NaN)")
        event = Event(request.id, tokens=[result.token], cached_tokens=request.cached_tokens, queue_ms=request.queue_ms)
        if result.logprob is not None:
            event.logprobs = [result.logprob]
        if request.prompt_logprobs:
            event.prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, []
        request.tokens.append(result.token)
        event.finish = request.finish_reason(self.max_seq_len)
        if event.finish:
            self.scheduler.finish(request)
        return event


def _hand_out(slices: Sequence[Slice], records: list[Logprob]) -> None:
    """Gives each request its share of the prompt logprobs, which come in the order of the slices."""
    rest = iter(records)
    for piece in slices:
        if piece.request.wants_prompt_logprobs:
            have = min(piece.count, piece.request.num_tokens - 1 - piece.start)
            piece.request.prompt_logprobs.extend(next(rest) for _ in range(have))
