"""The threads of the kernels: every task runs once, whatever the threads do, and no access races with another."""

import subprocess
from pathlib import Path

import pytest

from rtp_llm.native.build import PACKAGE, find_compiler

FLAGS = ("-std=c++17", "-O1", "-g", "-pthread", "-Wall", "-Wextra")
SOURCES = (Path(__file__).with_name("team_test.cpp"), PACKAGE / "src" / "team.cpp")


def compile_program(program: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    compiler = find_compiler()
    if not compiler:
        pytest.skip("no C++ compiler")
    command = [*compiler, *FLAGS, *flags, *map(str, SOURCES), "-o", str(program)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run_program(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_task_runs_once(tmp_path: Path) -> None:
    compiled = compile_program(tmp_path / "program")
    assert compiled.returncode == 0, compiled.stderr
    run_program(str(tmp_path / "program"))


@pytest.mark.slow
def test_nothing_races(tmp_path: Path) -> None:
    compiled = compile_program(tmp_path / "program", "-fsanitize=thread")
    if compiled.returncode:
        pytest.skip("the compiler has no thread sanitizer")
    # Without randomized addresses: older sanitizers do not know the memory layout of newer kernels.
    run_program("setarch", "--addr-no-randomize", str(tmp_path / "program"), "sanitized")
