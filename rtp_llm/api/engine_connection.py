"""The connection to one engine: rank 0 of a data-parallel group, which schedules the group's requests."""

import asyncio
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from rtp_llm.contract.engine_events import unpack_events
from rtp_llm.contract.engine_info import EngineInfo
from rtp_llm.contract.engine_output import EngineOutput
from rtp_llm.parallel.wire import HEADER, FrameType, WireError, pack_json, parse_header

log = logging.getLogger(__name__)

RECONNECT_SECONDS = 0.05


class EngineListener(Protocol):
    """Callbacks for the events of an engine connection, implemented by `api.client.EngineClient`."""

    def on_ready(self, engine: "EngineConnection", info: EngineInfo, previous: EngineInfo | None) -> None: ...

    def on_outputs(self, engine: "EngineConnection", outputs: list[EngineOutput]) -> None: ...

    def on_lost(self, engine: "EngineConnection", reason: object) -> None: ...

    def on_absent(self, engine: "EngineConnection") -> None:
        """Called while there is no connection to the engine: when it ends, and after each failed attempt to connect."""
        ...


class EngineConnection:
    """A client of one engine's unix socket that connects again whenever the connection is lost."""

    def __init__(self, path: Path, listener: EngineListener):
        """`path`: path of the socket. `listener`: its callbacks are called for events of the engine."""
        self._path, self._listener = path, listener
        self._writer: asyncio.StreamWriter | None = None
        self.info: EngineInfo | None = None  # of the current or last engine; None before the first
        self.stats: dict[str, Any] = {}  # of the last step; empty without an engine
        self.launched_ids: frozenset[str] = frozenset()  # of the requests in the steps that the engine computes
        self.lost_at = time.monotonic()

    @property
    def is_connected(self) -> bool:
        """True once the engine has sent READY, its first frame, on this connection. No message may be sent before."""
        return self._writer is not None

    def send(self, frame_type: FrameType, message: dict[str, Any]) -> None:
        """Sends a message to the engine. Drops it if no engine is connected: `EngineClient` submits all sequences in
        flight again as soon as the engine is ready.
        """
        if self._writer and not self._writer.is_closing():
            self._writer.write(pack_json(frame_type, message))

    async def stay_connected(self) -> None:
        while True:
            writer: asyncio.StreamWriter | None = None
            try:
                reader, writer = await asyncio.open_unix_connection(self._path)
                await self._receive_frames(reader, writer)
            except OSError as error:
                if self.is_connected:
                    self._on_lost(error)
            except Exception:  # without this task, requests would never end
                log.exception("the engine sent a frame that cannot be decoded; connecting again")
                self._on_lost("it sent a frame that cannot be decoded")
            finally:
                self._writer = None
                if writer:
                    writer.close()
            self._listener.on_absent(self)
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _receive_frames(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                length, frame_type = parse_header(await reader.readexactly(HEADER.size))
                payload = await reader.readexactly(length)
            except asyncio.IncompleteReadError:
                raise WireError("the engine closed the connection") from None
            if frame_type == FrameType.READY:
                # Set here, not when the connection opens: a request in between would be submitted twice.
                self._writer = writer
                previous, self.info = self.info, EngineInfo(**json.loads(payload))
                self._listener.on_ready(self, self.info, previous)
            elif frame_type == FrameType.LAUNCH:
                self.launched_ids = frozenset(json.loads(payload)["ids"])
            elif frame_type == FrameType.EVENTS:
                outputs, stats = unpack_events(payload)
                self.stats = asdict(stats)
                self._listener.on_outputs(self, outputs)

    def _on_lost(self, reason: object) -> None:
        self.lost_at = time.monotonic()
        self.stats = {}
        self._listener.on_lost(self, reason)
        self.launched_ids = frozenset()
