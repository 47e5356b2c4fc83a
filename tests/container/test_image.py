"""The image: what is in it, what is not, and as whom it runs."""

import json

import pytest

from tests.container.engine import Container, docker

LARGEST = 1.3e9  # bytes


def test_its_size(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    size = int(docker("image", "inspect", "--format={{.Size}}", image))
    with capsys.disabled():
        print(f" {size / 1e6:.0f} MB")
    assert size <= LARGEST


def test_what_it_says_of_itself(image: str) -> None:
    config = json.loads(docker("image", "inspect", "--format={{json .Config}}", image))
    assert config["User"] == "10000:0"
    assert config["Healthcheck"]["Test"] == ["CMD", "healthcheck"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.title"] == "rtp-llm"


def test_nothing_of_the_build_is_left(image: str) -> None:
    script = "command -v gcc make pip git curl; python -m pip --version; ls /build /wheels; true"
    out = docker("run", "--rm", image, "sh", "-c", script)
    assert "gcc" not in out
    assert "No module named pip" in out
    assert out.count("No such file or directory") == 2


def test_the_doctor_is_at_hand(image: str) -> None:
    out = docker("run", "--rm", image, "rtp-llm-doctor", "-o", "json")
    report = json.loads(out)
    assert report["verdict"] == "ok", out
    assert report["node"]["runtime"] == "docker"


def test_an_arbitrary_uid_on_a_read_only_root(image: str) -> None:
    """As OpenShift runs it; only /tmp can be written."""
    options = (
        "--user=1000910000:0",
        "--read-only",
        "--tmpfs=/tmp",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
    )
    with Container(*options, env={"TP_SIZE": "2"}) as container:
        container.wait_healthy()
        assert container.complete({"prompt": "Hello", "max_tokens": 4})
        assert container.python("import os; print(os.getuid())") == "1000910000"


def test_a_read_only_root_without_a_tmpfs_is_told_what_it_lacks(image: str) -> None:
    with Container("--read-only") as container:
        assert container.wait_end() == 64
        assert "L-11 /tmp is on a read-only file system" in container.log
        assert "docker run --tmpfs /tmp:exec" in container.log
