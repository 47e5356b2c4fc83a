"""The client of the engines (the scheduler loops on rank 0 of each group), and the sequences in flight.

Accepted sequences survive the loss of the engine: the client keeps their prompts and output tokens, and submits both
again after the restart of the ranks, which begins a new epoch. Sampling is a function of (seed, position), so the
continuation is the same.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtp_llm.api.engine_connection import EngineConnection
from rtp_llm.contract.engine_info import EngineInfo
from rtp_llm.contract.engine_output import EngineOutput
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.errors import RequestError, engine_gone, execution_failed
from rtp_llm.metrics import Metrics
from rtp_llm.parallel.wire import FrameType

log = logging.getLogger(__name__)

MAX_ENGINE_LOSSES = 3


@dataclass(eq=False)
class InFlightSequence:
    """One accepted sequence."""

    id: str
    prompt: list[int]
    params: SamplingParams
    engine: EngineConnection
    output_tokens: list[int] = field(default_factory=list)
    outputs: asyncio.Queue[EngineOutput | RequestError] = field(default_factory=asyncio.Queue)
    engine_losses: int = 0  # how often the engine was lost while the sequence was in flight

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "prompt": self.prompt, "output": self.output_tokens, "params": self.params.to_json()}


class EngineClient:
    """The sequences in flight, each with the engine that runs it: one engine per data-parallel group.

    paths           of the engines' sockets
    resume_timeout  seconds that sequences wait for a lost engine
    """

    def __init__(self, paths: Sequence[Path], metrics: Metrics, resume_timeout: float):
        self._metrics, self._resume_timeout = metrics, resume_timeout
        self._engines = [EngineConnection(path, self) for path in paths]
        self._in_flight: dict[str, InFlightSequence] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._draining = False
        metrics.set_deferred_function(lambda: sum(not s.engine.is_connected for s in self._in_flight.values()))

    @property
    def is_connected(self) -> bool:
        """True once all engines have sent READY on their current connections."""
        return all(engine.is_connected for engine in self._engines)

    @property
    def info(self) -> EngineInfo | None:
        """Returns what is equal for all engines, from the first one; None before it was ready once."""
        return self._engines[0].info

    @property
    def stats(self) -> dict[str, Any]:
        """Returns the statistics after the last step, summed over engines; empty without an engine."""
        all_stats = [engine.stats for engine in self._engines if engine.stats]
        return {name: sum(stats[name] for stats in all_stats) for name in all_stats[0]} if all_stats else {}

    @property
    def is_draining(self) -> bool:
        """True while the server stops: accepted sequences may finish, new ones are rejected."""
        return self._draining

    @property
    def num_in_flight(self) -> int:
        """Number of sequences that are accepted and not finished."""
        return len(self._in_flight)

    def start(self) -> None:
        self._tasks = [asyncio.create_task(engine.stay_connected(), name="engine") for engine in self._engines]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _sequences_of(self, engine: EngineConnection) -> list[InFlightSequence]:
        return [sequence for sequence in self._in_flight.values() if sequence.engine is engine]

    def _choose_engine(self) -> EngineConnection:
        """Returns the connected engine that runs the fewest sequences."""
        return min(self._engines, key=lambda engine: (not engine.is_connected, len(self._sequences_of(engine))))

    async def generate(
        self, request_id: str, prompt: list[int], params: SamplingParams
    ) -> AsyncGenerator[EngineOutput]:
        """Yields the outputs of one sequence until it finishes. Closing the iterator early aborts the sequence.

        Raises RequestError 503 if a lost engine does not return in time, 500 if the sequence itself fails.
        """
        sequence = InFlightSequence(request_id, prompt, params, self._choose_engine())
        self._in_flight[request_id] = sequence
        try:
            sequence.engine.send(FrameType.SUBMIT, sequence.to_json())
            while True:
                output = await sequence.outputs.get()
                if isinstance(output, RequestError):
                    raise output
                yield output
                if output.finish:
                    return
        finally:
            if self._in_flight.pop(request_id, None):
                sequence.engine.send(FrameType.ABORT, {"id": request_id})

    def on_ready(self, engine: EngineConnection, info: EngineInfo, previous: EngineInfo | None) -> None:
        if previous is None:
            log.info("the engine is ready: requests are served")
        if previous is None or previous.epoch != info.epoch:
            self._metrics.start_epoch(info.block_size, info.num_blocks, info.prefix_caching)
        sequences = self._sequences_of(engine)
        if sequences:
            log.info("the engine is back, epoch %d: submitting %d sequences again", info.epoch, len(sequences))
            self._metrics.resumed.inc(sum(1 for sequence in sequences if sequence.engine_losses))
        for sequence in sequences:
            engine.send(FrameType.SUBMIT, sequence.to_json())

    def on_outputs(self, engine: EngineConnection, outputs: list[EngineOutput]) -> None:
        if engine.info:
            self._metrics.record_step(self.stats, engine.info.block_size, engine.info.num_blocks)
        for output in outputs:
            sequence = self._in_flight.get(output.request_id)
            if sequence is None:
                continue  # aborted, but the engine has not received the abort yet
            sequence.output_tokens += output.tokens
            if output.finish == "error":
                self._metrics.corrupted.inc()
                self._fail(sequence, execution_failed(output.error))
                continue
            if output.finish:
                del self._in_flight[output.request_id]
            sequence.outputs.put_nowait(output)

    def on_lost(self, engine: EngineConnection, reason: object) -> None:
        """Keeps the sequences in flight, to submit them again when the engine returns.

        Fails those that were in flight at MAX_ENGINE_LOSSES losses, since they may cause the crashes.
        """
        sequences = self._sequences_of(engine)
        log.warning(
            "lost the engine: %s; %d sequences wait for it, %d of them were in its last step",
            reason,
            len(sequences),
            sum(sequence.id in engine.launched_ids for sequence in sequences),
        )
        self._metrics.reset_engine_gauges()
        for sequence in sequences:
            sequence.engine_losses += 1
            if sequence.engine_losses >= MAX_ENGINE_LOSSES:
                message = f"the engine was lost {sequence.engine_losses} times while it ran this request"
                self._fail(sequence, engine_gone(message))
        if self._draining:
            self.fail_all("the server is stopping")

    def drain(self, seconds: float) -> None:
        """Starts draining: new sequences are rejected. Fails the sequences that are still in flight after `seconds`, or
        at once if no engine is connected.
        """
        self._draining = True
        loop = asyncio.get_running_loop()
        loop.call_later(max(0.0, seconds), self.fail_all, "the server is stopping")
        if not self.is_connected:
            self.fail_all("the server is stopping")

    def fail_all(self, reason: str) -> None:
        for sequence in list(self._in_flight.values()):
            self._fail(sequence, engine_gone(reason))

    def _fail(self, sequence: InFlightSequence, error: RequestError) -> None:
        if self._in_flight.pop(sequence.id, None):
            sequence.engine.send(FrameType.ABORT, {"id": sequence.id})
        sequence.outputs.put_nowait(error)

    def on_absent(self, engine: EngineConnection) -> None:
        """Fails the sequences of an engine that has been lost for longer than `resume_timeout`."""
        sequences = self._sequences_of(engine)
        if sequences and time.monotonic() - engine.lost_at > self._resume_timeout:
            log.error(
                "no engine for %.0f s (RESUME_TIMEOUT): failing %d sequences", self._resume_timeout, len(sequences)
            )
            for sequence in sequences:
                self._fail(sequence, engine_gone(f"the engine did not come back within {self._resume_timeout:.0f} s"))
