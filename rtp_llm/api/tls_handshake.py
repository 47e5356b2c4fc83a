"""The TLS handshake of an HTTPS connection.

Until the handshake is complete, `ConnectionLimit` counts the connection as one that waits for a request.
"""

import asyncio
import ssl
from functools import partial
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.server import ServerState

from rtp_llm.api.client_transport import PROGRESS_SECONDS
from rtp_llm.api.http_protocol import HttpProtocol


class TlsHandshake(asyncio.Protocol):
    """The asyncio protocol of an HTTPS connection until its TLS handshake is complete. An `HttpProtocol` replaces it
    then.
    """

    transport: asyncio.Transport

    def __init__(
        self,
        context: ssl.SSLContext,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ):
        """The arguments after `context` are those of uvicorn's protocols."""
        self._context, self._connections = context, server_state.connections
        self._make_http = partial(HttpProtocol, config, server_state, app_state, _loop)
        self._early_data = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self._connections.add(self)  # type: ignore[arg-type]
        HttpProtocol.limit.admit(self, len(self._connections))
        self._task = asyncio.create_task(self._handshake(), name="tls-handshake")

    def data_received(self, data: bytes) -> None:
        self._early_data += data  # uvloop reads before the task begins, whether or not reading is paused

    def connection_lost(self, exc: Exception | None) -> None:
        self._task.cancel()

    def shutdown(self) -> None:
        """Aborts the connection, whose handshake is not complete. uvicorn calls this when the server stops."""
        self.transport.abort()

    async def _handshake(self) -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(self._pass_on_early_data)  # once start_tls has replaced the transport's protocol
        try:
            tls = await loop.start_tls(
                self.transport, self, self._context, server_side=True, ssl_handshake_timeout=PROGRESS_SECONDS
            )
        except OSError:  # an ssl.SSLError, a timeout or a reset
            self.transport.abort()
            return
        finally:
            HttpProtocol.limit.waiting.pop(self, None)
            self._connections.discard(self)
        if tls and not tls.is_closing():
            http = self._make_http()
            tls.set_protocol(http)
            http.connection_made(tls)  # uvloop passes on data later than it ends `start_tls`

    def _pass_on_early_data(self) -> None:
        tls, data = cast(asyncio.BufferedProtocol, self.transport.get_protocol()), memoryview(self._early_data)
        while data:
            buffer = memoryview(tls.get_buffer(len(data)))
            size = min(len(buffer), len(data))
            buffer[:size] = data[:size]
            tls.buffer_updated(size)
            data = data[size:]
