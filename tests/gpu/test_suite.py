"""Tests the suite itself on CPU: it continues after a failure, a lost process or a hang."""

import os
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.gpu import environment, report
from tests.gpu.__main__ import choose_device
from tests.gpu.environment import EnvironmentFault
from tests.gpu.groups import Group, chosen, run
from tests.gpu.report import Result

TESTS = """\
import os, subprocess, sys, time
import pytest

def test_fine(record_property):
    record_property("reason", "two words")
    record_property("speed", {"what": "x"})

def test_wrong():
    assert 1 == 2

def test_poisoned():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_dies():
    os._exit(7)

def test_behind():
    pass

def test_skipped():
    pytest.skip("no GPU here")

def test_hangs():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    open("left", "w").close()
    time.sleep(600)
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(environment.ROOT), "RTP_TEST_DEVICE": "cpu"}


def run_file(tmp_path: Path, env: dict[str, str], text: str, seconds: float) -> dict[str, Result]:
    file = tmp_path / "some.py"
    file.write_text(textwrap.dedent(text).replace('"left"', repr(str(tmp_path / "left"))))
    shards = run(Group("some", str(file), seconds), env, tmp_path, seconds)
    return {result.test: result for shard in shards for result in shard.results()}


def test_it_goes_on_after_any_failure(tmp_path: Path, env: dict[str, str]) -> None:
    found = run_file(tmp_path, env, TESTS.split("def test_hangs")[0], 60)
    assert {test: result.result for test, result in found.items()} == {
        "fine": "passed",
        "wrong": "failed",
        "poisoned": "failed",
        "dies": "lost",
        "behind": "passed",
        "skipped": "skipped",
    }
    assert found["fine"].reason == "two words"
    assert found["wrong"].reason == "assert 1 == 2"
    assert "illegal memory access" in found["poisoned"].detail
    assert found["dies"].reason == "its process ended with 7"


@pytest.mark.slow
def test_a_hang_ends_with_its_group_and_leaves_nothing(tmp_path: Path, env: dict[str, str]) -> None:
    found = run_file(tmp_path, env, TESTS.replace("os._exit(7)", "pass").replace("CUDA error", "another"), 20)
    assert found["hangs"].result == "timeout"
    assert found["behind"].result == "passed"
    assert (tmp_path / "left").exists()
    deadline = time.monotonic() + 10  # the kernel takes a moment to end what was killed
    while left_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left_of(tmp_path) == []


def left_of(folder: Path) -> list[Path]:
    mark = f"RTP_TEST_RECORD={folder}".encode()
    return [process for process in Path("/proc").glob("[0-9]*") if mark in _environ(process)]


def _environ(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


def test_a_file_that_cannot_be_imported_is_no_success(tmp_path: Path, env: dict[str, str]) -> None:
    found = run_file(tmp_path, env, "import nothing_of_that_name\n", 30)
    assert [result.result for result in found.values()] == ["not run"]
    assert "nothing_of_that_name" in next(iter(found.values())).detail


def test_shards_share_the_tests(tmp_path: Path, env: dict[str, str]) -> None:
    file = tmp_path / "some.py"
    file.write_text("import pytest\n\n@pytest.mark.parametrize('n', range(5))\ndef test_it(n):\n    pass\n")
    shards = run(Group("some", str(file), 30, shards=2), env, tmp_path, 30)
    assert [len(shard.results()) for shard in shards] == [3, 2]


def test_smoke(tmp_path: Path, env: dict[str, str]) -> None:
    """One group of the real suite."""
    shards = run(Group("pieces", "tests/gpu/pieces.py", 100), env, tmp_path, 100)
    results = shards[0].results()
    assert {result.result for result in results} == {"passed"}, results


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "WHEELS", tmp_path / "nowhere")
    have = environment.installed()
    assert environment.lacking(have) == []
    old = {name: version for name, version in have.items() if name != "fastapi"} | {"pydantic": "1.9"}
    assert environment.lacking(old) == ["fastapi (absent)", "pydantic (1.9, but 2.14 is needed)"]
    advice = environment._advice(environment.lacking(old))
    assert "fastapi (absent)" in advice
    assert f"make gpu-wheels PYTHON_VERSION={sys.version_info[0]}.{sys.version_info[1]}" in advice


def test_only_wheels_that_are_missed_are_unpacked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "WHEELS", tmp_path)
    for name in ("a_b-1.2.0-py3-none-any.whl", "older-2.0-py3-none-any.whl", "newer-2.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    found = environment.wanted_wheels({"older": "1.9.9", "newer": "2.0.1"})
    assert [wheel.name.split("-")[0] for wheel in found] == ["a_b", "older"]


def test_a_cpu_does_not_pose_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RTP_TEST_RESULTS", raising=False)
    assert report.destination("cuda") == report.PUBLISHED
    assert report.PUBLISHED not in report.destination("cpu").parents
    assert report.destination("cpu").is_relative_to(environment.BUILD)
    monkeypatch.delenv("RTP_TEST_DEVICE", raising=False)
    with pytest.raises(EnvironmentFault, match=r"no GPU was found.*\n.*RTP_TEST_DEVICE=cpu make test-gpu"):
        choose_device({"torch": "2.13.0+cpu"})
    monkeypatch.setenv("RTP_TEST_DEVICE", "cpu")
    assert choose_device({"torch": "2.13.0+cpu"}) == "cpu"


def test_groups_are_named() -> None:
    groups = [Group("a", "a.py", 1), Group("b", "b.py", 1)]
    assert chosen(groups, []) == groups
    assert chosen(groups, ["b"]) == groups[1:]
    with pytest.raises(ValueError, match="no group c; there are a, b"):
        chosen(groups, ["c"])
