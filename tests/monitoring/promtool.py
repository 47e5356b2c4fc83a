"""promtool, Prometheus's linter and rule tester: from PATH, or Debian's in a container."""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.container.engine import engine_unavailable_reason
from tests.container.prometheus import build_prometheus

REPOSITORY = Path(__file__).parents[2]


def promtool(*arguments: str, directory: Path = REPOSITORY, text: str = "") -> "subprocess.CompletedProcess[str]":
    """Runs promtool in `directory` with `text` as input. Skips the test if promtool is not available."""
    command = [*_promtool_command(directory), *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, cwd=directory, check=False)


def _promtool_command(directory: Path) -> list[str]:
    if shutil.which("promtool"):
        return ["promtool"]
    user = f"--user={os.getuid()}:{os.getgid()}"
    mount = f"--volume={directory}:{directory}:ro"
    return ["docker", "run", "--rm", "-i", user, mount, f"--workdir={directory}", "--entrypoint=promtool", _image()]


@cache
def _image() -> str:
    reason = engine_unavailable_reason()
    if reason:
        pytest.skip(f"promtool is not on PATH, and {reason}")
    return build_prometheus()
