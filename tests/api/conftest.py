"""What the tests of the API share: two real servers for the whole session, and the API alone before a fake engine."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import random_model
from tests.api.api_server import ApiServer
from tests.api.byte_model import ByteModel
from tests.api.fake_engine import Script
from tests.api.servers import ServerProcess, running_server

StartApi = Callable[..., ApiServer]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api") / "demo"
    random_model.write(folder)
    return folder


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The demo model with the usual settings."""
    with running_server(checkpoint, tmp_path_factory.mktemp("server") / "output") as started:
        yield started


@pytest.fixture(scope="session")
def small_server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The demo model with room for one sequence, one that waits, and short ones: also what the fuzzers may hurt."""
    output = tmp_path_factory.mktemp("small") / "output"
    limits = {"CONCURRENCY_LIMIT": "1", "QUEUE_LIMIT": "1", "MAX_SEQ_LEN": "256", "SERVED_MODEL_NAME": "small"}
    with running_server(checkpoint, output, DISABLE_ACCESS_LOG="1", **limits) as started:
        yield started


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> ByteModel:
    return ByteModel(tmp_path_factory.mktemp("bytes"))


@pytest.fixture
def start_api(byte_model: ByteModel) -> Iterator[StartApi]:
    """Starts the API before a fake engine: `stacks(script, concurrency_limit=1)`."""
    with ExitStack() as started:

        def start(script: Script | None = None, **settings: Any) -> ApiServer:
            return started.enter_context(ApiServer(byte_model, script, **settings))

        yield start
