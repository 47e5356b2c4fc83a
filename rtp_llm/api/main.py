"""`python -m rtp_llm.api.main RUN_DIR`: the API process of one part."""

import asyncio
import logging
import socket
import sys
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn

from rtp_llm import __version__
from rtp_llm import log as logs
from rtp_llm.api.app import create_app
from rtp_llm.api.client import EngineClient
from rtp_llm.api.part_state import PartState
from rtp_llm.api.service import Service
from rtp_llm.config import Config
from rtp_llm.errors import ConfigError
from rtp_llm.metrics import GangCollector, Metrics
from rtp_llm.parallel.handover import Handover
from rtp_llm.parallel.lifeline import live_below_supervisord, run_to_exit
from rtp_llm.text.template import ChatTemplate, TemplateError
from rtp_llm.text.tokenizer import Tokenizer

log = logging.getLogger("rtp_llm.api")

LAST_WORD_SECONDS = 1.0


def main(run_dir: Path) -> None:
    handover = Handover.load(run_dir)
    config, plan = handover.config, handover.plan
    logs.setup(f"{handover.who} api", config.log_level, style=config.log_format)
    model = handover.model
    metrics = Metrics(model.name, config.max_seq_len or model.max_positions)
    metrics.build_info.labels(version=__version__).set(1)
    metrics.info.labels(family=model.family, dtype=model.dtype, tp_size=str(plan.tp_size)).set(1)
    client, service = None, None
    if plan.part == 0:
        client = EngineClient(handover.engine_socket, metrics, config.resume_timeout)
        tokenizer = Tokenizer.load(Path(config.tokenizer_path or config.checkpoint_path))
        template = _template(config, tokenizer, model.family)
        service = Service(config, model.name, tokenizer, template, metrics, client)
    state = PartState(handover, client)
    metrics.registry.register(GangCollector(state.for_metrics))
    app = create_app(config, state, metrics, service)
    server = Server(
        client,
        uvicorn.Config(
            app,
            host="0.0.0.0",
            port=plan.start_port,
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=config.timeout_keep_alive,
            timeout_graceful_shutdown=config.drain_seconds,
        ),
    )
    log.info("HTTP on port %d%s", plan.start_port, f", model {model.name}" if service else "")
    server.run()


class Server(uvicorn.Server):
    """uvicorn, whose open streams get a terminal event before its deadline cuts them off."""

    def __init__(self, client: EngineClient | None, config: uvicorn.Config):
        super().__init__(config)
        self._client = client
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._client and self._loop:
            seconds = (self.config.timeout_graceful_shutdown or 0) - LAST_WORD_SECONDS
            self._loop.call_soon_threadsafe(self._client.drain, seconds)


def _template(config: Config, tokenizer: Tokenizer, family: str) -> ChatTemplate:
    try:
        return ChatTemplate.choose(
            tokenizer,
            forced=config.model_template_type or None,
            default_key=config.default_chat_template_key,
            tool_key=config.default_tool_use_template_key,
            model_type=config.model_type or family,
        )
    except TemplateError as error:
        raise ConfigError(f"chat template: {error}") from None


if __name__ == "__main__":
    live_below_supervisord(Path(sys.argv[1]))
    run_to_exit(partial(main, Path(sys.argv[1])))
