"""The report's machine-readable formats, read by other tools: JSON Schema, XML and Prometheus parsers."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema_rs
import pytest
from prometheus_client.parser import text_string_to_metric_families

from doctor.check import Status
from doctor.render import ASCII, STATUS_NUMBERS, Style, junit, prometheus
from doctor.report import SCHEMA, Report
from doctor.runtime import Runtime
from tests.doctor.faulty import FAULTS, faulty_report
from tests.doctor.fixtures import REPOSITORY, doctor

PUBLISHED = REPOSITORY / "docs" / "doctor-schema.json"
STYLE = Style(ASCII, False)


@pytest.fixture(scope="module")
def validator() -> jsonschema_rs.Draft202012Validator:
    schema = json.loads(PUBLISHED.read_text())
    jsonschema_rs.meta.validate(schema)
    return jsonschema_rs.Draft202012Validator(schema)


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    return faulty_report(tmp_path, Runtime.DOCKER, monkeypatch)


def test_the_published_schema_is_current() -> None:
    process = doctor("schema")
    assert process.returncode == 0
    assert PUBLISHED.read_text() == process.stdout, "rtp-llm-doctor schema > docs/doctor-schema.json"


@pytest.mark.parametrize(
    ("arguments", "env"),
    [
        ((), {}),
        (("--only", "shared memory"), {}),
        (("--strict", "--ignore", "M-08"), {"CHECKPOINT_PATH": "org/model", "TP_SZIE": "2"}),
        (("--tier", "1", "--", "--tp_size", "2"), {"NCCL_SOCKET_IFNAME": "nothing"}),
    ],
    ids=["plain", "only", "ignored", "tier1"],
)
def test_real_output_is_valid(
    arguments: tuple[str, ...], env: dict[str, str], validator: jsonschema_rs.Draft202012Validator
) -> None:
    process = doctor("-o", "json", *arguments, env={"START_PORT": "19871", **env})
    data = json.loads(process.stdout)
    assert [error.message for error in validator.iter_errors(data)] == []
    assert data["schema"] == SCHEMA
    assert data["exit_code"] == process.returncode
    assert process.stderr == ""


def test_a_report_of_many_faults_is_valid_and_reads_back(
    report: Report, validator: jsonschema_rs.Draft202012Validator
) -> None:
    text = report.to_json()
    assert [error.message for error in validator.iter_errors(json.loads(text))] == []
    assert Report.model_validate_json(text) == report


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("verdict",), "fine"),
        (("checks", 0, "status"), "green"),
        (("checks", 0, "severity"), "ok"),
        (("checks", 0, "fix", "podman"), "…"),
        (("node", "runtime"), "podman"),
        (("extra",), 1),
        (("schema",), "rtp-llm-doctor/2"),
    ],
)
def test_schema_rejects_invalid_reports(
    path: tuple[Any, ...], value: object, report: Report, validator: jsonschema_rs.Draft202012Validator
) -> None:
    data = json.loads(report.to_json())
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    assert not validator.is_valid(data)


def test_every_field_is_required(report: Report, validator: jsonschema_rs.Draft202012Validator) -> None:
    data = json.loads(report.to_json())
    for name in data:
        assert not validator.is_valid({key: value for key, value in data.items() if key != name}), name


def test_junit_counts_agree(report: Report) -> None:
    suite = ElementTree.fromstring(junit(report, STYLE))
    cases = suite.findall("testcase")
    assert suite.tag == "testsuite"
    assert len(cases) == int(suite.attrib["tests"]) == len(report.checks)
    for tag, attribute, statuses in (
        ("failure", "failures", {Status.ERROR}),
        ("error", "errors", {Status.UNKNOWN, Status.CRASH}),
        ("skipped", "skipped", {Status.SKIP}),
    ):
        ids = {case.attrib["name"].split()[0] for case in cases if case.find(tag) is not None}
        assert ids == {f.id for f in report.checks if f.status in statuses}
        assert len(ids) == int(suite.attrib[attribute])
    failure = next(case for case in cases if case.attrib["name"].startswith("S-01 ")).find("failure")
    assert failure is not None
    assert failure.text == "docker run --shm-size=2g …"
    assert "64.0 MiB" in failure.attrib["message"]
    warning_ids = {case.attrib["name"].split()[0] for case in cases if case.find("system-out") is not None}
    assert warning_ids == {id for id, status in FAULTS.items() if status == "warn"}


def test_prometheus_text_reads_back(report: Report) -> None:
    families = {family.name: family for family in text_string_to_metric_families(prometheus(report, STYLE))}
    samples = {s.labels["check"]: s for s in families["rtp_llm_doctor_check_status"].samples}
    assert {id: sample.value for id, sample in samples.items()} == {
        f.id: STATUS_NUMBERS[f.status] for f in report.checks
    }
    assert {sample.labels["part"] for sample in samples.values()} == {"0"}
    assert families["rtp_llm_doctor_last_run_timestamp_seconds"].samples[0].value == report.started
    assert families["rtp_llm_doctor_duration_seconds"].samples[0].value == report.duration_s


def test_promtool_accepts_the_metrics(report: Report) -> None:
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool is not on PATH")
    text = prometheus(report, STYLE)
    process = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout + process.stderr) == (0, "")


def test_every_status_has_a_number() -> None:
    assert STATUS_NUMBERS.keys() == set(Status)
