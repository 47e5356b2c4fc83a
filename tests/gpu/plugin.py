"""A pytest plugin that records each result at once, so that no result is lost with its process.

RTP_TEST_RECORD names the file: a line of JSON for each start and each end of a test. The plugin deselects tests that
have a line there, so that a new process continues after a lost one. RTP_TEST_SHARD ("1/3") selects a shard.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECORD_VARIABLE, SHARD_VARIABLE = "RTP_TEST_RECORD", "RTP_TEST_SHARD"
GPU_LOST_EXIT_CODE = 99  # after a sticky CUDA error
MAX_REASON_CHARS, MAX_DETAIL_CHARS = 300, 6000
# After a sticky error every CUDA call in this process fails. Out of memory is not a sticky error.
STICKY_CUDA_ERROR = re.compile(
    r"AcceleratorError|CUDA error|CUBLAS_STATUS|CUDNN_STATUS|device-side assert", re.IGNORECASE
)

Note = Callable[[str, Any], None]


@pytest.fixture
def note(record_property: Note) -> Note:
    """Returns a function that adds `reason` (short text) or `speed` (a row of the speed table) to the record."""
    return record_property


def pytest_configure(config: pytest.Config) -> None:
    """Registers the mark xdist_group: pytest-xdist, which defines it, is not loaded here, and pytest rejects unknown
    marks."""
    config.addinivalue_line("markers", "xdist_group(name): the tests of a group run on one worker of pytest-xdist")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps tests of a class with the same parameters together, since they share an expensive fixture."""
    shard, num_shards = (int(n) for n in os.environ.get(SHARD_VARIABLE, "1/1").split("/"))
    recorded = {line["test"] for line in load_record()}
    positions = {key: position for position, key in enumerate(dict.fromkeys(map(_group_key, items)))}
    items.sort(key=lambda item: positions[_group_key(item)])
    selected = [item for item in items if positions[_group_key(item)] % num_shards == shard - 1]
    items[:] = [item for item in selected if item.nodeid not in recorded]


def _group_key(item: pytest.Item) -> str:
    callspec, cls = getattr(item, "callspec", None), getattr(item, "cls", None)
    return f"{cls}{callspec.id}" if callspec and cls else item.nodeid


def pytest_runtest_logstart(nodeid: str) -> None:
    append_record({"test": nodeid})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes one line per test: the result of its call, or a failure of setup or teardown."""
    if report.when != "call" and report.passed:
        return
    append_record(
        {
            "test": report.nodeid,
            "result": report.outcome,
            "seconds": report.duration,
            "reason": _reason(report),
            "detail": report.longreprtext[-MAX_DETAIL_CHARS:] if report.failed else "",
            "speeds": [value for name, value in report.user_properties if name == "speed"],
        }
    )
    if report.failed and STICKY_CUDA_ERROR.search(report.longreprtext):
        pytest.exit("a CUDA error has made the GPU unusable for this process", returncode=GPU_LOST_EXIT_CODE)


def _reason(report: pytest.TestReport) -> str:
    notes = "; ".join(str(value) for name, value in report.user_properties if name == "reason")
    if report.skipped:
        return str(report.longrepr[-1]) if isinstance(report.longrepr, tuple) else notes
    if report.passed:
        return notes
    crash = getattr(report.longrepr, "reprcrash", None)
    message = " ".join(str(crash.message).split())[:MAX_REASON_CHARS] if crash else str(report.when)
    return f"{notes}; {message}" if notes else message


def load_record() -> list[dict[str, Any]]:
    path = os.environ.get(RECORD_VARIABLE)
    if not path or not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def append_record(line: dict[str, Any]) -> None:
    path = os.environ.get(RECORD_VARIABLE)
    if path:
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")
