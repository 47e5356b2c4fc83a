"""Targets to measure: a server at a URL, a server that this process starts, or an engine in a process of its own."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from rtp_llm.bench.http_client import Endpoint
from rtp_llm.bench.load import OnEnd, send
from rtp_llm.bench.record import Record
from rtp_llm.bench.worker_process import WorkerError, WorkerProcess
from rtp_llm.bench.workload import Traffic
from rtp_llm.machine.process import die_with_parent

START_SECONDS, STOP_SECONDS, POLL_SECONDS = 300.0, 60.0, 0.05
NUM_PORTS = 20  # that a part with few ranks reserves: half of them below START_PORT
_PORTS = iter(range(18100, 30000, NUM_PORTS))  # each is handed out once, because its server starts later


class Target(ABC):
    """A server or engine to measure.

    Entering this object as a context manager starts the server or engine, unless it already runs, and waits until it is
    ready. Leaving stops what was started. `run` works only in between.
    """

    def __init__(self, name: str, description: str = ""):
        """`description`: version and settings; of some targets known only inside."""
        self.name, self.description = name, description
        self.start_seconds = 0.0  # from its start until it was ready

    def __enter__(self) -> Self:
        start = time.perf_counter()
        with ExitStack() as resources:
            self._start(resources)
            self._resources = resources.pop_all()
        self.start_seconds = time.perf_counter() - start
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    @abstractmethod
    def _start(self, resources: ExitStack) -> None:
        """Starts the target and waits until it is ready. `resources`: closed with the context, or if this fails."""

    @abstractmethod
    def run(self, traffic: Traffic, on_end: OnEnd) -> list[Record]:
        """Runs all requests and returns their records, also of failed requests. Calls `on_end` with each record."""


class UrlTarget(Target):
    """A server that is already running, reached by its URL."""

    def __init__(self, name: str, endpoint: Endpoint, description: str = ""):
        super().__init__(name, description or endpoint.url)
        self.endpoint = endpoint

    def _start(self, resources: ExitStack) -> None:
        """Starts nothing."""

    def run(self, traffic: Traffic, on_end: OnEnd) -> list[Record]:
        return send(self.endpoint, traffic, on_end)


class ServerTarget(UrlTarget):
    """A server that runs as a child process. Entering the context starts the process; leaving it sends SIGTERM."""

    def __init__(self, name: str, command: list[str], port: int, log: Path, environment: dict[str, str] | None = None):
        """`command`: starts a server with a /health on `port`. `environment`: variables added to this process's own."""
        settings = " ".join(f"{key}={value}" for key, value in (environment or {}).items())
        endpoint = Endpoint(f"http://127.0.0.1:{port}", "bench")
        super().__init__(name, endpoint, f"{settings} {' '.join(command)}".strip())
        self.log, self._command, self._port = log, command, port
        self._environment = {**os.environ, **(environment or {})}

    def _start(self, resources: ExitStack) -> None:
        deadline = time.perf_counter() + START_SECONDS
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdout=resources.enter_context(self.log.open("wb")),
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
        resources.callback(self._stop)
        self._wait_until_healthy(deadline)

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

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
    """Returns a target that runs this project's server on a free port; entering its context starts the server.

    `environment`: settings that override the benchmark's defaults.
    """
    port = free_port()
    defaults = {"CHECKPOINT_PATH": str(checkpoint.absolute()), "SERVED_MODEL_NAME": "bench", "DISABLE_ACCESS_LOG": "1"}
    defaults |= {"TP_SIZE": "1", "RTP_DOCTOR": "off", "KV_CACHE_MEM_MB": "2048", "START_PORT": str(port)}
    settings = defaults | environment
    settings.setdefault("WORLD_SIZE", settings["TP_SIZE"])
    return ServerTarget(name, [python, "-m", "rtp_llm.start_server"], port, log, settings)


def free_port() -> int:
    """Returns a port (START_PORT) for a server of this project: the port and the adjacent ones that the server reserves
    are free. Raises WorkerError if there is none.
    """
    for port in _PORTS:
        with ExitStack() as sockets:
            try:
                for neighbour in range(port - NUM_PORTS // 2, port + NUM_PORTS // 2):
                    sockets.enter_context(socket.socket()).bind(("127.0.0.1", neighbour))
            except OSError:
                continue
            return port
    raise WorkerError(f"no {NUM_PORTS} consecutive free ports between 18100 and 30000")


class EngineTarget(Target):
    """An engine that a module of `rtp_llm.bench.peers` runs in a child process, without HTTP and tokenizer."""

    def __init__(self, name: str, module: str, model: Path, settings: dict[str, Any], python: str = sys.executable):
        super().__init__(name)
        self._module, self._model, self._settings, self._python = module, model.absolute(), settings, python

    def _start(self, resources: ExitStack) -> None:
        arguments = str(self._model), json.dumps(self._settings)
        worker = WorkerProcess(f"rtp_llm.bench.peers.{self._module}", *arguments, python=self._python)
        self._worker = resources.enter_context(worker)
        self.description = f"{worker.read()['description']} {self._settings}"

    def run(self, traffic: Traffic, on_end: OnEnd) -> list[Record]:
        records = [Record(**record) for record in self._worker.ask(asdict(traffic))["records"]]
        for record in records:
            on_end(record)
        return records
