"""Fixtures of the tests with real processes: a checkpoint, outputs of a single rank, logs of failed tests."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.parallel import parts
from tests.parallel.parts import REPOSITORY, Part
from tests.ports import free_start_port

PROMPT = {"prompt": "A large language model is", "max_tokens": 80, "ignore_eos": True}
GREEDY: dict[str, Any] = {**PROMPT, "temperature": 0}
SEEDED: dict[str, Any] = {**PROMPT, "temperature": 1.0, "seed": 7}
SHORT: dict[str, Any] = {**GREEDY, "max_tokens": 12}
BODIES = {"greedy": GREEDY, "seeded": SEEDED, "short": SHORT}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Adds the logs of all running parts to the report of a failed test."""
    report: pytest.TestReport = yield  # type: ignore[misc, assignment]
    if report.failed:
        report.sections += [(f"part on port {part.port}", part.log) for part in parts.running_parts]
    return report  # type: ignore[return-value]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights."""
    path = tmp_path_factory.mktemp("demo") / "model"
    subprocess.run([sys.executable, "-m", "tests.random_model", str(path)], cwd=REPOSITORY, check=True)
    return path


@pytest.fixture(scope="session")
def settings(checkpoint: Path) -> dict[str, str]:
    """Settings of all parts, except their rank in the gang: the model, and small sizes for a fast start."""
    return {
        "MODEL_TYPE": "qwen_3",
        "CHECKPOINT_PATH": str(checkpoint),
        "TOKENIZER_PATH": str(checkpoint),
        "RTP_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "WARM_UP": "0",
        "TEST_BLOCK_NUM": "64",
        "RESTART_LIMIT": "10",
    }


@pytest.fixture(scope="session")
def single_rank(settings: dict[str, str]) -> Iterator[Part]:
    """A running part with TP_SIZE=1. A test may stop it after `expected` has read its outputs."""
    port = free_start_port()
    with Part({**settings, "START_PORT": str(port), "SHUTDOWN_TIMEOUT": "1"}, port=port) as part:
        yield part.wait_healthy()


@pytest.fixture(scope="session")
def expected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Outputs of a single rank for each request of BODIES. More ranks or a recovered fault must not change them.

    The first pytest worker that needs the outputs starts the part and saves them in a file for the other workers.
    """
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "expected.json"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            part: Part = request.getfixturevalue("single_rank")
            path.write_text(json.dumps({name: part.complete(body) for name, body in BODIES.items()}))
    outputs: dict[str, str] = json.loads(path.read_text())
    return outputs
