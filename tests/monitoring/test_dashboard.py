"""Compares the Grafana dashboard and the manual's table of metrics with the metrics of a running part."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from image.grafana.make_dashboard import dashboard
from tests import random_model
from tests.api.servers import running_server
from tests.monitoring.promtool import REPOSITORY, promtool

GRAFANA = REPOSITORY / "image" / "grafana"
MANUAL = REPOSITORY / "docs" / "monitoring.md"
NAME = re.compile(r"\brtp_llm_[a-z_0-9]+")
VARIABLES = {"$model": ".*", "$instance": ".*", "$__rate_interval": "1m"}


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    shipped_dashboard: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "rtp-llm.json").read_text())
    return shipped_dashboard


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Metric]]:
    """The metrics of two ranks that have served a request."""
    directory = tmp_path_factory.mktemp("monitoring")
    random_model.write(directory / "model")
    settings = {"TP_SIZE": "2", "WORLD_SIZE": "2", "TEST_BLOCK_NUM": "64"}
    with running_server(directory / "model", directory / "output", **settings) as server, server.client() as client:
        client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 4}).raise_for_status()
        yield list(text_string_to_metric_families(client.get("/metrics").text))


def queries(shipped: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in shipped["panels"] for target in panel.get("targets", ())]


def names(scraped: list[Metric]) -> set[str]:
    """Returns the names of all series, including those of families without samples, such as those of GPUs."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {f"{family.name}{suffix}" for family in scraped for suffix in suffixes.get(family.type, ("",))}


def test_the_dashboard_is_current(shipped: dict[str, Any]) -> None:
    """To regenerate it: python image/grafana/make_dashboard.py > image/grafana/dashboards/rtp-llm.json"""
    assert shipped == dashboard()


@pytest.mark.slow
def test_every_metric_of_the_dashboard_exists(shipped: dict[str, Any], scraped: list[Metric]) -> None:
    variables = [v["query"] for v in shipped["templating"]["list"]]
    queried_names = {name for query in [*queries(shipped), *variables] for name in NAME.findall(query)}
    assert len(queried_names) > 50
    assert queried_names <= names(scraped)


@pytest.mark.slow
def test_every_metric_of_the_alerts_exists(scraped: list[Metric]) -> None:
    groups = yaml.safe_load((REPOSITORY / "image" / "prometheus" / "alerts.yml").read_text())["groups"]
    assert {name for group in groups for rule in group["rules"] for name in NAME.findall(rule["expr"])} <= names(
        scraped
    )


def test_every_query_parses(shipped: dict[str, Any], tmp_path: Path) -> None:
    """promtool parses the queries as recording rules."""
    rules = []
    for number, query in enumerate(queries(shipped)):
        for variable, value in VARIABLES.items():
            query = query.replace(variable, value)
        assert "$" not in query
        rules.append({"record": f"panel:{number}", "expr": query})
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    result = promtool("check", "rules", "rules.yml", directory=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_panels_do_not_overlap(shipped: dict[str, Any]) -> None:
    used_cells: set[tuple[int, int]] = set()
    for panel in shipped["panels"]:
        pos = panel["gridPos"]
        cells = {(pos["x"] + i, pos["y"] + j) for i in range(pos["w"]) for j in range(pos["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & used_cells, panel["title"]
        used_cells |= cells


def test_grafana_provisioning_matches_the_compose_file() -> None:
    [source] = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
    [provider] = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "rtp-llm.yml").read_text())["providers"]
    services = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["services"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert mounts["./image/grafana/dashboards"] == provider["options"]["path"]
    assert source["url"] == f"http://prometheus:{services['prometheus']['ports'][0].rsplit(':', 1)[1]}"


def table(scraped: list[Metric]) -> str:
    lines = ["| Metric | Type | Meaning |", "| --- | --- | --- |"]
    for family in sorted(scraped, key=lambda family: family.name):
        name = family.name + ("_total" if family.type == "counter" else "")
        lines.append(f"| `{name}` | {family.type} | {family.documentation} |")
    return "\n".join(lines)


@pytest.mark.slow
def test_the_manual_lists_every_metric(scraped: list[Metric]) -> None:
    """To regenerate it: copy the output of this test between the marks in docs/monitoring.md."""
    expected = table(scraped)
    print(expected)
    assert MANUAL.read_text().split("<!-- metrics -->\n")[1].split("\n<!-- /metrics -->")[0] == expected
