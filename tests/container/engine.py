"""Runs containers and compose projects on a real Docker engine, through the docker command, and removes them."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import rtp_llm
from tests.parallel.fetch import fetch

REPOSITORY = Path(rtp_llm.__file__).parents[1]
IMAGE = "rtp-llm:under-test"
DEADLINE_SECONDS = 90.0  # for each wait on a container
T = TypeVar("T")


def engine_unavailable_reason() -> str:
    """Returns the reason why containers cannot run on this machine; "" if they can."""
    if not shutil.which("docker"):
        return "there is no docker client"
    completed = subprocess.run(["docker", "info"], capture_output=True, text=True)
    if completed.returncode:
        return "no Docker engine responds: " + (completed.stderr.strip().splitlines() or ["?"])[-1]
    if subprocess.run(["docker", "buildx", "version"], capture_output=True).returncode:
        return "the docker client has no buildx"
    return ""


def has_compose() -> bool:
    """Returns whether there is a docker client with the compose plugin."""
    command = ["docker", "compose", "version"]
    return bool(shutil.which("docker")) and subprocess.run(command, capture_output=True).returncode == 0


def docker(*arguments: str, check: bool = True, env: Mapping[str, str] | None = None, timeout: float = 900) -> str:
    """Returns stdout and stderr of a docker command. Raises AssertionError with them if the command fails."""
    completed = subprocess.run(
        ["docker", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    output = completed.stdout
    assert not check or completed.returncode == 0, f"docker {' '.join(arguments)}: {completed.returncode}\n{output}"
    return output.strip()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until(condition: Callable[[], T | None], expected: str, seconds: float = DEADLINE_SECONDS) -> T:
    """Returns the first true result of `condition`. Raises AssertionError with `expected` after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {expected}"
        time.sleep(0.1)


class ContainerService:
    """A container that serves HTTP on a port of this machine."""

    port: int

    def fetch(self, path: str, body: Any = None) -> tuple[int, str]:
        """Returns (status, text); status 0 if the connection fails."""
        return fetch(f"http://127.0.0.1:{self.port}{path}", None if body is None else json.dumps(body))

    def complete(self, body: Mapping[str, Any]) -> str:
        status, text = self.fetch("/v1/completions", dict(body))
        assert status == 200, f"{status}: {text}"
        return str(json.loads(text)["choices"][0]["text"])


class Container(ContainerService):
    """`docker run -d` of the image. The context manager removes it, and adds its log to the error if a test fails."""

    def __init__(self, *options: str, env: Mapping[str, str] | None = None, command: Sequence[str] = ()):
        self.port = free_port()
        self.name = f"rtp-llm-{secrets.token_hex(4)}"
        variables = [f"--env={name}={value}" for name, value in (env or {}).items()]
        published = f"--publish=127.0.0.1:{self.port}:10000"
        docker("run", "--detach", f"--name={self.name}", published, *variables, *options, IMAGE, *command)

    @property
    def log(self) -> str:
        return docker("logs", self.name)

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(docker("inspect", "--format={{json .State}}", self.name))
        return state

    def wait_healthy(self) -> Self:
        """Waits for 200 from /health. Raises AssertionError with the log if the container exits."""

        def is_healthy() -> bool:
            assert self.state["Running"], f"exited with {self.state['ExitCode']}\n{self.log}"
            return self.fetch("/health") == (200, '"ok"')

        wait_until(is_healthy, f"healthy\n{self.log}")
        return self

    def wait_exit(self) -> int:
        """Waits until the container exits and returns its exit code."""
        return int(docker("wait", self.name, timeout=DEADLINE_SECONDS))

    def stop(self) -> None:
        """Sends SIGTERM, and SIGKILL after a minute, as the compose file does."""
        docker("stop", "--time=60", self.name)

    def python(self, code: str) -> str:
        """Runs Python code in the container, because the image has neither ps nor kill."""
        return docker("exec", self.name, "python", "-c", code)

    def kill_rank(self, rank: int) -> None:
        """Sends SIGKILL to the process of a rank."""
        self.python(
            "import json, os, pathlib, psutil;"
            "worker = next(p for p in psutil.process_iter(['cmdline']) if 'rtp_llm.engine.main' in p.info['cmdline']);"
            "status = json.loads(pathlib.Path(worker.info['cmdline'][-2], 'gang.json').read_text());"
            f"os.kill(status['ranks']['{rank}']['pid'], 9)"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error:
            error.add_note(f"the container's log:\n{self.log}")
        docker("rm", "--force", "--volumes", self.name)


class Project(ContainerService):
    """`docker compose up` of the repository's compose file as a separate project, removed with its volumes."""

    def __init__(self, *profiles: str, services: Sequence[str] = (), env: Mapping[str, str] | None = None):
        """`services`: starts only these services of the profiles, and their dependencies."""
        self.port = free_port()
        self._services = services
        self.name = f"rtp-llm-{secrets.token_hex(4)}"
        self._env = {
            "RTP_IMAGE": IMAGE,
            "PORT": str(self.port),
            "COMPOSE_PROJECT_NAME": self.name,
            **(env or {}),
        }
        self._profiles = [argument for profile in profiles for argument in ("--profile", profile)]

    def compose(self, *arguments: str, check: bool = True) -> str:
        return docker("compose", *self._profiles, *arguments, env=self._env, check=check)

    def __enter__(self) -> Self:
        try:
            self.compose("up", "--detach", "--no-build", "--wait", "--wait-timeout", "60", *self._services)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error:
            error.add_note(self.compose("logs", "--no-color", check=False))
        self.compose("down", "--volumes", "--timeout", "20")
