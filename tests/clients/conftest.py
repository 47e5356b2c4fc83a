"""The server that the clients talk to."""

from collections.abc import Iterator

import pytest

from tests.clients import two_tools
from tests.clients.scripted_model import ScriptedServer


@pytest.fixture(scope="module")  # it takes each error that is logged meanwhile for its own
def two_tools_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    """A server whose model solves the task of `two_tools`."""
    with ScriptedServer(tmp_path_factory.mktemp("scripted"), two_tools.answer) as server:
        yield server
