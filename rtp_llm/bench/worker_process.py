"""A child process that answers each line of JSON on its stdin with a line of JSON on its stdout. It runs either an
engine of `rtp_llm.bench.peers`, or `rtp_llm.bench.probe`, which measures the machine's memory bandwidth and operations
per second.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Self

import rtp_llm
from rtp_llm.errors import FatalError
from rtp_llm.machine.process import die_with_parent


class WorkerError(FatalError):
    """A child process exited, or could not load its engine."""


@contextmanager
def bare_package() -> Iterator[Path]:
    """Yields a temporary folder that contains only the package rtp_llm, as a link. With this folder as its PYTHONPATH,
    another Python interpreter can import rtp_llm.

    The site-packages folder in which rtp_llm may be installed would hide the other interpreter's own packages.
    """
    with tempfile.TemporaryDirectory(prefix="rtp-bench-") as folder:
        (Path(folder) / "rtp_llm").symlink_to(Path(rtp_llm.__file__).parent)
        yield Path(folder)


def run_module(python: str, module: str, *args: str) -> None:
    """Runs `python -m MODULE ARGS` until it exits. Raises WorkerError, with the end of its stderr, if its exit code is
    not 0.
    """
    with bare_package() as folder:
        command = [python, "-m", module, *args]
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        completed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if completed.returncode:
        raise WorkerError(
            f"{' '.join(command)} ended with exit code {completed.returncode}:\n{completed.stderr[-2000:]}"
        )


class WorkerProcess:
    """`python -m MODULE ARGS` as a child process, which starts when this object is created. As a context manager, kills
    the process on exit.
    """

    def __init__(self, module: str, *args: str, python: str = sys.executable):
        """`python`: an interpreter with the packages that the module needs; it need not have this package."""
        self.module = module
        self._resources = ExitStack()
        folder = self._resources.enter_context(bare_package())
        self._log = self._resources.enter_context((folder / "log").open("w+b"))
        self._process = subprocess.Popen(
            [python, "-m", module, *args],
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            preexec_fn=die_with_parent,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._stdout.close()
        self._resources.close()

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """Sends a command and returns the reply. Raises WorkerError with the end of the log if the process exits."""
        try:
            self._stdin.write(json.dumps(command).encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:
            pass  # `read` says why
        return self.read()

    def read(self) -> dict[str, Any]:
        """Waits for the next reply and returns it. Raises WorkerError with the end of the log if the process exits."""
        line = self._stdout.readline()
        if not line.endswith(b"\n"):
            code = self._process.wait()
            self._log.seek(0)
            end = self._log.read()[-2000:].decode(errors="replace")
            raise WorkerError(f"{self.module} ended with exit code {code}; end of its log:\n{end}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin
        return self._process.stdin

    @property
    def _stdout(self) -> IO[bytes]:
        assert self._process.stdout
        return self._process.stdout
