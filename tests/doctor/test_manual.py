"""docs/doctor.md is generated from the checks, and every check is documented."""

import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from doctor import checks  # noqa: F401  # registers them
from doctor.check import REGISTRY, Check, Repair, Status
from doctor.runtime import Runtime
from tests.doctor.faulty import faulty_report
from tests.doctor.fixtures import REPOSITORY, doctor

PUBLISHED = REPOSITORY / "docs" / "doctor.md"
CATEGORIES = [
    "configuration",
    "model",
    "shared memory",
    "limits",
    "gpu",
    "interconnect",
    "network",
    "gang",
    "collective",
]


def test_the_manual_is_current() -> None:
    process = doctor("manual")
    assert process.returncode == 0
    assert PUBLISHED.read_text() == process.stdout, "rtp-llm-doctor manual > docs/doctor.md"


def test_the_manual_names_every_check_once() -> None:
    headings = re.findall(r"^### (\S+) (.*)$", PUBLISHED.read_text(), re.MULTILINE)
    assert headings == [(check.id, check.title) for check in REGISTRY.values()]
    assert re.findall(r"^## (.*)$", PUBLISHED.read_text(), re.MULTILINE) == [c.capitalize() for c in CATEGORIES]


def test_options_in_the_manual_exist() -> None:
    head = PUBLISHED.read_text().split("\n## ")[0]
    options = set(re.findall(r"--[a-z-]+", doctor("-h").stdout))
    doctor_commands = re.sub(r"-- --tp_size 2", "", head)
    assert set(re.findall(r"--[a-z_-]+", doctor_commands)) <= options


@pytest.mark.parametrize("check", REGISTRY.values(), ids=REGISTRY)
def test_every_check_is_documented(check: Check) -> None:
    assert re.fullmatch(r"[A-Z]-\d\d", check.id)
    assert check.category in CATEGORIES
    assert check.title
    assert check.title[-1] not in ".:;"
    assert re.search(r"\w{3,}.*\.\)?$", check.explanation), "at least a sentence"
    assert len(check.explanation.split()) >= 8
    assert check.tier in range(4)
    assert check.severity in (Status.WARN, Status.ERROR)
    assert check.repair in Repair
    assert check.timeout > 0


def test_dependencies_are_acyclic_and_not_of_a_later_tier() -> None:
    """graphlib raises CycleError if there is a cycle."""
    for check in REGISTRY.values():
        assert all(REGISTRY[need].tier <= check.tier for need in check.needs), check.id
    order = TopologicalSorter({check.id: check.needs for check in REGISTRY.values()}).static_order()
    assert set(order) == REGISTRY.keys()


@pytest.mark.parametrize("check", REGISTRY.values(), ids=REGISTRY)
def test_symptoms_are_unique_and_specific(check: Check) -> None:
    texts = [symptom.text for symptom in check.symptoms]
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert text == text.strip()
        assert len(re.sub(r"\W", "", text)) >= 5, text


@pytest.mark.parametrize("runtime", Runtime)
def test_every_problem_has_a_fix(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for finding in faulty_report(tmp_path, runtime, monkeypatch).problems():
        if finding.status in (Status.WARN, Status.ERROR):
            assert finding.fix.text(runtime), finding.id
            assert finding.expected, finding.id
