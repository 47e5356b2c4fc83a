"""The API of one part inside the test's process, on a free port, with a fake engine.

It is the application of `rtp_llm.api.server` on the same HTTP server. Since it shares the test's process, an error in
its log fails the test, even if the client got a valid response.
"""

import asyncio
import gc
import json
import logging
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import uvicorn
from starlette.routing import BaseRoute, Route

from rtp_llm.api.app import create_app
from rtp_llm.api.client import EngineClient
from rtp_llm.api.listen import listening_sockets, uvicorn_config
from rtp_llm.api.part_metrics import register
from rtp_llm.api.part_state import PartState
from rtp_llm.api.service import Service
from rtp_llm.config import Config
from rtp_llm.metrics import Metrics
from rtp_llm.parallel.part_spec import EmbeddingInfo, ModelInfo, PartSpec
from rtp_llm.parallel.plan import make_plan
from rtp_llm.text.output_format import AnswerFormats
from rtp_llm.text.template import ChatTemplate
from tests.api.byte_model import ByteModel
from tests.api.fake_engine import TIMEOUT_SECONDS, FakeEngine, Script


class ApiServer:
    """The API of one part with a fake engine. `settings` are fields of `Config`."""

    def __init__(
        self,
        model: ByteModel,
        script: Script | None = None,
        *,
        sends_ready: bool = True,
        embedding: EmbeddingInfo = EmbeddingInfo(),  # noqa: B008  # frozen
        **settings: Any,
    ):
        self.model = model
        # Not pytest's tmp_path: the path of a unix socket is limited to 107 bytes.
        self.run_dir = Path(tempfile.mkdtemp(prefix="rtp-api-"))
        config = Config(checkpoint_path=str(model.directory), rtp_device="cpu", tp_size=1, **settings)
        self.part_spec = PartSpec(
            run_dir=self.run_dir,
            config=config,
            plan=make_plan(config, 0),
            model=ModelInfo("fake", "fake", "fp32", 2048, config.task_type or "LANGUAGE_MODEL", embedding),
            fingerprint={},
            tty=False,
        )
        self.metrics = Metrics("fake", 2048)
        self.errors = _ErrorLog()
        self._server = self._make_server(config)
        [self._listener] = listening_sockets("127.0.0.1", 0)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), daemon=True)
        self.engine = self.new_engine(script, sends_ready=sends_ready)

    def _make_server(self, config: Config) -> "_LoopTrackingServer":
        client = EngineClient(
            self.part_spec.engine_sockets, self.metrics, config.resume_timeout, self.part_spec.verdicts_path
        )
        template = ChatTemplate.select(self.model.tokenizer, explicit=config.model_template_type or None)
        formats = AnswerFormats.select(template, self.model.tokenizer, config.tool_call_parser, config.reasoning_parser)
        self._service = Service(config, "fake", self.model.tokenizer, template, formats, self.metrics, client)
        self.state = PartState(self.part_spec, client)
        register(self.metrics, self.state, config)
        self.app = create_app(config, self.state, self.metrics, self._service)
        return _LoopTrackingServer(uvicorn_config(self.app, config))

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self.errors)
        self._thread.start()
        self.engine.wait_for_connection()
        self.wait_until(lambda: self._server.started)
        port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        if self.engine.sends_ready:
            self.wait_until(lambda: self._service.client.info is not None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:  # no test may leak a slot
            self.wait_until(lambda: self._service.reserved_slots == 0 and self._service.client.num_in_flight == 0)
        self._server.should_exit = True
        self._thread.join(TIMEOUT_SECONDS)
        self.engine.close()
        logging.getLogger().removeHandler(self.errors)
        shutil.rmtree(self.run_dir, ignore_errors=True)
        if kind is None:
            assert not self._thread.is_alive(), "the API did not stop"
            assert not self.errors.lines, self.errors.lines

    def new_engine(self, script: Script | None = None, **options: Any) -> FakeEngine:
        """Starts another fake engine on the API's engine socket. The previous engine must be closed."""
        self.engine = FakeEngine(self.part_spec.engine_sockets[0], script, **options)
        return self.engine

    # Requests and waiting

    def client(self, timeout: float = TIMEOUT_SECONDS) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=timeout, trust_env=False, verify=False)

    def get(self, path: str) -> httpx.Response:
        with self.client() as client:
            return client.get(path)

    def post(self, path: str, body: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body)

    def stream(self, path: str, body: Any) -> bytes:
        """Returns the whole body of a streamed response."""
        with self.client() as client, client.stream("POST", path, json=body) as response:
            return response.read()

    @contextmanager
    def open_stream(self, path: str, body: Any) -> Iterator[httpx.Response]:
        with self.client() as client, client.stream("POST", path, json=body) as response:
            yield response

    def metric(self, name: str, **labels: str) -> float:
        """Returns the value of one series, 0 if it does not exist yet."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits until `condition()` is true."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if condition():
                return
            time.sleep(0.01)
        raise AssertionError(f"the condition was not met within {TIMEOUT_SECONDS} s")

    @property
    def num_connections(self) -> int:
        """Connections that the server has accepted."""
        return len(self._server.server_state.connections)

    @contextmanager
    def event_loop_cpu(self) -> Iterator[list[float]]:
        """Gives a list with the CPU seconds of the iterations of the API's event loop: each delays all others."""
        seconds: list[float] = []
        is_done = threading.Event()
        gc.collect()
        gc.freeze()  # what earlier tests have left to collect is not the product's

        async def measure() -> None:
            while not is_done.is_set():
                before = time.thread_time()
                await asyncio.sleep(0.001)  # without a pause it would compete for the CPU
                seconds.append(time.thread_time() - before)

        task = asyncio.run_coroutine_threadsafe(measure(), self._server.loop)
        try:
            yield seconds
        finally:
            is_done.set()
            task.result(TIMEOUT_SECONDS)
            gc.unfreeze()

    @contextmanager
    def blocked_event_loop(self) -> Iterator[None]:
        """Blocks the API's event loop, so that everything sent meanwhile arrives in one iteration."""
        is_blocked, unblock = threading.Event(), threading.Event()

        def block() -> None:
            is_blocked.set()
            unblock.wait(TIMEOUT_SECONDS)

        self._server.loop.call_soon_threadsafe(block)
        assert is_blocked.wait(TIMEOUT_SECONDS)
        try:
            yield
        finally:
            unblock.set()

    def write_gang_status(self, **rank_status: Any) -> None:
        """Writes the gang status file (gang.json), which the guard of a part writes twice a second."""
        defaults = {
            "part": 0,
            "pid": 1,
            "phase": "serving",
            "progress": 1.0,
            "steps": 7,
            "silent_s": 0.1,
            "idle_s": 0.2,
            "lacks_memory": False,
            "stands_still": False,
            "available_bytes": 7 << 20,
            "wait_s": None,
            "weight_bytes": 1000,
            "kv_bytes": 2000,
            "startup_seconds": {"loading": 1.5},
        }
        gang_status = {"epoch": 1, "in_epoch": True, "message": "", "ranks": {"0": {**defaults, **rank_status}}}
        self.part_spec.gang_status_path.write_text(json.dumps(gang_status))


def routes(found: Iterable[BaseRoute]) -> Iterator[tuple[str, str]]:
    """Yields (method, path) of every route, the framework's own ones such as /openapi.json included."""
    for route in found:
        if isinstance(route, Route):
            yield from ((method, route.path) for method in (route.methods or set()) - {"HEAD"})
        else:  # FastAPI's wrapper of an included router
            yield from routes(route.original_router.routes)  # type: ignore[attr-defined]


class _LoopTrackingServer(uvicorn.Server):
    """An HTTP server that shows its event loop to the test."""

    loop: asyncio.AbstractEventLoop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)


class _ErrorLog(logging.Handler):
    """Collects the log's errors, including tracebacks."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))
