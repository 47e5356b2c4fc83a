"""What the tests with real processes share: a checkpoint, what one rank alone says, the logs of a test that fails."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
    """Shows what the running parts have said where a test fails."""
    report: pytest.TestReport = yield  # type: ignore[misc, assignment]
    if report.failed:
        report.sections += [(f"part on port {part.port}", part.log) for part in parts.running]
    return report  # type: ignore[return-value]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, as `make serve` would write it."""
    path = tmp_path_factory.mktemp("demo") / "model"
    subprocess.run([sys.executable, "-m", "tests.random_model", str(path)], cwd=REPOSITORY, check=True)
    return path


@pytest.fixture(scope="session")
def settings(checkpoint: Path) -> dict[str, str]:
    """What every part is told beside its place in the gang: the model, and to be quick about it."""
    return {
        "MODEL_TYPE": "qwen_3",
        "CHECKPOINT_PATH": str(checkpoint),
        "TOKENIZER_PATH": str(checkpoint),
        "RTP_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "WARM_UP": "0",
        "TEST_BLOCK_NUM": "64",
        "HEARTBEAT_TIMEOUT": "3",
        "RESTART_LIMIT": "10",
    }


@pytest.fixture(scope="session")
def alone(settings: dict[str, str]) -> Iterator[Part]:
    """One rank without any others. A test may end it: all that the others want of it is `expected`."""
    port = free_start_port()
    with Part({**settings, "START_PORT": str(port), "SHUTDOWN_TIMEOUT": "1"}, port=port) as part:
        yield part.wait_healthy()


@pytest.fixture(scope="session")
def expected(alone: Part) -> dict[str, str]:
    """What one rank alone answers to each of BODIES: any number of ranks, and any accident, must leave it the same."""
    return {name: alone.complete(body) for name, body in BODIES.items()}
