"""Fixtures of the API tests: two real servers per pytest run, and the API alone with a fake engine."""

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
    directory = tmp_path_factory.mktemp("api") / "demo"
    random_model.write(directory)
    return directory


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of the demo model with the usual settings."""
    with running_server(checkpoint, tmp_path_factory.mktemp("server") / "output") as server:
        yield server


@pytest.fixture(scope="session")
def small_server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with one running and one queued sequence and a small MAX_SEQ_LEN, also used by the fuzz tests."""
    output = tmp_path_factory.mktemp("small") / "output"
    limits = {"CONCURRENCY_LIMIT": "1", "QUEUE_LIMIT": "1", "MAX_SEQ_LEN": "256", "SERVED_MODEL_NAME": "small"}
    with running_server(checkpoint, output, DISABLE_ACCESS_LOG="1", **limits) as server:
        yield server


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> ByteModel:
    return ByteModel(tmp_path_factory.mktemp("bytes"))


@pytest.fixture
def start_api(byte_model: ByteModel) -> Iterator[StartApi]:
    """Returns a function that starts the API with a fake engine: `start_api(script, concurrency_limit=1)`.

    `script`: returns the engine's outputs for a submitted sequence. The keyword arguments are settings of the server.
    """
    with ExitStack() as exit_stack:

        def start(script: Script | None = None, **settings: Any) -> ApiServer:
            return exit_stack.enter_context(ApiServer(byte_model, script, **settings))

        yield start
