"""A healthy machine: the doctor has nothing to say, without torch, and in well under its time."""

import subprocess
import sys
from pathlib import Path

from doctor.context import CheckContext
from tests.doctor.fixtures import REPOSITORY, FakeHost, doctor, failed_checks, problems, report, run_context_checks


def test_a_healthy_container_has_no_problem(tmp_path: Path) -> None:
    assert problems(run_context_checks(CheckContext(FakeHost(tmp_path)))) == {}


def test_this_machine_is_judged_without_an_error() -> None:
    done = doctor("-o", "json", env={"START_PORT": "19877"})
    assert failed_checks(report(done)) == {}, done.stdout
    assert done.returncode == 0


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from doctor.cli import main; main(['-o', 'short']);"
        "print(sorted({'torch', 'transformers', 'fastapi', 'uvicorn'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
