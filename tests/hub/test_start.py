"""`start_server` with the name of a model: from an empty cache to answers, and again without a hub."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.api.servers import REPOSITORY, running_server
from tests.hub.fake_hub import FakeHub, demo_model, running_hub
from tests.ports import free_start_port


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running_hub(org__demo=demo_model()) as running:
        yield running


@pytest.mark.slow
def test_serves_a_model_by_its_name(hub: FakeHub, tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "CHECKPOINT_PATH": "org/demo@main"}
    assert_answers(tmp_path / "first", settings)
    num_requests = len(hub.requests)
    assert_answers(tmp_path / "second", settings)
    assert_answers(tmp_path / "without a hub", settings | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert len(hub.requests) == num_requests, "what the cache has needs no hub"
    assert "downloading org/demo@main: 0% of 7.9 MB" in (tmp_path / "first").read_text()


def assert_answers(output: Path, settings: dict[str, str]) -> None:
    with running_server(Path("org/demo"), output, **settings) as server, server.client() as client:
        [card] = client.get("/v1/models").json()["data"]
        assert card["id"] == "org/demo"
        body = {"messages": [{"role": "user", "content": "How do I start it?"}], "max_tokens": 3}
        assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_a_stop_ends_the_download(hub: FakeHub, tmp_path: Path) -> None:
    hub.gate.clear()
    port = free_start_port()
    environ = {"PATH": os.environ["PATH"], "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "RTP_DEVICE": "cpu"}
    environ |= {"CHECKPOINT_PATH": "org/demo", "START_PORT": str(port), "RTP_DOCTOR": "off"}
    with subprocess.Popen([sys.executable, "-m", "rtp_llm.start_server"], env=environ, cwd=REPOSITORY) as process:
        assert hub.started.wait(60)
        assert httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).json()["phase"] == "download"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)


def test_a_wrong_name_exits_64_and_says_both_readings(hub: FakeHub, tmp_path: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "RTP_DEVICE": "cpu"}
    environ |= {"CHECKPOINT_PATH": "org/dmeo", "START_PORT": str(free_start_port()), "RTP_DOCTOR": "off"}
    command = [sys.executable, "-m", "rtp_llm.start_server"]
    process = subprocess.run(command, env=environ, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert process.returncode == 64, process.stdout
    assert "org/dmeo: is not an existing folder" in process.stdout
    assert f"{hub.url} has no such model" in process.stdout
    assert "did you mean org/demo?" in process.stdout
