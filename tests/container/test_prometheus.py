"""A real Prometheus, Debian's, with the shipped configuration: it finds every part, and cries when one is gone."""

from collections.abc import Iterator

import pytest

from tests.container.engine import Project, free_port, until
from tests.container.prometheus import Prometheus, build_prometheus

PATIENCE = 150.0  # seconds: an alert waits on purpose before it fires


@pytest.fixture(scope="module")
def prometheus_image(image: str) -> str:
    return build_prometheus()


@pytest.fixture(scope="module")
def watched(prometheus_image: str) -> Iterator[tuple[Project, Prometheus]]:
    port = free_port()
    env = {"PROMETHEUS_IMAGE": prometheus_image, "PROMETHEUS_PORT": str(port)}
    with Project("gang", "monitoring", services=("part0", "part1", "prometheus"), env=env) as project:
        yield project, Prometheus(port)


def test_it_scrapes_every_part(watched: tuple[Project, Prometheus]) -> None:
    project, prometheus = watched
    until(lambda: prometheus.values('up{job="rtp-llm"}') == {"part0:10000": 1.0, "part1:10000": 1.0}, "both parts up")
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
