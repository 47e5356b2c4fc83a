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

from rtp_llm.engine.request import Event, SamplingParams
from rtp_llm.errors import RequestError, engine_gone, execution_failed
from rtp_llm.metrics import Metrics
from rtp_llm.parallel.wire import HEADER, Kind, WireError, pack_json, parse_header

log = logging.getLogger(__name__)

RECONNECT_SECONDS = 0.2
MAX_LOSSES = 3


@dataclass(frozen=True)
class EngineInfo:
    """What rank 0 says of itself when the connection opens."""

    epoch: int
    max_seq_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    prefix_caching: bool
    family: str
    dtype: str


@dataclass(eq=False)
class _Entry:
    """One accepted sequence."""

    id: str
    prompt: list[int]
    params: SamplingParams
    output: list[int] = field(default_factory=list)
    events: asyncio.Queue[Event | RequestError] = field(default_factory=asyncio.Queue)
    losses: int = 0  # engines lost since it was accepted

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "prompt": self.prompt, "output": self.output, "params": self.params.to_json()}


class EngineClient:
    """Keeps one connection to the engine's socket open for as long as the process lives."""

    def __init__(self, path: Path, metrics: Metrics, resume_timeout: float):
        self._path, self._metrics, self._resume_timeout = path, metrics, resume_timeout
        self._ledger: dict[str, _Entry] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._lost_at = time.monotonic()
        self._draining = False
        self.info: EngineInfo | None = None  # of the present engine or of the last one; None before the first
        self.stats: dict[str, Any] = {}
        metrics.watch_deferred(lambda: 0 if self.connected else self.num_open)

    @property
    def connected(self) -> bool:
        """Whether the engine has said that it is ready; only then may anything be sent to it."""
        return self._writer is not None

    @property
    def draining(self) -> bool:
        """Whether the server was asked to stop: what was accepted may end, and nothing new is."""
        return self._draining

    @property
    def num_open(self) -> int:
        """Sequences accepted and not ended."""
        return len(self._ledger)

    def start(self) -> None:
        self._task = asyncio.create_task(self._stay_connected(), name="engine")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def generate(self, request_id: str, prompt: list[int], params: SamplingParams) -> AsyncGenerator[Event]:
        """Events of one sequence up to its terminal one. Leaving the iterator early aborts the sequence.

        Raises RequestError 503 where the engine does not come back in time, 500 where the sequence itself fails.
        """
        entry = _Entry(request_id, prompt, params)
        self._ledger[request_id] = entry
        try:
            self._send(Kind.SUBMIT, entry.to_json())
            while True:
                event = await entry.events.get()
                if isinstance(event, RequestError):
                    raise event
                yield event
                if event.finish:
                    return
        finally:
            if self._ledger.pop(request_id, None):
                self._send(Kind.ABORT, {"id": request_id})

    def _send(self, kind: Kind, message: dict[str, Any]) -> None:
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
                    self._lose(error)
            except Exception:  # whatever it is: without this task no request would ever end
                log.exception("the engine's frames could not be read")
                self._lose("unreadable frames")
            finally:
                self._writer = None
                if writer:
                    writer.close()
            self._expire()
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                length, kind = parse_header(await reader.readexactly(HEADER.size))
                message = json.loads(await reader.readexactly(length))
            except asyncio.IncompleteReadError:
                raise WireError("the engine closed the connection") from None
            if kind == Kind.READY:
                self._welcome(EngineInfo(**message), writer)
            elif kind == Kind.EVENTS:
                self._deliver(message)

    def _welcome(self, info: EngineInfo, writer: asyncio.StreamWriter) -> None:
        # Not earlier: what came in since the connection opened is in the ledger, and would be submitted twice.
        self._writer = writer
        if self.info is None:
            log.info("the engine is ready: requests are served")
        if self.info is None or self.info.epoch != info.epoch:
            self._metrics.new_epoch(info.block_size, info.num_blocks, info.prefix_caching)
        self.info = info
        if self._ledger:
            log.info("epoch %d: submitting %d accepted sequences again", info.epoch, self.num_open)
            self._metrics.resumed.inc(sum(1 for entry in self._ledger.values() if entry.losses))
        for entry in self._ledger.values():
            self._send(Kind.SUBMIT, entry.to_json())

    def _deliver(self, message: dict[str, Any]) -> None:
        self.stats = message["stats"]
        if self.info:
            self._metrics.step(self.stats, self.info.block_size, self.info.num_blocks)
        for data in message["events"]:
            event = Event.from_json(data)
            entry = self._ledger.get(event.request_id)
            if entry is None:
                continue  # aborted here while the event was on its way
            entry.output += event.tokens
            if event.finish == "error":
                self._metrics.corrupted.inc()
                self._end(entry, execution_failed(event.error))
                continue
            if event.finish:
                del self._ledger[event.request_id]
            entry.events.put_nowait(event)

    def _lose(self, why: object) -> None:
        """The engine is gone. A sequence that has seen too many go may be what kills them: it is not submitted
        again.
        """
        log.warning("lost the engine: %s; %d sequences wait for it", why, self.num_open)
        self._lost_at = time.monotonic()
        self.stats = {}
        self._metrics.no_engine()
        for entry in list(self._ledger.values()):
            entry.losses += 1
            if entry.losses >= MAX_LOSSES:
                self._end(entry, engine_gone(f"the engine was lost {entry.losses} times while it held this request"))
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
        for entry in list(self._ledger.values()):
            self._end(entry, engine_gone(why))

    def _end(self, entry: _Entry, error: RequestError) -> None:
        if self._ledger.pop(entry.id, None):
            self._send(Kind.ABORT, {"id": entry.id})
        entry.events.put_nowait(error)

    def _expire(self) -> None:
        """No request waits for ever for an engine that does not come back."""
        if self._ledger and time.monotonic() - self._lost_at > self._resume_timeout:
            log.error("no engine for %.0f s: ending %d sequences", self._resume_timeout, self.num_open)
            self.end_all(f"the engine did not come back within {self._resume_timeout:.0f} s")
