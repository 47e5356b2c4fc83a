"""Tests of the shipped configuration on Debian's Prometheus: it scrapes every part and alerts on a stopped one."""

from collections.abc import Iterator

import pytest

from tests.container.engine import Project, free_port, wait_until
from tests.container.prometheus import Prometheus, build_prometheus

pytestmark = pytest.mark.slow

ALERT_TIMEOUT_SECONDS = 150.0  # longer than the `for` of the alerts


@pytest.fixture(scope="module")
def prometheus_image(image: str) -> str:
    return build_prometheus()


@pytest.fixture(scope="module")
def monitored_gang(prometheus_image: str) -> Iterator[tuple[Project, Prometheus]]:
    port = free_port()
    env = {"PROMETHEUS_IMAGE": prometheus_image, "PROMETHEUS_PORT": str(port)}
    with Project("gang", "monitoring", services=("part0", "part1", "prometheus"), env=env) as project:
        yield project, Prometheus(port)


def test_prometheus_scrapes_every_part(monitored_gang: tuple[Project, Prometheus]) -> None:
    project, prometheus = monitored_gang
    wait_until(
        lambda: prometheus.values('up{job="rtp-llm"}') == {"part0:10000": 1.0, "part1:10000": 1.0}, "both parts up"
    )
    project.complete({"prompt": "Hello", "max_tokens": 32, "ignore_eos": True})
    wait_until(lambda: sum(prometheus.values("rtp_llm_generation_tokens_total").values()) >= 32, "the generated tokens")
    # Each part has a scrape interval of its own: what Prometheus knows of one may be older than the completion.
    wait_until(lambda: list(prometheus.values("rtp_llm_ready").values()) == [1.0, 1.0], "rtp_llm_ready of both parts")


def test_rules_load_and_none_fires_on_a_healthy_gang(monitored_gang: tuple[Project, Prometheus]) -> None:
    prometheus = monitored_gang[1]
    groups = wait_until(lambda: prometheus.get("rules"), "the rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert rules
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}, "unknown: not evaluated yet"
    assert prometheus.firing_alerts() == set()


def test_alert_fires_if_a_part_is_stopped(monitored_gang: tuple[Project, Prometheus]) -> None:
    project, prometheus = monitored_gang
    project.compose("stop", "part1")
    alerts = wait_until(prometheus.firing_alerts, "an alert", ALERT_TIMEOUT_SECONDS)
    assert any("Gang" in name or "Ready" in name or "Member" in name for name in alerts), alerts
