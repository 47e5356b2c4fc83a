"""A healthy machine: the doctor finds no problem, and does not import torch."""

import subprocess
import sys
from pathlib import Path

from doctor.context import CheckContext
from tests.doctor.fixtures import REPOSITORY, FakeHost, doctor, failed_checks, problems, report, run_context_checks


def test_healthy_container_has_no_problems(tmp_path: Path) -> None:
    assert problems(run_context_checks(CheckContext(FakeHost(tmp_path)))) == {}


def test_this_machine_has_no_errors() -> None:
    done = doctor("-o", "json", env={"START_PORT": "19877"})
    assert failed_checks(report(done)) == {}, done.stdout
    assert done.returncode == 0


def test_doctor_imports_no_heavy_packages() -> None:
    code = (
        "import sys; from doctor.cli import main; main(['-o', 'short']);"
        "print(sorted({'torch', 'transformers', 'fastapi', 'uvicorn'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_machine_is_ready_without_a_checkpoint() -> None:
    """The server needs CHECKPOINT_PATH, and would end with code 64."""
    done = doctor("-o", "json", env={"START_PORT": "19877", "CHECKPOINT_PATH": ""})
    assert failed_checks(report(done)) == {"M-08": "error"}
    check = next(c for c in report(done)["checks"] if c["id"] == "M-08")
    assert check["actual"] == "CHECKPOINT_PATH is not set"
    assert "CHECKPOINT_PATH=" in check["fix"]["host"]
