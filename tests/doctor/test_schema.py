"""The report's forms for machines, judged by readers that are not ours: JSON Schema, XML, Prometheus text."""

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
    done = doctor("schema")
    assert done.returncode == 0
    assert PUBLISHED.read_text() == done.stdout, "rtp-llm-doctor schema > docs/doctor-schema.json"


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
    done = doctor("-o", "json", *arguments, env={"START_PORT": "19871", **env})
    answer = json.loads(done.stdout)
    assert [error.message for error in validator.iter_errors(answer)] == []
    assert answer["schema"] == SCHEMA
    assert answer["exit_code"] == done.returncode
    assert done.stderr == ""


def test_a_report_of_many_faults_is_valid_and_reads_back(
    report: Report, validator: jsonschema_rs.Draft202012Validator
) -> None:
    text = report.to_json()
    assert [error.message for error in validator.iter_errors(json.loads(text))] == []
    assert Report.model_validate_json(text) == report


@pytest.mark.parametrize(
    ("place", "value"),
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
def test_what_is_no_report_is_refused(
    place: tuple[Any, ...], value: object, report: Report, validator: jsonschema_rs.Draft202012Validator
) -> None:
    answer = json.loads(report.to_json())
    inner = answer
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    assert not validator.is_valid(answer)


def test_every_field_is_always_there(report: Report, validator: jsonschema_rs.Draft202012Validator) -> None:
    answer = json.loads(report.to_json())
    for name in answer:
        assert not validator.is_valid({key: value for key, value in answer.items() if key != name}), name


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
        named = {case.attrib["name"].split()[0] for case in cases if case.find(tag) is not None}
        assert named == {f.id for f in report.checks if f.status in statuses}
        assert len(named) == int(suite.attrib[attribute])
    failure = next(case for case in cases if case.attrib["name"].startswith("S-01 ")).find("failure")
    assert failure is not None
    assert failure.text == "docker run --shm-size=2g …"
    assert "64.0 MiB" in failure.attrib["message"]
    warned = {case.attrib["name"].split()[0] for case in cases if case.find("system-out") is not None}
    assert warned == {id for id, status in FAULTS.items() if status == "warn"}


def test_prometheus_text_reads_back(report: Report) -> None:
    families = {family.name: family for family in text_string_to_metric_families(prometheus(report, STYLE))}
    samples = {s.labels["check"]: s for s in families["rtp_llm_doctor_check_status"].samples}
    assert {id: sample.value for id, sample in samples.items()} == {
        f.id: STATUS_NUMBERS[f.status] for f in report.checks
    }
    assert {sample.labels["part"] for sample in samples.values()} == {"0"}
    assert families["rtp_llm_doctor_last_run_timestamp_seconds"].samples[0].value == report.started
    assert families["rtp_llm_doctor_duration_seconds"].samples[0].value == report.duration_s


def test_promtool_has_no_complaint(report: Report) -> None:
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool is not on PATH")
    text = prometheus(report, STYLE)
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_number_stands_for_each_status() -> None:
    assert STATUS_NUMBERS.keys() == set(Status)
