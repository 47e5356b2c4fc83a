"""`rtp-llm-doctor attach`, with a real part of two ranks."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.doctor.fixtures import REPOSITORY, doctor, report
from tests.parallel.parts import Part
from tests.ports import free_start_port
from tests.quick import slow_except


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Part]:
    """A running part with a random model at TP=2. Its heartbeat timeout is long, so that tests can stop ranks."""
    path = tmp_path_factory.mktemp("demo") / "model"
    subprocess.run([sys.executable, "-m", "tests.random_model", str(path)], cwd=REPOSITORY, check=True)
    port = free_start_port(2)
    settings = {"CHECKPOINT_PATH": str(path), "TP_SIZE": "2", "START_PORT": str(port), "HEARTBEAT_TIMEOUT": "120"}
    small_settings = {"RTP_THREADS": "1", "OMP_NUM_THREADS": "1", "WARM_UP": "0", "TEST_BLOCK_NUM": "64"}
    with Part({**settings, **small_settings}, port=port, ranks=2) as running:
        yield running.wait_healthy()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def attach(part: Part) -> tuple[int, str]:
    process = doctor("attach", "--run-dir", str(part.run_dir))
    assert process.stderr == ""
    return process.returncode, process.stdout


def wait_for(part: Part, text: str) -> str:
    """Runs attach repeatedly, until its output contains the text and its exit code is 1. Returns that output."""

    def output() -> str | None:
        code, stdout = attach(part)
        return stdout if code == 1 and text in stdout else None

    return part.until(output, text)


def test_healthy_part(part: Part) -> None:
    text = part.until(lambda: attach(part)[1] if attach(part)[0] == 0 else None, "attach reports it as healthy")
    lines = text.splitlines()
    assert lines[0] == f"part0 of 1, cpu, state in {part.run_dir}"
    for number in range(2):
        pid = part.pid(f"rank{number}")
        assert any(line.startswith(f"  rank {number} (part0, pid {pid}): serving, step ") for line in lines)
    assert f"  {part.port} HTTP (START_PORT): pid {part.pid('api')}" in lines
    assert f"  {part.port - 1} rendezvous (START_PORT - 1): pid {part.pid('coordinator')}" in lines
    assert any(" free, " in line and line.endswith("0 orphaned files hold 0 B") for line in lines)
    assert lines[-1] == "healthy"


def test_part_is_found_by_its_processes(part: Part) -> None:
    """Without --run-dir, attach shows the newest part on this machine, which may be the part of another test."""
    process = doctor("attach")
    assert process.returncode in (0, 1)
    header = re.match(r"part(\d+) of (\d+), cpu, state in (.+)\n", process.stdout)
    assert header
    plan = json.loads((Path(header[3]) / "part.json").read_text())["plan"]
    assert (plan["part"], plan["world_size"] // plan["local_world_size"]) == (int(header[1]), int(header[2]))
    # The processes of the other part may have ended since.
    assert max(start_times(header[3]), default=math.inf) >= min(start_times(str(part.run_dir)))


def start_times(run_dir: str) -> list[float]:
    """Returns when the processes of a part were started, in seconds since 1970."""
    processes = psutil.process_iter(["cmdline", "create_time"])
    return [p.info["create_time"] for p in processes if run_dir in (p.info["cmdline"] or [])]


@pytest.mark.parametrize("rank", slow_except([0, 1], 1))
def test_stopped_rank_is_silent(part: Part, rank: int) -> None:
    with stopped(part.pid(f"rank{rank}")):
        text = wait_for(part, f"rank {rank} is silent")
        assert text.splitlines()[-1] == f"unhealthy: rank {rank} is silent"
        row = next(line for line in text.splitlines() if line.startswith(f"  rank {rank} "))
        assert row.endswith("(silent)")
        assert next(line for line in text.splitlines() if line.startswith(f"  rank {1 - rank} ")).endswith(" s ago")
    part.until(lambda: attach(part)[0] == 0, "healthy again")


@pytest.mark.slow
def test_stopped_guard_leaves_a_stale_status(part: Part) -> None:
    with stopped(part.pid("guard")):
        text = wait_for(part, "(stale)")
        assert "unhealthy: no status from the ranks for " in text
    part.until(lambda: attach(part)[0] == 0, "healthy again")


def test_killed_api_leaves_its_port_without_listener(part: Part) -> None:
    """supervisord is stopped, so that it does not restart the API at once."""
    api_pid = part.pid("api")
    with stopped(part.pid("supervisord")):
        os.kill(api_pid, signal.SIGKILL)
        text = wait_for(part, f"no process listens on port {part.port}")
        assert f"  {part.port} HTTP (START_PORT): no listener" in text.splitlines()
    part.until(lambda: attach(part)[0] == 0, "healthy again")


def test_rank_without_status_is_missing(part: Part, tmp_path: Path) -> None:
    """attach reports a rank as missing if the status file (gang.json) has only the other rank."""
    (tmp_path / "part.json").write_text((part.run_dir / "part.json").read_text())
    gang_status = json.loads((part.run_dir / "gang.json").read_text())
    del gang_status["ranks"]["1"]
    (tmp_path / "gang.json").write_text(json.dumps(gang_status))
    process = doctor("attach", "--run-dir", str(tmp_path))
    assert process.returncode == 1
    assert "  rank 1: no heartbeat" in process.stdout.splitlines()
    assert "unhealthy: rank 1 is missing" in process.stdout


def test_missing_status_file(part: Part, tmp_path: Path) -> None:
    (tmp_path / "part.json").write_text((part.run_dir / "part.json").read_text())
    process = doctor("attach", "--run-dir", str(tmp_path))
    assert process.returncode == 1
    assert "  gang.json was not written yet" in process.stdout.splitlines()


def environment(part: Part) -> dict[str, str]:
    """Returns the settings of the running part, as an operator has them in the shell."""
    checkpoint = json.loads((part.run_dir / "part.json").read_text())["config"]["checkpoint_path"]
    return {"START_PORT": str(part.port), "TP_SIZE": "2", "CHECKPOINT_PATH": checkpoint}


def test_running_part_does_not_conflict_with_its_own_ports_and_memory(part: Part) -> None:
    """The doctor of a running part does not report the part's own ports and memory as a conflict. With --starting it
    does, because a second start would fail."""
    env = environment(part)
    running = report(doctor("-o", "json", "--only", "N-08,S-01", env=env))
    assert (running["verdict"], running["exit_code"]) == ("ok", 0)
    starting = report(doctor("-o", "json", "--only", "N-08", "--starting", env=env))
    port_check = next(check for check in starting["checks"] if check["id"] == "N-08")
    assert port_check["status"] == "error"
    assert f"in use by pid {part.pid('api')}" in port_check["actual"]


def test_run_dir_without_part(tmp_path: Path) -> None:
    process = doctor("attach", "--run-dir", str(tmp_path))
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == f"rtp-llm-doctor: no running part in {tmp_path}\n"


def test_no_part_among_the_processes() -> None:
    """Runs in a new PID namespace, in which no part is visible."""
    inside = ["unshare", "--mount", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("no pid namespaces here")
    process = doctor("attach", inside=inside)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("rtp-llm-doctor: no running part among the visible processes")


@contextmanager
def process_with_arguments(*arguments: str) -> Iterator[int]:
    """Runs a process that has these arguments in its command line."""
    code = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.readline()
        yield process.pid
        process.communicate()


BROKEN = ["", "{", "[]", "null", '{"config": {}}', '{"config": {"tp_size": "x"}, "plan": {}}', "\ufffd", "[" * 100_000]


@pytest.mark.parametrize("text", slow_except(BROKEN, "{"), ids=range(len(BROKEN)))
def test_process_that_looks_like_a_part_is_ignored(text: str, tmp_path: Path) -> None:
    (tmp_path / "part.json").write_text(text)
    env = {"START_PORT": "19871"}
    with process_with_arguments("rtp_llm.api.server"), process_with_arguments("rtp_llm.api.server", str(tmp_path)):
        process = doctor("-o", "short", "--only", "N-08", env=env)
        assert (process.returncode, process.stderr) == (0, "")
    process = doctor("attach", "--run-dir", str(tmp_path))
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith(f"rtp-llm-doctor: cannot run: {tmp_path}/part.json is invalid: ")
    assert len(process.stderr.splitlines()) == 1


INVALID_STATUSES = ["", "{", "[]", '{"epoch": 1, "ranks": {"0": {}}, "message": ""}']


@pytest.mark.parametrize("text", slow_except(INVALID_STATUSES, "{"), ids="EBLR")
def test_invalid_status_file(text: str, part: Part, tmp_path: Path) -> None:
    (tmp_path / "part.json").write_text((part.run_dir / "part.json").read_text())
    (tmp_path / "gang.json").write_text(text)
    process = doctor("attach", "--run-dir", str(tmp_path))
    assert (process.returncode, process.stderr) == (1, "")
    assert f"  {tmp_path}/gang.json is not a valid status file" in process.stdout.splitlines()


ANOTHER_PLAN, ANOTHER_MODEL = {"TP_SIZE": "1"}, {"CHECKPOINT_PATH": "/models/other"}


@pytest.mark.parametrize("change", slow_except([ANOTHER_PLAN, ANOTHER_MODEL], ANOTHER_PLAN), ids=["plan", "checkpoint"])
def test_another_deployment_on_the_port_is_a_conflict(change: dict[str, str], part: Part) -> None:
    env = {"START_PORT": str(part.port), "TP_SIZE": "2", **change}
    process = doctor("-o", "json", "--only", "N-08", env=env)
    check = next(c for c in report(process)["checks"] if c["id"] == "N-08")
    assert check["status"] == "error"
    assert check["actual"].startswith("part0 of this server already runs here and is healthy: port ")
    assert check["fix"]["host"].startswith(f"rtp-llm-doctor attach --run-dir {part.run_dir}, or START_PORT=")


def test_the_same_deployment_is_no_conflict(part: Part) -> None:
    settings = json.loads((part.run_dir / "part.json").read_text())["config"]
    env = {"START_PORT": str(part.port), "TP_SIZE": "2", "CHECKPOINT_PATH": settings["checkpoint_path"]}
    process = doctor("-o", "json", "--only", "N-08", env=env)
    assert [c["status"] for c in report(process)["checks"] if c["id"] == "N-08"] == ["ok"]
    running = "part0 of this server already runs here and is healthy"
    assert process.stderr == f"{running}; see rtp-llm-doctor attach --run-dir {part.run_dir}\n"


def test_part_that_runs_but_does_not_serve_is_called_unhealthy(part: Part) -> None:
    env = environment(part)
    with stopped(part.pid("api")):
        process = doctor("-o", "json", "--only", "N-08", env=env)
    assert process.stderr.startswith(
        "part0 of this server already runs here and does not answer GET /health: timed out;"
    )
