"""A pytest plugin that records each result at once, so that no result is lost with its process.

RTP_TEST_RECORD names the file: a line of JSON for each start and each end of a test. The plugin deselects tests that
have a line there, so that a new process continues after a lost one. RTP_TEST_SHARD ("1/3") selects a share of them.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECORD, SHARD = "RTP_TEST_RECORD", "RTP_TEST_SHARD"
POISONED = 99  # exit code: the process has lost its GPU
REASON, DETAIL = 300, 6000  # characters of a failure that are kept
# After such an error every call to CUDA fails in this process. Running out of memory is not such an error.
POISON = re.compile(r"AcceleratorError|CUDA error|CUBLAS_STATUS|CUDNN_STATUS|device-side assert", re.IGNORECASE)

Note = Callable[[str, Any], None]


@pytest.fixture
def note(record_property: Note) -> Note:
    """Returns a function that adds `reason` (a few words) or `speed` (a row of the speed table) to the record."""
    return record_property


def pytest_configure(config: pytest.Config) -> None:
    """Registers the mark that tests/conftest.py gives to every test: pytest-xdist is not loaded here."""
    config.addinivalue_line("markers", "xdist_group(name): runs on one worker of pytest-xdist with its like")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps tests of a class with the same parameters together, since they share an expensive fixture."""
    share, shares = (int(n) for n in os.environ.get(SHARD, "1/1").split("/"))
    done = {line["test"] for line in lines()}
    places = {unit: place for place, unit in enumerate(dict.fromkeys(map(_unit, items)))}
    items.sort(key=lambda item: places[_unit(item)])
    items[:] = [item for item in items if places[_unit(item)] % shares == share - 1 and item.nodeid not in done]


def _unit(item: pytest.Item) -> str:
    callspec, owner = getattr(item, "callspec", None), getattr(item, "cls", None)
    return f"{owner}{callspec.id}" if callspec and owner else item.nodeid


def pytest_runtest_logstart(nodeid: str) -> None:
    write({"test": nodeid})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes one line per test: its call, or a failure before or after it."""
    if report.when != "call" and report.passed:
        return
    write(
        {
            "test": report.nodeid,
            "result": report.outcome,
            "seconds": report.duration,
            "reason": _reason(report),
            "detail": report.longreprtext[-DETAIL:] if report.failed else "",
            "speeds": [value for name, value in report.user_properties if name == "speed"],
        }
    )
    if report.failed and POISON.search(report.longreprtext):
        pytest.exit("the GPU is lost to this process", returncode=POISONED)


def _reason(report: pytest.TestReport) -> str:
    noted = "; ".join(str(value) for name, value in report.user_properties if name == "reason")
    if report.skipped:
        return str(report.longrepr[-1]) if isinstance(report.longrepr, tuple) else noted
    if report.passed:
        return noted
    crash = getattr(report.longrepr, "reprcrash", None)
    words = " ".join(str(crash.message).split())[:REASON] if crash else str(report.when)
    return f"{noted}; {words}" if noted else words


def lines() -> list[dict[str, Any]]:
    path = os.environ.get(RECORD)
    if not path or not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(line: dict[str, Any]) -> None:
    path = os.environ.get(RECORD)
    if path:
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")
