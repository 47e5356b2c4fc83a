"""Tests the suite itself on CPU: it continues after a failure, a lost process and a hang."""

import os
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.gpu import environment, report
from tests.gpu.__main__ import GROUPS, SUITE_SECONDS, select_device
from tests.gpu.environment import SetupError
from tests.gpu.groups import SuiteGroup, run_group, select_groups
from tests.gpu.report import Result

TEST_FILE = """\
import os, subprocess, sys, time
import pytest

def test_passing(record_property):
    record_property("reason", "short reason")
    record_property("speed", {"name": "x"})

def test_failing():
    assert 1 == 2

def test_cuda_error():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_exits():
    os._exit(7)

def test_after_exit():
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
    shards = run_group(SuiteGroup("some", str(file), seconds), env, tmp_path, seconds)
    return {result.test: result for shard in shards for result in shard.results()}


def test_suite_continues_after_any_failure(tmp_path: Path, env: dict[str, str]) -> None:
    results = run_file(tmp_path, env, TEST_FILE.split("def test_hangs")[0], 60)
    assert {test: result.result for test, result in results.items()} == {
        "passing": "passed",
        "failing": "failed",
        "cuda_error": "failed",
        "exits": "lost",
        "after_exit": "passed",
        "skipped": "skipped",
    }
    assert results["passing"].reason == "short reason"
    assert results["failing"].reason == "assert 1 == 2"
    assert "illegal memory access" in results["cuda_error"].detail
    assert results["exits"].reason == "its process ended with 7"


def test_suite_continues_after_the_timeout_of_a_test(
    tmp_path: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.gpu.groups.TEST_TIMEOUT_SECONDS", 3)
    hang = "import time\n\ndef test_a(): pass\n\ndef test_b(): time.sleep(600)\n\ndef test_c(): pass\n"
    results = run_file(tmp_path, env, hang, 60)
    assert {test: result.result for test, result in results.items()} == {"a": "passed", "b": "lost", "c": "passed"}


@pytest.mark.slow
def test_group_timeout_kills_hung_test_and_its_processes(tmp_path: Path, env: dict[str, str]) -> None:
    results = run_file(tmp_path, env, TEST_FILE.replace("os._exit(7)", "pass").replace("CUDA error", "another"), 20)
    assert results["hangs"].result == "timeout"
    assert results["after_exit"].result == "passed"
    assert (tmp_path / "left").exists()
    deadline = time.monotonic() + 10  # killed processes take a moment to end
    while leftover_processes(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert leftover_processes(tmp_path) == []


def leftover_processes(folder: Path) -> list[Path]:
    variable = f"RTP_TEST_RECORD={folder}".encode()
    return [process for process in Path("/proc").glob("[0-9]*") if variable in _environ(process)]


def _environ(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_import_error_is_reported_as_not_run(tmp_path: Path, env: dict[str, str]) -> None:
    results = run_file(tmp_path, env, "import nothing_of_that_name\n", 30)
    assert [result.result for result in results.values()] == ["not run"]
    assert "nothing_of_that_name" in next(iter(results.values())).detail


def test_shards_share_the_tests(tmp_path: Path, env: dict[str, str]) -> None:
    file = tmp_path / "some.py"
    file.write_text("import pytest\n\n@pytest.mark.parametrize('n', range(5))\ndef test_it(n):\n    pass\n")
    shards = run_group(SuiteGroup("some", str(file), 30, shards=2), env, tmp_path, 30)
    assert [len(shard.results()) for shard in shards] == [3, 2]


@pytest.mark.slow
def test_components_group_passes(tmp_path: Path, env: dict[str, str]) -> None:
    """Runs one group of the suite."""
    shards = run_group(SuiteGroup("components", "tests/gpu/components.py", 100), env, tmp_path, 100)
    results = shards[0].results()
    assert {result.result for result in results} == {"passed"}, results


def test_missing_packages_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "WHEELS", tmp_path / "nowhere")
    versions = environment.installed_versions()
    assert environment.unmet_requirements(versions) == []
    incomplete = {name: version for name, version in versions.items() if name != "fastapi"} | {"pydantic": "1.9"}
    assert environment.unmet_requirements(incomplete) == ["fastapi (absent)", "pydantic (1.9, but 2.14 is needed)"]
    message = environment._unmet_message(environment.unmet_requirements(incomplete))
    assert "fastapi (absent)" in message
    assert f"make gpu-wheels PYTHON_VERSION={sys.version_info[0]}.{sys.version_info[1]}" in message


def test_only_missing_or_older_packages_are_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "WHEELS", tmp_path)
    for name in ("a_b-1.2.0-py3-none-any.whl", "older-2.0-py3-none-any.whl", "newer-2.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    wheels = environment.wheels_to_install({"older": "1.9.9", "newer": "2.0.1"})
    assert [wheel.name.split("-")[0] for wheel in wheels] == ["a_b", "older"]


def test_cpu_results_never_replace_gpu_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RTP_TEST_RESULTS", raising=False)
    assert report.results_path("cuda") == report.PUBLISHED_RESULTS
    assert report.PUBLISHED_RESULTS not in report.results_path("cpu").parents
    assert report.results_path("cpu").is_relative_to(environment.BUILD)
    monkeypatch.delenv("RTP_TEST_DEVICE", raising=False)
    with pytest.raises(SetupError, match=r"no GPU was found by torch.*\n.*RTP_TEST_DEVICE=cpu make test-gpu"):
        select_device({"torch": "2.13.0+cpu"})
    monkeypatch.setenv("RTP_TEST_DEVICE", "cpu")
    assert select_device({"torch": "2.13.0+cpu"}) == "cpu"


def test_groups_fit_into_the_time_of_the_suite() -> None:
    """The limits of all groups of tests add up to less than the suite's: a slow group leaves time for the last."""
    assert sum(group.seconds for group in GROUPS) < SUITE_SECONDS < 360
    assert all((environment.ROOT / group.file).is_file() for group in GROUPS)


def test_select_groups_rejects_unknown_names() -> None:
    groups = [SuiteGroup("a", "a.py", 1), SuiteGroup("b", "b.py", 1)]
    assert select_groups(groups, []) == groups
    assert select_groups(groups, ["b"]) == groups[1:]
    with pytest.raises(ValueError, match="no group c; there are a, b"):
        select_groups(groups, ["c"])
