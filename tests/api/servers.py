"""Runs `rtp_llm.start_server` for the tests, as users start it, on free ports.

The server's output goes to a file, which failing tests show. No request may cause a traceback in the output.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

import rtp_llm
from tests.ports import free_start_port

REPOSITORY = Path(rtp_llm.__file__).parents[1]
START_SECONDS, STOP_SECONDS = 120.0, 60.0
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class ServerProcess:
    """One running server."""

    url: str
    checkpoint: Path
    output: Path

    def client(self, timeout: float = 60.0) -> httpx.Client:
        """Returns a client that ignores the environment's proxies and certificates."""
        return httpx.Client(base_url=self.url, timeout=timeout, trust_env=False, verify=False)


@contextmanager
def running_server(checkpoint: Path, output: Path, **settings: str) -> Iterator[ServerProcess]:
    """Runs a server of `checkpoint`. `settings` are its environment variables."""
    port = free_start_port()
    with output.open("wb") as output_file:
        process = subprocess.Popen(
            [sys.executable, "-m", "rtp_llm.start_server"],
            cwd=REPOSITORY,
            env=_environment(checkpoint, port, settings),
            stdout=output_file,
            stderr=subprocess.STDOUT,
        )
    server = ServerProcess(f"http://127.0.0.1:{port}", checkpoint, output)
    try:
        _wait_until_healthy(server, process)
        yield server
    finally:
        exit_code = _stop(process)
    log = output.read_text(errors="replace")
    assert exit_code == 0, f"the server exited with {exit_code}:\n{log[-4000:]}"
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:4000]


def _environment(checkpoint: Path, port: int, settings: dict[str, str]) -> dict[str, str]:
    defaults = {
        "CHECKPOINT_PATH": str(checkpoint),
        "START_PORT": str(port),
        "TP_SIZE": "1",
        "WORLD_SIZE": "1",
        "RTP_DEVICE": "cpu",
        "RTP_THREADS": "1",
        "WARM_UP": "0",
        "RESTART_LIMIT": "0",  # a test must notice if a request kills a rank
        "PYTHONUNBUFFERED": "1",
    }
    return {**os.environ, **defaults, **settings}


def _wait_until_healthy(server: ServerProcess, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    with server.client(timeout=5.0) as client:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if client.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(POLL_SECONDS)
    raise AssertionError(f"the server did not start:\n{server.output.read_text(errors='replace')[-4000:]}")


def _stop(process: "subprocess.Popen[bytes]") -> int:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # its children exit with it
        return process.wait()
