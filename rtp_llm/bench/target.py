"""Targets to measure: a server at a URL, a server that this process starts, or an engine in a process of its own."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol

from rtp_llm.bench.http_client import Endpoint
from rtp_llm.bench.load import OnEnd, send
from rtp_llm.bench.record import Record
from rtp_llm.bench.worker_process import WorkerError, WorkerProcess
from rtp_llm.bench.workload import Traffic
from rtp_llm.machine.process import die_with_parent

START_SECONDS, STOP_SECONDS, POLL_SECONDS = 300.0, 60.0, 0.05
NUM_PORTS = 20  # that a part with few ranks reserves: half of them below START_PORT
_PORTS = iter(range(18100, 30000, NUM_PORTS))  # each is handed out once, because its server starts later


class Target(Protocol):
    """A server or engine that runs requests while its context is entered."""

    name: str
    description: str  # version and settings; known inside
    start_seconds: float  # from its start until it was ready; 0 if this did not start it

    def __enter__(self) -> "Target": ...
    def __exit__(self, *_: object) -> None: ...

    def run(self, traffic: Traffic, on_end: OnEnd) -> list[Record]:
        """Runs all requests. Calls `on_end` with each record."""
        ...


class UrlTarget:
    """A server that is already running."""

    def __init__(self, name: str, endpoint: Endpoint):
        self.name, self.description, self.endpoint, self.start_seconds = name, endpoint.url, endpoint, 0.0

    def __enter__(self) -> "UrlTarget":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, traffic: Traffic, on_end: OnEnd) -> list[Record]:
        return send(self.endpoint, traffic, on_end)


class ServerTarget:
    """A server that runs as a child process; ended with SIGTERM."""

    def __init__(self, name: str, command: list[str], port: int, log: Path, environment: dict[str, str] | None = None):
        """`command`: starts a server with a /health on `port`. `environment`: variables added to this process's own."""
        self.name, self.start_seconds, self.log = name, 0.0, log
        settings = " ".join(f"{key}={value}" for key, value in (environment or {}).items())
        self.description = f"{settings} {' '.join(command)}".strip()
        self.endpoint = Endpoint(f"http://127.0.0.1:{port}", "bench")
        self._command, self._port, self._environment = command, port, {**os.environ, **(environment or {})}

    def __enter__(self) -> "ServerTarget":
        start = time.perf_counter()
        self._log: IO[bytes] = self.log.open("wb")
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
        try:
            self._wait_until_healthy(start + START_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        self.start_seconds = time.perf_counter() - start
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def run(self, traffic: Traffic, on_end: OnEnd) -> list[Record]:
        return send(self.endpoint, traffic, on_end)

    def _wait_until_healthy(self, deadline: float) -> None:
        while time.perf_counter() < deadline and self._process.poll() is None:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
            with suppress(OSError, http.client.HTTPException):
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    connection.close()
                    return
            connection.close()
            time.sleep(POLL_SECONDS)
        code = self._process.poll()
        state = "was not ready" if code is None else f"ended with exit code {code}"
        end = self.log.read_text(errors="replace")[-2000:]
        raise WorkerError(f"{self.name} {state} within {START_SECONDS:.0f} s of its start; end of its log:\n{end}")


def own_server(
    name: str, checkpoint: Path, log: Path, environment: dict[str, str], python: str = sys.executable
) -> ServerTarget:
    """Returns this project's server on free ports. `environment`: settings that override a benchmark's defaults."""
    port = free_port()
    defaults = {"CHECKPOINT_PATH": str(checkpoint.absolute()), "SERVED_MODEL_NAME": "bench", "DISABLE_ACCESS_LOG": "1"}
    defaults |= {"TP_SIZE": "1", "RTP_DOCTOR": "off", "KV_CACHE_MEM_MB": "2048", "START_PORT": str(port)}
    settings = defaults | environment
    settings.setdefault("WORLD_SIZE", settings["TP_SIZE"])
    return ServerTarget(name, [python, "-m", "rtp_llm.start_server"], port, log, settings)


def free_port() -> int:
    """Returns a port for a part: it and the adjacent ports that the part reserves are free."""
    for port in _PORTS:
        with ExitStack() as sockets:
            try:
                for neighbour in range(port - NUM_PORTS // 2, port + NUM_PORTS // 2):
                    sockets.enter_context(socket.socket()).bind(("127.0.0.1", neighbour))
            except OSError:
                continue
            return port
    raise WorkerError(f"no {NUM_PORTS} consecutive free ports between 18100 and 30000")


class EngineTarget:
    """An engine of `rtp_llm.bench.peers` in a process of its own: no HTTP, no tokenizer."""

    def __init__(self, name: str, module: str, model: Path, settings: dict[str, Any], python: str = sys.executable):
        self.name, self.description, self.start_seconds = name, "", 0.0
        self._module, self._model, self._settings, self._python = module, model.absolute(), settings, python

    def __enter__(self) -> "EngineTarget":
        start = time.perf_counter()
        arguments = str(self._model), json.dumps(self._settings)
        self._worker = WorkerProcess(f"rtp_llm.bench.peers.{self._module}", *arguments, python=self._python)
        try:
            self.description = f"{self._worker.read()['description']} {self._settings}"
        except BaseException:
            self.__exit__()
            raise
        self.start_seconds = time.perf_counter() - start
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.__exit__()

    def run(self, traffic: Traffic, on_end: OnEnd) -> list[Record]:
        records = [Record(**record) for record in self._worker.ask(asdict(traffic))["records"]]
        for record in records:
            on_end(record)
        return records
