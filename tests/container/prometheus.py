"""Debian's Prometheus as an image, and what a running one knows."""

import json
import subprocess
from typing import Any
from urllib.parse import quote

import pytest

from tests.container.engine import REPOSITORY, ContainerService

IMAGE = "rtp-llm-prometheus:under-test"
DOCKERFILE = """\
FROM debian:bookworm-slim
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus && mkdir -p /prometheus
ENTRYPOINT ["prometheus"]
"""


def build_prometheus() -> str:
    """Skips the test where the package cannot be had."""
    done = subprocess.run(
        ["docker", "buildx", "build", "--quiet", "--load", "--network=host", f"--tag={IMAGE}", "-"],
        input=DOCKERFILE,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    if done.returncode:
        pytest.skip(f"Debian's Prometheus cannot be had: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return IMAGE


class Prometheus(ContainerService):
    """Its HTTP API."""

    def __init__(self, port: int):
        self.port = port

    def ask(self, path: str) -> Any:
        status, text = self.fetch(f"/api/v1/{path}")
        return json.loads(text)["data"] if status == 200 else None

    def values(self, query: str) -> dict[str, float]:
        """Value by instance of an instant vector."""
        answer = self.ask(f"query?query={quote(query)}")
        return {r["metric"].get("instance", ""): float(r["value"][1]) for r in answer["result"]} if answer else {}

    def firing(self) -> set[str]:
        answer = self.ask("alerts")
        return {a["labels"]["alertname"] for a in answer["alerts"] if a["state"] == "firing"} if answer else set()
