"""A real Docker engine, driven by its own client: containers, compose projects, and what they leave behind."""

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
DEADLINE = 90.0  # seconds for anything that a container does
T = TypeVar("T")


def no_engine() -> str:
    """Why no container can be run here; empty where one can."""
    if not shutil.which("docker"):
        return "there is no docker client"
    done = subprocess.run(["docker", "info"], capture_output=True, text=True)
    if done.returncode:
        return "no Docker engine answers: " + (done.stderr.strip().splitlines() or ["?"])[-1]
    if subprocess.run(["docker", "buildx", "version"], capture_output=True).returncode:
        return "the docker client has no buildx"
    return ""


def docker(*words: str, check: bool = True, env: Mapping[str, str] | None = None, timeout: float = 900) -> str:
    """What the client prints on both streams. Raises AssertionError with it where the command fails."""
    done = subprocess.run(
        ["docker", *words],
        cwd=REPOSITORY,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert not check or done.returncode == 0, f"docker {' '.join(words)}: {done.returncode}\n{done.stdout}"
    return done.stdout.strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], T | None], what: str, seconds: float = DEADLINE) -> T:
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)


class ContainerService:
    """Whatever answers HTTP on a port of this machine."""

    port: int

    def fetch(self, path: str, body: Any = None) -> tuple[int, str]:
        """(status, text); status 0: nobody answers."""
        return fetch(f"http://127.0.0.1:{self.port}{path}", None if body is None else json.dumps(body))

    def complete(self, body: Mapping[str, Any]) -> str:
        status, text = self.fetch("/v1/completions", dict(body))
        assert status == 200, f"{status}: {text}"
        return str(json.loads(text)["choices"][0]["text"])


class Container(ContainerService):
    """`docker run -d` of the image; a context manager that removes it, and shows its log when a test fails."""

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
        """By /health, at once an error where the container ends before."""

        def look() -> bool:
            assert self.state["Running"], f"ended with {self.state['ExitCode']}\n{self.log}"
            return self.fetch("/health") == (200, '"ok"')

        until(look, f"healthy\n{self.log}")
        return self

    def wait_end(self) -> int:
        """The exit code that Docker was given."""
        return int(docker("wait", self.name, timeout=DEADLINE))

    def stop(self) -> None:
        """SIGTERM, and a minute until SIGKILL, as the compose file says."""
        docker("stop", "--time=60", self.name)

    def python(self, code: str) -> str:
        """Runs Python in the container: the image has neither ps nor kill."""
        return docker("exec", self.name, "python", "-c", code)

    def kill_rank(self, rank: int) -> None:
        """SIGKILL to the process of a rank."""
        self.python(
            "import os, psutil;"
            f"[os.kill(p.pid, 9) for p in psutil.process_iter(['cmdline'])"
            f" if 'rtp_llm.engine.main' in p.info['cmdline'] and p.info['cmdline'][-1] == '{rank}']"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error:
            error.add_note(f"the container's log:\n{self.log}")
        docker("rm", "--force", "--volumes", self.name)


class Project(ContainerService):
    """`docker compose up` of the repository's own file, under a name of its own; taken down with its volumes."""

    def __init__(self, *profiles: str, services: Sequence[str] = (), env: Mapping[str, str] | None = None):
        """`services`: only these of the profiles, and what they depend on."""
        self.port = free_port()
        self._services = services
        self.name = f"rtp-llm-{secrets.token_hex(4)}"
        self._env = {
            "RTP_IMAGE": IMAGE,
            "PORT": str(self.port),
            "COMPOSE_PROJECT_NAME": self.name,
            **(env or {}),
        }
        self._profiles = [word for profile in profiles for word in ("--profile", profile)]

    def compose(self, *words: str, check: bool = True) -> str:
        return docker("compose", *self._profiles, *words, env=self._env, check=check)

    def __enter__(self) -> Self:
        try:
            self.compose("up", "--detach", "--no-build", "--wait", "--wait-timeout", "60", *self._services)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error:
            error.add_note(self.compose("logs", "--no-color", check=False))
        self.compose("down", "--volumes", "--timeout", "20")
