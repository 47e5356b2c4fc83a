"""The clients that come from npm, which `make test-clients` installs in build/clients (`package.json` here)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.api.servers import REPOSITORY

FOLDER = REPOSITORY / "build/clients"
TIMEOUT_SECONDS = 240.0  # an agent starts in two seconds on an idle machine


def command(name: str) -> str:
    """Returns the path of an installed command. Skips the test where there is none."""
    path = shutil.which(name, path=f"{FOLDER}/node_modules/.bin{os.pathsep}{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"{name} is not installed: make test-clients")
    return path


def run(arguments: list[str], home: Path, folder: Path, **environment: str) -> str:
    """Runs a command in `folder` and returns what it writes to stdout. It sees nothing of the user's settings."""
    completed = subprocess.run(
        arguments,
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(home), "NO_COLOR": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert completed.returncode == 0, f"{arguments[0]}: {completed.stdout[-2000:]}\n{completed.stderr[-2000:]}"
    return completed.stdout
