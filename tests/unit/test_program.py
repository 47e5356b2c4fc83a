"""The processes of a part: they exit with supervisord, even while they still import their modules."""

import inspect
import os
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from rtp_llm.machine.process import stopping_file
from tests.unit.test_supervisord import PARTS, parse


def run_program(module: str, run_dir: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rtp_llm.supervise.program", module, str(run_dir)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("reason", ["supervisord ended and start_server removed the folder", "orphan", "stopping"])
def test_program_without_supervisord_exits_before_it_imports_anything(tmp_path: Path, reason: str) -> None:
    run_dir = tmp_path if reason in ("orphan", "stopping") else tmp_path / "removed"
    if reason == "orphan":
        (run_dir / "supervisord.pid").write_text("0")  # nobody's parent
    elif reason == "stopping":
        stopping_file(run_dir).touch()
    process = run_program("no_such_module", run_dir)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_failed_import_exits_with_the_code_of_a_crash(tmp_path: Path) -> None:
    (tmp_path / "supervisord.pid").write_text(str(os.getpid()))
    process = run_program("no_such_module", tmp_path)
    assert (process.returncode, "No module named 'no_such_module'" in process.stderr) == (70, True)


def test_every_program_of_supervisord_can_be_called() -> None:
    conf = parse(Path("/run/x"), local_world_size=1, json_gang_parts=PARTS)
    commands = [shlex.split(section["command"]) for section in conf.values() if "command" in section]
    assert len(commands) == 6  # two workers, API, guard, coordinator, doctor
    for _, _, program, module, run_dir, *arguments in commands:
        assert program == "rtp_llm.supervise.program"
        inspect.signature(import_module(module).main).bind(Path(run_dir), *arguments)
