"""The API's connection to rank 0, and the ledger of accepted sequences.

A sequence, once accepted, outlives the ranks: when the engine is lost, the ledger keeps prompt and tokens so far, and
submits both to the next epoch. Sampling is a function of (seed, position), so the continuation is the one that would
have been.
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
    output: list[int] = field(default_factory=list)
    events: asyncio.Queue[EngineOutput | RequestError] = field(default_factory=asyncio.Queue)
    engine_losses: int = 0  # engines lost since it was accepted

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "prompt": self.prompt, "output": self.output, "params": self.params.to_json()}


class EngineClient:
    """Keeps one connection to the engine's socket open for as long as the process lives."""

    def __init__(self, path: Path, metrics: Metrics, resume_timeout: float):
        self._path, self._metrics, self._resume_timeout = path, metrics, resume_timeout
        self._in_flight: dict[str, InFlightSequence] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._lost_at = time.monotonic()
        self._draining = False
        self.info: EngineInfo | None = None  # of the present engine or of the last one; None before the first
        self.stats: dict[str, Any] = {}
        metrics.watch_deferred(lambda: 0 if self.connected else self.num_in_flight)

    @property
    def connected(self) -> bool:
        """Whether the engine has said that it is ready; only then may anything be sent to it."""
        return self._writer is not None

    @property
    def draining(self) -> bool:
        """Whether the server was asked to stop: what was accepted may end, and nothing new is."""
        return self._draining

    @property
    def num_in_flight(self) -> int:
        """Sequences accepted and not ended."""
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
        """Events of one sequence up to its terminal one. Leaving the iterator early aborts the sequence.

        Raises RequestError 503 where the engine does not come back in time, 500 where the sequence itself fails.
        """
        entry = InFlightSequence(request_id, prompt, params)
        self._in_flight[request_id] = entry
        try:
            self._send(FrameType.SUBMIT, entry.to_json())
            while True:
                event = await entry.events.get()
                if isinstance(event, RequestError):
                    raise event
                yield event
                if event.finish:
                    return
        finally:
            if self._in_flight.pop(request_id, None):
                self._send(FrameType.ABORT, {"id": request_id})

    def _send(self, kind: FrameType, message: dict[str, Any]) -> None:
        """While there is no engine nothing is sent: the ledger is submitted when there is one again."""
        if self._writer and not self._writer.is_closing():
            self._writer.write(pack_json(kind, message))

    async def _stay_connected(self) -> None:
        while True:
            writer: asyncio.StreamWriter | None = None
            try:
                reader, writer = await asyncio.open_unix_connection(self._path)
                await self._read(reader, writer)
            except OSError as error:
                if self.connected:
                    self._on_engine_lost(error)
            except Exception:  # whatever it is: without this task no request would ever end
                log.exception("the engine's frames could not be read")
                self._on_engine_lost("unreadable frames")
            finally:
                self._writer = None
                if writer:
                    writer.close()
            self._fail_expired()
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                length, kind = parse_header(await reader.readexactly(HEADER.size))
                message = json.loads(await reader.readexactly(length))
            except asyncio.IncompleteReadError:
                raise WireError("the engine closed the connection") from None
            if kind == FrameType.READY:
                self._on_engine_ready(EngineInfo(**message), writer)
            elif kind == FrameType.EVENTS:
                self._dispatch_outputs(message)

    def _on_engine_ready(self, info: EngineInfo, writer: asyncio.StreamWriter) -> None:
        # Not earlier: what came in since the connection opened is in the ledger, and would be submitted twice.
        self._writer = writer
        if self.info is None:
            log.info("the engine is ready: requests are served")
        if self.info is None or self.info.epoch != info.epoch:
            self._metrics.new_epoch(info.block_size, info.num_blocks, info.prefix_caching)
        self.info = info
        if self._in_flight:
            log.info("epoch %d: submitting %d accepted sequences again", info.epoch, self.num_in_flight)
            self._metrics.resumed.inc(sum(1 for entry in self._in_flight.values() if entry.engine_losses))
        for entry in self._in_flight.values():
            self._send(FrameType.SUBMIT, entry.to_json())

    def _dispatch_outputs(self, message: dict[str, Any]) -> None:
        self.stats = message["stats"]
        if self.info:
            self._metrics.step(self.stats, self.info.block_size, self.info.num_blocks)
        for data in message["events"]:
            event = EngineOutput.from_json(data)
            entry = self._in_flight.get(event.request_id)
            if entry is None:
                continue  # aborted here while the event was on its way
            entry.output += event.tokens
            if event.finish == "error":
                self._metrics.corrupted.inc()
                self._end(entry, execution_failed(event.error))
                continue
            if event.finish:
                del self._in_flight[event.request_id]
            entry.events.put_nowait(event)

    def _on_engine_lost(self, why: object) -> None:
        """The engine is gone. A sequence that has seen too many go may be what kills them: it is not submitted
        again.
        """
        log.warning("lost the engine: %s; %d sequences wait for it", why, self.num_in_flight)
        self._lost_at = time.monotonic()
        self.stats = {}
        self._metrics.reset_engine_gauges()
        for entry in list(self._in_flight.values()):
            entry.engine_losses += 1
            if entry.engine_losses >= MAX_ENGINE_LOSSES:
                self._end(
                    entry, engine_gone(f"the engine was lost {entry.engine_losses} times while it held this request")
                )
        if self._draining:
            self.end_all("the server is stopping")

    def drain(self, seconds: float) -> None:
        """The server stops: open sequences may end for so long, and are ended with an error after that."""
        self._draining = True
        loop = asyncio.get_running_loop()
        loop.call_later(max(0.0, seconds), self.end_all, "the server is stopping")
        if not self.connected:
            self.end_all("the server is stopping")

    def end_all(self, why: str) -> None:
        for entry in list(self._in_flight.values()):
            self._end(entry, engine_gone(why))

    def _end(self, entry: InFlightSequence, error: RequestError) -> None:
        if self._in_flight.pop(entry.id, None):
            self._send(FrameType.ABORT, {"id": entry.id})
        entry.events.put_nowait(error)

    def _fail_expired(self) -> None:
        """No request waits for ever for an engine that does not come back."""
        if self._in_flight and time.monotonic() - self._lost_at > self._resume_timeout:
            log.error("no engine for %.0f s: ending %d sequences", self._resume_timeout, self.num_in_flight)
            self.end_all(f"the engine did not come back within {self._resume_timeout:.0f} s")
