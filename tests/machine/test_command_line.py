"""Redacted command lines: enough to identify a process, without its secrets."""

import pytest

from rtp_llm.machine.command_line import redacted_command


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["nginx: master process nginx -g daemon off;"], "nginx: master process nginx"),
        (["python", "-m", "server", "--api-key", "sk-abcdefgh1234"], "python -m server"),
        (["python3", "serve.py", "--token=x"], "python3 serve.py"),
        (["/usr/bin/server", "-p", "secret"], "/usr/bin/server"),
        (["vllm", "serve", "hunter2"], "vllm"),
        (["python3.11", "-c", "token = 'hunter2'"], "python3.11"),
        (["python", "/opt/serve.py", "hunter2"], "python /opt/serve.py"),
        (["sh", "hunter2"], "sh"),
        (["daemon: token=hunter2"], "daemon:"),
        (["worker redis://:hunter2@cache:6379"], "worker"),
        ([""], ""),
        ([], ""),
        (["x" * 200], "x" * 80),
    ],
)
def test_arguments_are_redacted(command: list[str], text: str) -> None:
    assert redacted_command(command) == text
