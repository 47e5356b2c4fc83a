"""Prometheus's own linter and rule tester: the one on PATH, or Debian's in a container."""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.container.engine import engine_unavailable_reason
from tests.container.prometheus import build_prometheus

REPOSITORY = Path(__file__).parents[2]


def promtool(*arguments: str, folder: Path = REPOSITORY, text: str = "") -> "subprocess.CompletedProcess[str]":
    """Runs it with `text` as input; paths in `arguments` lie below `folder`. Skips the test where there is none."""
    command = [*_command(folder), *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, cwd=folder, check=False)


def _command(folder: Path) -> list[str]:
    if shutil.which("promtool"):
        return ["promtool"]
    user = f"--user={os.getuid()}:{os.getgid()}"
    mount = f"--volume={folder}:{folder}:ro"
    return ["docker", "run", "--rm", "-i", user, mount, f"--workdir={folder}", "--entrypoint=promtool", _image()]


@cache
def _image() -> str:
    reason = engine_unavailable_reason()
    if reason:
        pytest.skip(f"promtool is not on PATH, and {reason}")
    return build_prometheus()
