"""The HTTP server of the API process of one part."""

import asyncio
import logging
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import uvicorn

from rtp_llm import __version__, garbage
from rtp_llm import log as logs
from rtp_llm.api.app import create_app
from rtp_llm.api.client import EngineClient
from rtp_llm.api.connection_limit import ConnectionLimit
from rtp_llm.api.http_protocol import HttpProtocol
from rtp_llm.api.listen import listening_sockets, uvicorn_config
from rtp_llm.api.part_metrics import register
from rtp_llm.api.part_state import PartState
from rtp_llm.api.service import Service
from rtp_llm.config import Config
from rtp_llm.errors import ConfigError
from rtp_llm.metrics import Metrics
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.text.output_format import AnswerFormats
from rtp_llm.text.template import ChatTemplate, TemplateError
from rtp_llm.text.tokenizer import Tokenizer

log = logging.getLogger("rtp_llm.api")

ALIVE_INTERVAL_SECONDS = 0.5
FLUSH_SECONDS = 1.0  # reserved at the end of a drain to send errors to the remaining clients
DRAIN_POLL_SECONDS = 0.05
# Time until the other parts see a new request: two heartbeats and one status write.
STATUS_PROPAGATION_SECONDS = 1.5


def main(run_dir: Path) -> None:
    """Serves the API of the part whose settings are in `run_dir`. Returns after SIGTERM or SIGINT, when the open
    requests have ended or SHUTDOWN_TIMEOUT has passed.
    """
    part_spec = PartSpec.load(run_dir)
    config, plan = part_spec.config, part_spec.plan
    logs.setup(f"{part_spec.label} api", config.log_level, style=config.log_format)
    model = part_spec.model
    metrics = Metrics(model.name, config.max_seq_len or model.max_positions)
    metrics.build_info.labels(version=__version__).set(1)
    metrics.info.labels(family=model.family, dtype=model.dtype, tp_size=str(plan.tp_size)).set(1)
    client, service = None, None
    if plan.part == 0:
        client = EngineClient(part_spec.engine_sockets, metrics, config.resume_timeout, part_spec.verdicts_path)
        tokenizer = Tokenizer.load(Path(config.tokenizer_path or config.checkpoint_path))
        template = _template(config, tokenizer, model.family)
        formats = AnswerFormats.select(template, tokenizer, config.tool_call_parser, config.reasoning_parser)
        service = Service(config, model.name, tokenizer, template, formats, metrics, client)
    state = PartState(part_spec, client)
    state.gpus.start()
    register(metrics, state, config)
    app = create_app(config, state, metrics, service)
    server = DrainingServer(state, service, uvicorn_config(app, config))
    HttpProtocol.limit = ConnectionLimit.from_rlimit()
    sockets = listening_sockets(config.host, plan.start_port)
    scheme, served = "HTTPS" if config.ssl_certfile else "HTTP", f", model {model.name}" if service else ""
    addresses = ", ".join(sock.getsockname()[0] for sock in sockets)
    log.info("%s on %s port %d%s", scheme, addresses, plan.start_port, served)
    garbage.keep_all()
    server.run(sockets)


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains: after SIGTERM it runs until the accepted requests finish, and /health returns 503.
    A second signal stops it at once.

    Parts other than 0 get no generation requests, but their ranks compute a share of each. So the server of such a part
    runs until rank 0 reports that no request is open.
    """

    def __init__(self, state: PartState, service: Service | None, config: uvicorn.Config):
        super().__init__(config)
        self._state, self._service = state, service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        alive = asyncio.create_task(self._show_life(), name="alive")
        await super().serve(sockets)
        alive.cancel()

    async def _show_life(self) -> None:
        """Touches a file while the event loop runs; the guard kills this process if the file gets old."""
        while True:
            with suppress(OSError):  # on a full disk an existing file can still be touched
                self._state.part_spec.api_alive_path.touch()
            await asyncio.sleep(ALIVE_INTERVAL_SECONDS)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self._state.is_draining:  # a second signal skips the drain
            super().handle_exit(sig, frame)
            return
        self._state.is_draining = True
        self._loop.call_soon_threadsafe(self._start_drain, sig)

    def _start_drain(self, sig: int) -> None:
        self._drain = asyncio.create_task(self._drain_and_exit(sig), name="drain")

    async def _drain_and_exit(self, sig: int) -> None:
        seconds = max(0.0, self._state.part_spec.config.drain_seconds - FLUSH_SECONDS)
        deadline = time.monotonic() + seconds
        if self._service:
            self._service.drain(seconds)
        else:
            await asyncio.sleep(min(seconds, STATUS_PROPAGATION_SECONDS))
        while self._has_open_requests() and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        super().handle_exit(sig, None)

    def _has_open_requests(self) -> bool:
        if self._service:
            return self._service.num_open > 0
        return bool(self._state.num_open_requests)


def _template(config: Config, tokenizer: Tokenizer, family: str) -> ChatTemplate:
    try:
        return ChatTemplate.select(
            tokenizer,
            explicit=config.model_template_type or None,
            default_key=config.default_chat_template_key,
            tool_key=config.default_tool_use_template_key,
            model_type=config.model_type or family,
        )
    except TemplateError as error:
        raise ConfigError(f"chat template: {error}") from None
