"""The client of the engines (the scheduler loops on rank 0 of each group), and the sequences in flight.

Accepted sequences survive the loss of the engine: the client keeps their prompts and output tokens and resubmits both
after the ranks have restarted, in the next epoch. Sampling is a function of (seed, position), so the continuation is
the same. In the same way, the client aborts a sequence in the engine and resubmits it later while another sequence is
tested for crashing the engine (`api.suspects`), or while its HTTP client reads the output too slowly.
"""

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rtp_llm.api.engine_connection import EngineConnection
from rtp_llm.api.suspects import SuspectTracker, Verdict
from rtp_llm.contract.engine_info import EngineInfo
from rtp_llm.contract.engine_output import EngineOutput
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.errors import RequestError, engine_gone, execution_failed, invalid_params, out_of_memory
from rtp_llm.metrics import Metrics
from rtp_llm.parallel.wire import FrameType

log = logging.getLogger(__name__)

# Outputs that a sequence keeps for a slow reader before it is held, and with how many it runs again.
MAX_UNREAD_OUTPUTS, RESUME_UNREAD_OUTPUTS = 256, 64


@dataclass(eq=False)
class InFlightSequence:
    """One accepted sequence (a request has n of them per prompt) that has not finished, with its output so far."""

    id: str
    prompt: list[int]
    params: SamplingParams
    engine: EngineConnection
    output_tokens: list[int] = field(default_factory=list)
    outputs: asyncio.Queue[EngineOutput | RequestError] = field(default_factory=asyncio.Queue)
    is_submitted: bool = False  # to the connected engine
    was_lost: bool = False  # with an engine, and not submitted to the next one yet
    is_unread: bool = False  # held until its reader has caught up
    submissions: int = 0  # that were withdrawn; each has an id of its own, as outputs of the last may still arrive

    @property
    def submission_id(self) -> str:
        return f"{self.id}.{self.submissions}" if self.submissions else self.id

    @cached_property
    def fingerprint(self) -> str:
        """Returns a digest of the prompt and the sampling parameters, which is equal for repetitions of a request.
        Leaves out the seed, which is random unless the client sets it.
        """
        content = json.dumps([self.prompt, {**self.params.to_json(), "seed": 0}], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.submission_id,
            "prompt": self.prompt,
            "output": self.output_tokens,
            "params": self.params.to_json(),
        }


class EngineClient:
    """The sequences in flight and the engines that run them. There is one engine per data-parallel group.

    paths           unix sockets of the engines
    resume_timeout  seconds that sequences wait for a lost engine
    verdicts_path   file that records, for each time that the engine was lost, whether a request or the engine caused it
    """

    def __init__(self, paths: Sequence[Path], metrics: Metrics, resume_timeout: float, verdicts_path: Path):
        self._metrics, self._resume_timeout, self._verdicts_path = metrics, resume_timeout, verdicts_path
        self._engines = [EngineConnection(path, self) for path in paths]
        self._suspects = {engine: SuspectTracker[InFlightSequence]() for engine in self._engines}
        self._written_verdicts: dict[int, Verdict] | None = None  # those of a process before are void
        self._in_flight: dict[str, InFlightSequence] = {}  # by submission id
        self._tasks: list[asyncio.Task[None]] = []
        self._draining = False
        metrics.set_deferred_function(
            lambda: sum(not (s.engine.is_connected and self._suspects[s.engine].may_run(s)) for s in self._sequences())
        )

    @property
    def is_connected(self) -> bool:
        """True once each engine has sent READY, its first frame, on its current connection."""
        return all(engine.is_connected for engine in self._engines)

    @property
    def info(self) -> EngineInfo | None:
        """Returns properties of the model and the KV cache, the same for all engines: those in the first engine's READY
        frame, even after it is lost; None before its first READY.
        """
        return self._engines[0].info

    @property
    def stats(self) -> dict[str, Any]:
        """Returns the fields of `contract.engine_events.EngineStats` (requests, KV blocks, totals of steps and tokens)
        after each engine's last step, summed over the engines; empty if no engine has reported any.
        """
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

    async def generate(
        self, request_id: str, prompt: list[int], params: SamplingParams
    ) -> AsyncGenerator[EngineOutput]:
        """Yields the outputs of one sequence until it finishes. Closing the iterator early aborts the sequence.

        Raises RequestError 503 if a lost engine does not reconnect within `resume_timeout` or the server stops, 400 if
        the engine rejects the parameters, 500 if the sequence itself fails or makes the engine crash.
        """
        sequence = InFlightSequence(request_id, prompt, params, self._choose_engine())
        if self._suspects[sequence.engine].is_known_culprit(sequence, time.monotonic()):
            raise _crashes_engine()
        self._accept(sequence)
        try:
            while True:
                output = await sequence.outputs.get()
                if isinstance(output, RequestError):
                    raise output
                yield output
                if output.finish:
                    return
                self._on_read(sequence)
        finally:
            self._end(sequence)

    # What the engine does

    def on_ready(self, engine: EngineConnection, info: EngineInfo, previous: EngineInfo | None) -> None:
        if previous is None:
            log.info("the engine is ready: requests are served")
        if previous is None or previous.epoch != info.epoch:
            self._metrics.start_epoch(info.block_size, info.num_blocks, info.prefix_caching)
        self._reconcile(engine)
        sequences = self._sequences(engine)
        if sequences:
            num_submitted = sum(sequence.is_submitted for sequence in sequences)
            log.info(
                "the engine is back in epoch %d (starts of the gang so far): resumed %d of the %d unfinished sequences",
                info.epoch,
                num_submitted,
                len(sequences),
            )

    def on_outputs(self, engine: EngineConnection, outputs: list[EngineOutput]) -> None:
        if engine.info:
            self._metrics.record_step(self.stats, engine.info.block_size, engine.info.num_blocks)
        known = [(s, output) for output in outputs if (s := self._in_flight.get(output.request_id))]
        suspects = self._suspects[engine]
        was_investigating = suspects.is_investigating
        suspects.on_step([sequence for sequence, _ in known])
        for sequence, output in known:
            sequence.output_tokens += output.tokens
            if output.finish == "out_of_memory":
                self._fail(sequence, out_of_memory(output.error))
                continue
            if output.finish == "invalid":
                self._fail(sequence, invalid_params(output.error))
                continue
            if output.finish == "error":
                self._metrics.corrupted.inc()
                self._fail(sequence, execution_failed(output.error))
                continue
            sequence.outputs.put_nowait(output)
            if output.finish:
                sequence.is_submitted = False
                self._forget(sequence)
            elif sequence.outputs.qsize() >= MAX_UNREAD_OUTPUTS and not was_investigating:
                sequence.is_unread = True
                self._withdraw(sequence)
        if was_investigating:
            self._reconcile(engine)
        self._write_verdicts()

    def on_lost(self, engine: EngineConnection, reason: object) -> None:
        """Handles the end of the connection to an engine, usually because a rank failed: keeps the engine's sequences,
        to submit them again when it reconnects. `reason`: for the log.

        Fails a sequence that is found to have crashed the engine, and all sequences while the server is stopping.
        """
        sequences = self._sequences(engine)
        launched = [sequence for sequence in sequences if sequence.submission_id in engine.launched_ids]
        log.warning(
            "lost the engine: %s; %d sequences wait for it, %d of them were in its last step",
            reason,
            len(sequences),
            len(launched),
        )
        self._metrics.reset_engine_gauges()
        for sequence in sequences:
            sequence.was_lost |= sequence.is_submitted
            sequence.is_submitted = False
        assert engine.info  # only an engine that was ready can be lost
        culprit = self._suspects[engine].on_lost(engine.info.epoch, launched, time.monotonic())
        if culprit:
            self._metrics.convicted.inc()
            for sequence in sequences:
                if sequence.fingerprint == culprit.fingerprint:
                    self._fail(sequence, _crashes_engine())
        self._write_verdicts()
        if self._draining:
            self.fail_all("the server is stopping")

    def on_absent(self, engine: EngineConnection) -> None:
        """Fails the sequences of an engine that has been lost for longer than `resume_timeout`."""
        sequences = self._sequences(engine)
        if sequences and time.monotonic() - engine.lost_at > self._resume_timeout:
            log.error(
                "no engine for %.0f s, the maximum (RESUME_TIMEOUT): failing the %d sequences that wait for it",
                self._resume_timeout,
                len(sequences),
            )
            for sequence in sequences:
                self._fail(sequence, engine_gone(f"the engine did not come back within {self._resume_timeout:.0f} s"))

    # The end of the server

    def drain(self, seconds: float) -> None:
        """Rejects new sequences. Fails those that remain after `seconds`, or at once if no engine is connected."""
        self._draining = True
        loop = asyncio.get_running_loop()
        loop.call_later(max(0.0, seconds), self.fail_all, "the server is stopping")
        if not self.is_connected:
            self.fail_all("the server is stopping")

    def fail_all(self, reason: str) -> None:
        for sequence in self._sequences():
            self._fail(sequence, engine_gone(reason))

    # The sequences in flight

    def _sequences(self, engine: EngineConnection | None = None) -> list[InFlightSequence]:
        """Returns the sequences of an engine, or of all."""
        return [sequence for sequence in list(self._in_flight.values()) if engine in (None, sequence.engine)]

    def _choose_engine(self) -> EngineConnection:
        """Returns the connected engine that runs the fewest sequences."""
        return min(self._engines, key=lambda engine: (not engine.is_connected, len(self._sequences(engine))))

    def _accept(self, sequence: InFlightSequence) -> None:
        self._in_flight[sequence.submission_id] = sequence
        self._suspects[sequence.engine].add(sequence)
        if self._may_run(sequence):
            self._submit(sequence)

    def _end(self, sequence: InFlightSequence) -> None:
        """Aborts a sequence unless it has ended. If it was on trial, other sequences may run now."""
        was_investigating = self._suspects[sequence.engine].is_investigating
        self._forget(sequence)
        if was_investigating:
            self._reconcile(sequence.engine)
            self._write_verdicts()

    def _forget(self, sequence: InFlightSequence) -> None:
        if self._in_flight.pop(sequence.submission_id, None):
            self._suspects[sequence.engine].remove(sequence)
            if sequence.is_submitted:
                sequence.engine.send(FrameType.ABORT, {"id": sequence.submission_id})

    def _fail(self, sequence: InFlightSequence, error: RequestError) -> None:
        self._forget(sequence)
        sequence.outputs.put_nowait(error)

    def _may_run(self, sequence: InFlightSequence) -> bool:
        can_run = sequence.engine.is_connected and not sequence.is_unread
        return can_run and self._suspects[sequence.engine].may_run(sequence)

    def _reconcile(self, engine: EngineConnection) -> None:
        """Submits the sequences that may run to the engine, and withdraws the others."""
        sequences = self._sequences(engine)
        for sequence in sequences:
            if sequence.is_submitted and not self._may_run(sequence):
                self._withdraw(sequence)
        for sequence in sequences:
            if not sequence.is_submitted and self._may_run(sequence):
                self._submit(sequence)

    def _submit(self, sequence: InFlightSequence) -> None:
        sequence.engine.send(FrameType.SUBMIT, sequence.to_json())
        sequence.is_submitted = True
        self._metrics.resumed.inc(sequence.was_lost)
        sequence.was_lost = False

    def _withdraw(self, sequence: InFlightSequence) -> None:
        """Aborts a sequence in the engine, but keeps it in flight."""
        sequence.engine.send(FrameType.ABORT, {"id": sequence.submission_id})
        del self._in_flight[sequence.submission_id]
        sequence.is_submitted = False
        sequence.submissions += 1
        self._in_flight[sequence.submission_id] = sequence

    def _on_read(self, sequence: InFlightSequence) -> None:
        """Resumes a sequence whose reader has caught up."""
        if sequence.is_unread and sequence.outputs.qsize() <= RESUME_UNREAD_OUTPUTS:
            sequence.is_unread = False
            if self._may_run(sequence):
                self._submit(sequence)

    def _write_verdicts(self) -> None:
        """Writes which crashes a request caused (the verdicts), for the guards of all parts, which count the others."""
        verdicts = {epoch: v for suspects in self._suspects.values() for epoch, v in suspects.verdicts.items()}
        if verdicts == self._written_verdicts:
            return
        self._written_verdicts = verdicts
        temporary = self._verdicts_path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(verdicts))
            temporary.replace(self._verdicts_path)
        except OSError as error:
            text = "cannot write %s, so crashes that a request caused may count against RESTART_LIMIT, too: %s"
            log.error(text, self._verdicts_path, error.strerror)


def _crashes_engine() -> RequestError:
    return execution_failed(
        "the engine crashes when it computes this request, also without others: do not send it again"
    )
