"""`python -m rtp_llm.api.download FLAGS`: downloads the models that CHECKPOINT_PATH and TOKENIZER_PATH name on a hub.

Serves /health and /metrics meanwhile. start_server passes on its own flags and environment, and waits for the end
before it starts anything that needs the model's config.json. The process can be killed at any time: the next run
resumes the download.
"""

import logging
import os
import sys
import threading
import time
from functools import partial
from typing import NoReturn

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from tqdm import tqdm

from rtp_llm import log as logs
from rtp_llm.api.auth import AuthMiddleware, Keyring
from rtp_llm.api.connection_limit import ConnectionLimit
from rtp_llm.api.http_protocol import HttpProtocol
from rtp_llm.api.listen import listening_sockets, uvicorn_config
from rtp_llm.api.part_state import Health
from rtp_llm.api.status import HEALTH_PATHS, LIVENESS_PATHS, status_router
from rtp_llm.config import Config, load
from rtp_llm.errors import FatalError, RequestError, engine_gone
from rtp_llm.hub.download import DownloadProgress, download
from rtp_llm.hub.remote import look_up
from rtp_llm.hub.settings import missing_models
from rtp_llm.machine.process import die_with_parent, run_main
from rtp_llm.metrics import Metrics

log = logging.getLogger("rtp_llm.download")

LOG_SECONDS = 10.0
BAR_SECONDS = 0.5


class DownloadState:
    """The state that /health reports while a part downloads its models, one after another."""

    def __init__(self) -> None:
        self.progress: DownloadProgress | None = None

    def health(self) -> Health:
        if self.progress is None:
            return Health(False, "download", 0.0, "download: asking the hub")
        return Health(False, "download", self.progress.share(), f"download: {self.progress.describe()}")

    def doctor_report(self) -> NoReturn:
        """Raises RequestError 503 with the download's progress: the doctor of this part runs after the download."""
        raise engine_gone(f"the doctor runs after the download; {self.health().detail}")


def main(arguments: list[str]) -> None:
    config = load(arguments, os.environ).config
    logs.setup("download", config.log_level, style=config.log_format)
    state = DownloadState()
    server = uvicorn.Server(uvicorn_config(create_download_app(config, state), config))
    HttpProtocol.limit = ConnectionLimit.from_rlimit()
    failures: list[FatalError] = []
    threading.Thread(target=_download_all, args=(config, state, server, failures), daemon=True).start()
    server.run(listening_sockets(config.host, config.start_port))
    if failures:
        raise failures[0]


def create_download_app(config: Config, state: DownloadState) -> FastAPI:
    """Returns an application that serves /health and /metrics in their usual formats, and 503 for all other paths."""
    keyring = Keyring.from_config(config)
    app = FastAPI(openapi_url=None)
    app.include_router(status_router(state, Metrics("", 1), hides_detail=bool(keyring.api)))

    async def not_yet(request: Request) -> Response:
        return _respond(request.url.path, engine_gone(state.health().detail))

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return _respond(request.url.path, error)

    app.add_api_route("/{path:path}", not_yet, methods=["GET", "POST"])
    app.add_exception_handler(RequestError, refused)
    open_paths = {*HEALTH_PATHS, *LIVENESS_PATHS} | ({"/metrics"} if config.metrics_open else set())
    app.add_middleware(AuthMiddleware, keyring=keyring, open_paths=open_paths, respond=_respond)
    return app


def _respond(path: str, error: RequestError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


def _download_all(config: Config, state: DownloadState, server: uvicorn.Server, failures: list[FatalError]) -> None:
    """Downloads the missing models, then ends the server. Appends the error that prevents it to `failures`."""
    try:
        for name in missing_models(config):
            model = look_up(name)
            model.check_space()
            state.progress = DownloadProgress(model)
            with Reporter(state.progress):
                download(model)
    except FatalError as error:
        failures.append(error)
    finally:
        server.should_exit = True


class Reporter:
    """Context manager that shows a download's progress: a bar on a terminal, otherwise a log line every ten seconds."""

    def __init__(self, progress: DownloadProgress):
        self._progress, self._done = progress, threading.Event()
        self._thread = threading.Thread(target=self._show_bar if _has_terminal() else self._log, daemon=True)

    def __enter__(self) -> None:
        self._started = time.monotonic()
        log.info("downloading %s, commit %s", self._progress.describe(), self._progress.model.commit[:7])
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        log.info("%s, in %.0f s", self._progress.describe(), time.monotonic() - self._started)

    def _log(self) -> None:
        while not self._done.wait(LOG_SECONDS):
            log.info("%s", self._progress.describe())

    def _show_bar(self) -> None:
        model = self._progress.model
        with tqdm(desc=str(model.name), total=model.total_bytes, unit="B", unit_scale=True, smoothing=0.1) as bar:
            while True:
                finished = self._done.wait(BAR_SECONDS)
                bar.update(model.bytes_on_disk() - bar.n)
                if finished:
                    return


def _has_terminal() -> bool:
    """Returns whether stderr is a terminal with columns; one without is the log of a detached container."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


if __name__ == "__main__":
    die_with_parent()
    run_main(partial(main, sys.argv[1:]))
