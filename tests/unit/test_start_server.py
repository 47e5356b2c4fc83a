"""Functions of start_server that need no server."""

import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rtp_llm.errors import ConfigError
from rtp_llm.start_server import _wake, raise_open_files_limit

DEADLINE = 30.0


@pytest.fixture
def child() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that runs until it is killed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_wakes_supervisord_as_soon_as_it_listens(child: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    path = tmp_path / "supervisor.sock"
    thread = threading.Thread(target=_wake, args=(child, path), daemon=True)
    thread.start()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(DEADLINE)
        listener.bind(str(path))
        time.sleep(0.05)  # connections are refused between bind and listen
        listener.listen()
        listener.accept()[0].close()
    thread.join(DEADLINE)
    assert not thread.is_alive()


def test_does_not_wait_for_a_supervisord_that_has_exited(
    child: "subprocess.Popen[bytes]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rtp_llm.start_server.WAKE_TIMEOUT_SECONDS", 3600)
    thread = threading.Thread(target=_wake, args=(child, tmp_path / "supervisor.sock"), daemon=True)
    thread.start()
    child.kill()
    thread.join(DEADLINE)
    assert not thread.is_alive()


def test_a_low_hard_limit_of_open_files_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (200, 256))
    with pytest.raises(ConfigError, match=r"only 256 files.*at least 1024.*ulimit -n 1048576.*--ulimit nofile=1048576"):
        raise_open_files_limit()
