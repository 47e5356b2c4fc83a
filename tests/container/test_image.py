"""Tests of the image: size, labels, contents, user and file system."""

import json

import pytest

from tests.container.engine import Container, docker

pytestmark = pytest.mark.slow

MAX_IMAGE_BYTES = 1.3e9


def test_image_is_small_enough(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    size = int(docker("image", "inspect", "--format={{.Size}}", image))
    with capsys.disabled():
        print(f" {size / 1e6:.0f} MB")
    assert size <= MAX_IMAGE_BYTES


def test_image_has_user_healthcheck_and_labels(image: str) -> None:
    config = json.loads(docker("image", "inspect", "--format={{json .Config}}", image))
    assert config["User"] == "10000:0"
    assert config["Healthcheck"]["Test"] == ["CMD", "healthcheck"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.title"] == "rtp-llm"


def test_image_has_no_build_tools(image: str) -> None:
    script = "command -v gcc make pip git curl; python -m pip --version; ls /build /wheels; true"
    out = docker("run", "--rm", image, "sh", "-c", script)
    assert "gcc" not in out
    assert "No module named pip" in out
    assert out.count("No such file or directory") == 2


def test_doctor_runs_in_the_image(image: str) -> None:
    out = docker("run", "--rm", image, "rtp-llm-doctor", "-o", "json")
    report = json.loads(out)
    assert report["verdict"] == "ok", out
    assert report["node"]["runtime"] == "docker"


def test_arbitrary_uid_on_read_only_root_serves(image: str) -> None:
    """The container runs as in OpenShift; only /tmp is writable."""
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


def test_read_only_root_without_tmpfs_exits_64_with_fix(image: str) -> None:
    with Container("--read-only") as container:
        assert container.wait_exit() == 64
        assert "L-11 /tmp is on a read-only file system" in container.log
        assert "docker run --tmpfs /tmp:exec" in container.log
