"""Tests which exit codes of the doctor prevent start_server from starting the ranks."""

import logging
import subprocess

import pytest

from rtp_llm import start_server


@pytest.mark.parametrize(
    ("code", "stdout", "stderr", "level", "message"),
    [
        (0, "√ all\nready: 37 ok in 0.1 s (exit 0)\n", "", "INFO", "doctor: ready: 37 ok"),
        (0, "ready, with warnings: 1 warning, 36 ok\n", "", "WARNING", "doctor:\nready, with warnings"),
        (1, "not ready: 1 error\n", "", "WARNING", "doctor:\nnot ready"),
        (
            2,
            "",
            "rtp-llm-doctor: cannot run: stdout is closed\n",
            "WARNING",
            "could not run: rtp-llm-doctor: cannot run",
        ),
        (3, "! M-09 the check failed: OSError\nincomplete: 1 crashed\n", "", "WARNING", "M-09 the check failed"),
        (-9, "", "", "WARNING", "the doctor could not run: it exited with -9"),
    ],
)
def test_only_exit_code_1_prevents_a_start(
    code: int,
    stdout: str,
    stderr: str,
    level: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A crashed check or doctor is logged, but does not prevent the start."""
    completed = subprocess.CompletedProcess([], code, stdout, stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: completed)
    with caplog.at_level(logging.INFO):
        exit_code = start_server._run_doctor_process("enforce")
    assert (exit_code == 1) == (code == 1)
    assert [r.levelname for r in caplog.records] == [level]
    assert message in caplog.records[0].getMessage()
