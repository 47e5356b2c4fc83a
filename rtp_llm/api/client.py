"""The API's connection to the engine (the scheduler loop on rank 0), and the sequences in flight.

Accepted sequences survive the loss of the engine: the client keeps their prompts and output tokens, and submits both
again after the restart of the ranks, which begins a new epoch. Sampling is a function of (seed, position), so the
continuation is the same.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtp_llm.contract.engine_info import EngineInfo
from rtp_llm.contract.engine_output import EngineOutput
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.errors import RequestError, engine_gone, execution_failed
from rtp_llm.metrics import Metrics
from rtp_llm.parallel.wire import HEADER, FrameType, WireError, pack_json, parse_header

log = logging.getLogger(__name__)

RECONNECT_SECONDS = 0.2
MAX_ENGINE_LOSSES = 3


@dataclass(eq=False)
class InFlightSequence:
    """One accepted sequence."""

    id: str
    prompt: list[int]
    params: SamplingParams
    output_tokens: list[int] = field(default_factory=list)
    outputs: asyncio.Queue[EngineOutput | RequestError] = field(default_factory=asyncio.Queue)
    engine_losses: int = 0  # how often the engine was lost while the sequence was in flight

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "prompt": self.prompt, "output": self.output_tokens, "params": self.params.to_json()}


class EngineClient:
    """Keeps one connection to the engine's unix socket open while the process runs, and reconnects if it is lost.

    path            of the socket
    resume_timeout  seconds that sequences wait for a lost engine
    """

    def __init__(self, path: Path, metrics: Metrics, resume_timeout: float):
        self._path, self._metrics, self._resume_timeout = path, metrics, resume_timeout
        self._in_flight: dict[str, InFlightSequence] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._lost_at = time.monotonic()
        self._draining = False
        self.info: EngineInfo | None = None  # of the current or last engine; None before the first
        self.stats: dict[str, Any] = {}  # of the last step; empty without an engine
        metrics.set_deferred_function(lambda: 0 if self.is_connected else self.num_in_flight)

    @property
    def is_connected(self) -> bool:
        """True once the engine has sent READY on this connection. Nothing may be sent to it before."""
        return self._writer is not None

    @property
    def is_draining(self) -> bool:
        """True while the server stops: accepted sequences may finish, new ones are rejected."""
        return self._draining

    @property
    def num_in_flight(self) -> int:
        """Number of sequences that are accepted and not finished."""
        return len(self._in_flight)

    def start(self) -> None:
        self._task = asyncio.create_task(self._stay_connected(), name="engine")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def generate(
        self, request_id: str, prompt: list[int], params: SamplingParams
    ) -> AsyncGenerator[EngineOutput]:
        """Yields the outputs of one sequence until it finishes. Closing the iterator early aborts the sequence.

        Raises RequestError 503 if a lost engine does not return in time, 500 if the sequence itself fails.
        """
        sequence = InFlightSequence(request_id, prompt, params)
        self._in_flight[request_id] = sequence
        try:
            self._send(FrameType.SUBMIT, sequence.to_json())
            while True:
                output = await sequence.outputs.get()
                if isinstance(output, RequestError):
                    raise output
                yield output
                if output.finish:
                    return
        finally:
            if self._in_flight.pop(request_id, None):
                self._send(FrameType.ABORT, {"id": request_id})

    def _send(self, frame_type: FrameType, message: dict[str, Any]) -> None:
        """Sends a message to the engine. Drops it if none is connected: a new engine gets all sequences in flight."""
        if self._writer and not self._writer.is_closing():
            self._writer.write(pack_json(frame_type, message))

    async def _stay_connected(self) -> None:
        while True:
            writer: asyncio.StreamWriter | None = None
            try:
                reader, writer = await asyncio.open_unix_connection(self._path)
                await self._receive_frames(reader, writer)
            except OSError as error:
                if self.is_connected:
                    self._on_engine_lost(error)
            except Exception:  # without this task, requests would never end
                log.exception("the engine's frames could not be read")
                self._on_engine_lost("unreadable frames")
            finally:
                self._writer = None
                if writer:
                    writer.close()
            self._fail_expired()
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _receive_frames(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                length, frame_type = parse_header(await reader.readexactly(HEADER.size))
                message = json.loads(await reader.readexactly(length))
            except asyncio.IncompleteReadError:
                raise WireError("the engine closed the connection") from None
            if frame_type == FrameType.READY:
                self._on_engine_ready(EngineInfo(**message), writer)
            elif frame_type == FrameType.EVENTS:
                self._dispatch_outputs(message)

    def _on_engine_ready(self, info: EngineInfo, writer: asyncio.StreamWriter) -> None:
        # Set here, not when the connection opens: a request that arrives in between would be submitted twice.
        self._writer = writer
        if self.info is None:
            log.info("the engine is ready: requests are served")
        if self.info is None or self.info.epoch != info.epoch:
            self._metrics.start_epoch(info.block_size, info.num_blocks, info.prefix_caching)
        self.info = info
        if self._in_flight:
            log.info(
                "the engine is back (start %d of the gang): submitting %d sequences again",
                info.epoch,
                self.num_in_flight,
            )
            self._metrics.resumed.inc(sum(1 for sequence in self._in_flight.values() if sequence.engine_losses))
        for sequence in self._in_flight.values():
            self._send(FrameType.SUBMIT, sequence.to_json())

    def _dispatch_outputs(self, message: dict[str, Any]) -> None:
        self.stats = message["stats"]
        if self.info:
            self._metrics.record_step(self.stats, self.info.block_size, self.info.num_blocks)
        for data in message["events"]:
            output = EngineOutput.from_json(data)
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

    def _on_engine_lost(self, reason: object) -> None:
        """Handles the loss of the engine. Keeps the sequences in flight, to submit them again.

        Fails those that were in flight at MAX_ENGINE_LOSSES losses, since they may cause the crashes.
        """
        log.warning("lost the engine: %s; %d sequences wait for it", reason, self.num_in_flight)
        self._lost_at = time.monotonic()
        self.stats = {}
        self._metrics.reset_engine_gauges()
        for sequence in list(self._in_flight.values()):
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
            self._send(FrameType.ABORT, {"id": sequence.id})
        sequence.outputs.put_nowait(error)

    def _fail_expired(self) -> None:
        """Fails all sequences if the engine has been lost for longer than `resume_timeout`."""
        if self._in_flight and time.monotonic() - self._lost_at > self._resume_timeout:
            log.error(
                "no engine for %.0f s (RESUME_TIMEOUT): failing %d sequences", self._resume_timeout, self.num_in_flight
            )
            self.fail_all(f"the engine did not come back within {self._resume_timeout:.0f} s")
