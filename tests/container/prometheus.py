"""Builds an image of Debian's Prometheus and queries a running one."""

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
    """Builds the image and returns its tag. Skips the test if the package cannot be installed."""
    completed = subprocess.run(
        ["docker", "buildx", "build", "--quiet", "--load", "--network=host", f"--tag={IMAGE}", "-"],
        input=DOCKERFILE,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    if completed.returncode:
        pytest.skip(f"Debian's Prometheus cannot be installed: {(completed.stderr.strip().splitlines() or ['?'])[-1]}")
    return IMAGE


class Prometheus(ContainerService):
    """Client of the HTTP API of a running Prometheus."""

    def __init__(self, port: int):
        self.port = port

    def get(self, path: str) -> Any:
        """Returns the `data` of the response; None if the request fails."""
        status, text = self.fetch(f"/api/v1/{path}")
        return json.loads(text)["data"] if status == 200 else None

    def values(self, query: str) -> dict[str, float]:
        """Returns the values of an instant query, by instance."""
        data = self.get(f"query?query={quote(query)}")
        return {r["metric"].get("instance", ""): float(r["value"][1]) for r in data["result"]} if data else {}

    def firing_alerts(self) -> set[str]:
        data = self.get("alerts")
        return {a["labels"]["alertname"] for a in data["alerts"] if a["state"] == "firing"} if data else set()
