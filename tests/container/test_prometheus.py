"""A real Prometheus, Debian's, with the shipped configuration: it finds every part, and cries when one is gone."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.container.engine import REPOSITORY, Project, Service, free_port, until

IMAGE = "rtp-llm-prometheus:under-test"
DOCKERFILE = """\
FROM debian:bookworm-slim
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus && mkdir -p /prometheus
ENTRYPOINT ["prometheus"]
"""
PATIENCE = 150.0  # seconds: an alert waits on purpose before it fires


class Prometheus(Service):
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


@pytest.fixture(scope="module")
def prometheus_image(image: str) -> str:
    done = subprocess.run(
        ["docker", "buildx", "build", "--quiet", "--load", "--network=host", f"--tag={IMAGE}", "-"],
        input=DOCKERFILE,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    if done.returncode:
        pytest.skip(f"Debian's Prometheus cannot be had: {done.stderr.strip().splitlines()[-1]}")
    return IMAGE


@pytest.fixture(scope="module")
def watched(prometheus_image: str) -> Iterator[tuple[Project, Prometheus]]:
    port = free_port()
    env = {"PROMETHEUS_IMAGE": prometheus_image, "PROMETHEUS_PORT": str(port)}
    with Project("gang", "monitoring", services=("part0", "part1", "prometheus"), env=env) as project:
        yield project, Prometheus(port)


def test_it_scrapes_every_part(watched: tuple[Project, Prometheus]) -> None:
    project, prometheus = watched
    until(lambda: list(prometheus.values('up{job="rtp-llm"}').values()) == [1.0, 1.0], "both parts up")
    project.complete({"prompt": "Hello", "max_tokens": 32, "ignore_eos": True})
    until(lambda: sum(prometheus.values("rtp_llm_generation_tokens_total").values()) >= 32, "the tokens that were made")
    ready = until(lambda: prometheus.values("rtp_llm_ready"), "the parts' own word")
    assert list(ready.values()) == [1.0, 1.0]


def test_it_knows_all_rules_and_none_fires_on_a_healthy_gang(watched: tuple[Project, Prometheus]) -> None:
    prometheus = watched[1]
    groups = until(lambda: prometheus.ask("rules"), "its rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert rules
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}, "unknown: not evaluated yet"
    assert prometheus.firing() == set()


def test_an_alert_fires_when_a_part_is_stopped(watched: tuple[Project, Prometheus]) -> None:
    project, prometheus = watched
    project.compose("stop", "part1")
    fired = until(prometheus.firing, "an alert", PATIENCE)
    assert any("Gang" in name or "Ready" in name or "Member" in name for name in fired), fired
