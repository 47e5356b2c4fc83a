"""The engine of rank 0: turns requests into outputs, one step at a time. Uses the scheduler and the model runner, but
no sockets, so that the leader loop and the tests can use the same class.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from rtp_llm.contract.engine_output import EngineOutput, Logprob
from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SamplingMetadata, StepResult
from rtp_llm.contract.step import Step
from rtp_llm.engine.grammar_compiler import GrammarCompiler
from rtp_llm.engine.scheduler import Scheduler
from rtp_llm.engine.scheduler_output import RequestUpdate, ScheduledChunk, SchedulerOutput
from rtp_llm.engine.step_builder import build_sampling_metadata, build_step

COMPILE_POLL_SECONDS = 0.005  # that an engine without other work waits for a grammar


class StepExecutor(Protocol):
    """Interface of what computes the engine's steps on rank 0: the methods of `ModelRunner` that `Engine` calls."""

    def prepare(self, step: Step) -> Any:
        """Applies a step to this rank's table of sequences. Returns the arrays that `execute` needs. Every rank has
        such a table and applies the same steps: the ranks compare `digest()` of these arrays to notice if one differs.
        """
        ...

    def execute(self, inputs: Any, sampling_metadata: SamplingMetadata) -> StepResult:
        """Computes the step whose arrays `prepare` returned, and samples its tokens. Returns when the device has
        finished.
        """
        ...


@dataclass(frozen=True)
class EngineCallbacks:
    """Functions that the engine calls before rank 0 computes a step, for communication with other processes.

    broadcast: sends the step to the other ranks.
    on_launch: gets the ids of the requests in this step and in the unfinished steps before it.
    """

    broadcast: Callable[[Step], None] = lambda step: None
    on_launch: Callable[[set[str]], None] = lambda request_ids: None


@dataclass(frozen=True)
class LaunchedStep:
    """A step that was started and whose result is not processed yet.

    result: returns the result and the time.perf_counter() at the step's end; waits for it if necessary.
    start: time.perf_counter() when the scheduling of the step began.
    """

    output: SchedulerOutput
    result: Callable[[], tuple[StepResult, float]]
    start: float


class Engine:
    """Schedules and executes steps, on rank 0. A request here is one sequence; the API process splits a request with n
    > 1.

    With a pipeline depth of 1, a thread computes a step while the engine processes the result of the previous step and
    schedules the next one. With 0, each step is computed and processed before the next one is scheduled.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepExecutor,
        max_seq_len: int,
        epoch: int,
        callbacks: EngineCallbacks | None = None,
        pipeline_depth: int = 0,
        compiler: GrammarCompiler | None = None,
    ):
        """`compiler`: compiles the requests' grammars; without one, no request may have a grammar."""
        self.scheduler, self.runner, self.max_seq_len, self.epoch = scheduler, runner, max_seq_len, epoch
        self.callbacks, self.pipeline_depth = callbacks or EngineCallbacks(), pipeline_depth
        self.compiler = compiler
        self.num_steps = 0
        self.is_stalled = False  # nothing can be computed until the host has more memory
        self.last_step_tokens = 0
        self._launched: deque[LaunchedStep] = deque()
        self._last_end = 0.0  # time.perf_counter() when the last step that was processed had its result
        self._thread = ThreadPoolExecutor(1, "step") if pipeline_depth else None

    def close(self) -> None:
        """Waits for the step that the thread computes and drops later ones. Abort the communicator first, so that this
        does not wait forever.
        """
        if self._thread:
            self._thread.shutdown(cancel_futures=True)

    @property
    def has_work(self) -> bool:
        """Returns whether any request waits or runs, or the result of a step is not processed yet."""
        return self._has_steps or self._is_compiling

    @property
    def num_waiting(self) -> int:
        """Returns the current number of requests that have not started or were preempted, including those whose grammar
        is being compiled.
        """
        return len(self.scheduler.waiting) + (self.compiler.num_waiting if self.compiler else 0)

    @property
    def _has_steps(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running or self._launched)

    @property
    def _is_compiling(self) -> bool:
        return bool(self.compiler and self.compiler.is_busy)

    @property
    def _is_still_stalled(self) -> bool:
        """Returns whether the next request would wait as the last one did, which has been ended or aborted."""
        return self.is_stalled and not self.scheduler.kv_cache_manager.pool.num_free

    def add(self, request: Request) -> EngineOutput | None:
        """Queues a request, which is one sequence, and returns None.

        If the request has no token left to generate (a resumed request that was complete), returns its final output
        instead.
        """
        reason = request.finish_reason(self.max_seq_len)
        if reason or request.num_tokens >= self.max_seq_len:
            return EngineOutput(request.id, finish=reason or "length")
        if request.params.grammar:
            assert self.compiler, "only an engine without a server has none"
            self.compiler.add(request)
        else:
            self.scheduler.add(request)
        return None

    def abort(self, request_id: str) -> EngineOutput | None:
        """Ends a request early. Returns its final output, or None if it has ended already."""
        request = self.scheduler.remove(request_id) or (self.compiler and self.compiler.remove(request_id))
        return EngineOutput(request_id, finish="abort") if request else None

    def step(self) -> list[EngineOutput]:
        """Launches the next step, if any. Then processes the result of the oldest step in flight, if the maximum number
        is in flight or nothing could be launched.

        Returns one output per request that got tokens or failed.
        """
        self.last_step_tokens = 0
        unfit = self._start_compiled()
        return unfit or self._step()

    def _start_compiled(self) -> list[EngineOutput]:
        """Queues the requests whose grammars have been compiled. Returns the outputs of those with an error."""
        if not self.compiler or not self.compiler.is_busy:
            return []
        requests = self.compiler.take_compiled(0 if self._has_steps else COMPILE_POLL_SECONDS)
        for request in requests:
            if not request.error:
                self.scheduler.add(request)
        return [_make_unfit(request) for request in requests if request.error]

    def _step(self) -> list[EngineOutput]:
        start = time.perf_counter()
        output = self.scheduler.schedule()
        if output.starved:
            return [_make_starved(request) for request in output.starved]
        is_idle = not output.chunks and not self._launched and not self._is_compiling
        self.is_stalled = is_idle and (bool(self.scheduler.waiting) or self._is_still_stalled)
        if output.chunks:
            self._launch(output, start)
        if self._launched and (len(self._launched) > self.pipeline_depth or not output.chunks):
            return self._process(self._launched.popleft())
        return []

    def _launch(self, output: SchedulerOutput, start: float) -> None:
        self.num_steps += 1
        step = build_step(output, self.epoch, self.num_steps)
        inputs = self.runner.prepare(step)
        outputs = (output, *(launched.output for launched in self._launched))
        self.callbacks.on_launch({chunk.request.id for output in outputs for chunk in output.chunks})
        self.callbacks.broadcast(replace(step, digest=inputs.digest()))
        execute = partial(self._execute, inputs, build_sampling_metadata(output.chunks))
        result = self._thread.submit(execute).result if self._thread else execute
        self._launched.append(LaunchedStep(output, result, start))

    def _execute(self, inputs: Any, sampling_metadata: SamplingMetadata) -> tuple[StepResult, float]:
        return self.runner.execute(inputs, sampling_metadata), time.perf_counter()

    def _process(self, launched: LaunchedStep) -> list[EngineOutput]:
        chunks, (result, end) = launched.output.chunks, launched.result()
        # A step that is scheduled ahead waits for the one before.
        self.scheduler.record_seconds(launched.output, end - max(launched.start, self._last_end))
        self._last_end = end
        self.last_step_tokens = launched.output.num_tokens
        _assign_prompt_logprobs(chunks, result.prompt_logprobs)
        updates = self.scheduler.update(launched.output, [None if t.failed else t.token_ids for t in result.tokens])
        sampled, hidden_states = iter(result.tokens), iter(result.hidden_states)
        outputs = []
        for update in updates:
            if update.request.params.pooling:
                output = _make_output(update, hidden_state=next(hidden_states))
            else:
                output = _make_output(update, logprobs=next(sampled).logprobs[: len(update.tokens)])
            if output.tokens or output.finish:  # else the request had ended before
                outputs.append(output)
        return outputs


def _make_output(update: RequestUpdate, logprobs: Sequence[Logprob] = (), hidden_state: bytes = b"") -> EngineOutput:
    request = update.request
    if update.finish == "error":
        if request.error:
            return _make_unfit(request)
        message = "the model's logits contain NaN or infinity"
        if request.params.allowed_token_ids or request.params.bad_words:
            message += ", or the request allows no token to follow (allowed_token_ids, bad_words, min_tokens, grammar)"
        return EngineOutput(request.id, finish="error", error=message)
    output = EngineOutput(
        request.id,
        tokens=update.tokens,
        logprobs=list(logprobs),
        finish=update.finish,
        cached_tokens=request.cached_tokens,
        queue_ms=request.queue_ms,
        hidden_state=hidden_state,
    )
    if request.prompt_logprobs:
        output.prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, []
    return output


def _make_unfit(request: Request) -> EngineOutput:
    return EngineOutput(request.id, finish="invalid", error=f"the grammar cannot be used: {request.error}")


def _make_starved(request: Request) -> EngineOutput:
    message = (
        f"the host has too little memory for the KV cache of this request ({request.num_tokens} tokens):"
        " send a shorter one, or try again later"
    )
    return EngineOutput(request.id, finish="out_of_memory", error=message)


def _assign_prompt_logprobs(chunks: Sequence[ScheduledChunk], logprobs: Sequence[Logprob]) -> None:
    """Appends the prompt logprobs of a step, in the order of its chunks, to their requests."""
    remaining = iter(logprobs)
    for chunk in chunks:
        chunk.request.prompt_logprobs.extend(next(remaining) for _ in range(chunk.num_prompt_logprobs))
