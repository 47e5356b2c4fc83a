"""`rtp-llm-doctor attach`, beside a real part of two ranks."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.doctor.fixtures import REPOSITORY, doctor, report
from tests.parallel.parts import Part
from tests.ports import free_start_port


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Part]:
    """The demo at TP=2, which takes no stopped rank for lost while it is looked at."""
    path = tmp_path_factory.mktemp("demo") / "model"
    subprocess.run([sys.executable, "-m", "tests.random_model", str(path)], cwd=REPOSITORY, check=True)
    port = free_start_port(2)
    settings = {"CHECKPOINT_PATH": str(path), "TP_SIZE": "2", "START_PORT": str(port), "HEARTBEAT_TIMEOUT": "120"}
    small = {"RTP_THREADS": "1", "OMP_NUM_THREADS": "1", "WARM_UP": "0", "TEST_BLOCK_NUM": "64"}
    with Part({**settings, **small}, port=port, ranks=2) as running:
        yield running.wait_healthy()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def attach(part: Part) -> tuple[int, str]:
    done = doctor("attach", "--run-dir", str(part.run_dir))
    assert done.stderr == ""
    return done.returncode, done.stdout


def wait_for(part: Part, words: str) -> str:
    """What it prints as soon as the words are in it; the exit code is then 1."""

    def look() -> str | None:
        code, text = attach(part)
        return text if code == 1 and words in text else None

    return part.until(look, words)


def test_a_part_that_is_well(part: Part) -> None:
    text = part.until(lambda: attach(part)[1] if attach(part)[0] == 0 else None, "attach finds it well")
    lines = text.splitlines()
    assert lines[0] == f"part0 of 1, cpu, state in {part.run_dir}"
    for number in range(2):
        pid = part.pid(f"rank{number}")
        assert any(line.startswith(f"  rank {number} (part0, pid {pid}): serving, step ") for line in lines)
    assert f"  {part.port} HTTP (START_PORT): pid {part.pid('api')}" in lines
    assert f"  {part.port - 1} rendezvous (START_PORT - 1): pid {part.pid('rank0')}" in lines
    assert any(" free, " in line and line.endswith("0 abandoned files hold 0 B") for line in lines)
    assert lines[-1] == "well"


def test_it_is_found_by_its_processes(part: Part) -> None:
    """The newest where there are several, as beside another test."""
    done = doctor("attach")
    assert done.returncode in (0, 1)
    assert done.stdout.startswith("part0 of 1, cpu, state in ")


def test_a_rank_that_is_stopped_falls_silent(part: Part) -> None:
    with stopped(part.pid("rank1")):
        text = wait_for(part, "rank 1 is silent")
        assert text.splitlines()[-1] == "not well: rank 1 is silent"
        row = next(line for line in text.splitlines() if line.startswith("  rank 1 "))
        assert row.endswith("(silent)")
        assert next(line for line in text.splitlines() if line.startswith("  rank 0 ")).endswith(" s ago")
    part.until(lambda: attach(part)[0] == 0, "well again")


def test_a_first_rank_that_is_stopped_leaves_its_word_stale(part: Part) -> None:
    with stopped(part.pid("rank0")):
        text = wait_for(part, "(stale)")
        assert "not well: nothing was heard of the ranks for " in text
    part.until(lambda: attach(part)[0] == 0, "well again")


def test_an_api_that_is_gone(part: Part) -> None:
    """Its port is what the words are about: for a moment nobody listens there."""
    before = part.pid("api")
    with stopped(part.pid("supervisord")):
        os.kill(before, signal.SIGKILL)
        text = wait_for(part, f"nobody listens on port {part.port}")
        assert f"  {part.port} HTTP (START_PORT): no listener now" in text.splitlines()
    part.until(lambda: attach(part)[0] == 0, "well again")


def test_a_rank_that_never_came(part: Part, tmp_path: Path) -> None:
    """The same part, with a board that only knows of one."""
    (tmp_path / "part.json").write_text((part.run_dir / "part.json").read_text())
    gang_status = json.loads((part.run_dir / "gang.json").read_text())
    del gang_status["ranks"]["1"]
    (tmp_path / "gang.json").write_text(json.dumps(gang_status))
    done = doctor("attach", "--run-dir", str(tmp_path))
    assert done.returncode == 1
    assert "  rank 1: no heartbeat" in done.stdout.splitlines()
    assert "not well: rank 1 is not here" in done.stdout


def test_before_anything_was_posted(part: Part, tmp_path: Path) -> None:
    (tmp_path / "part.json").write_text((part.run_dir / "part.json").read_text())
    done = doctor("attach", "--run-dir", str(tmp_path))
    assert done.returncode == 1
    assert "  nothing was posted yet" in done.stdout.splitlines()


def test_its_ports_and_memory_are_not_in_its_own_way(part: Part) -> None:
    """The doctor of a running part judges the machine, and not the part's own use of it; a start would fail."""
    env = {"START_PORT": str(part.port), "TP_SIZE": "2"}
    well = report(doctor("-o", "json", "--only", "N-08,S-01", env=env))
    assert (well["verdict"], well["exit_code"]) == ("ok", 0)
    starting = report(doctor("-o", "json", "--only", "N-08", "--starting", env=env))
    taken = next(check for check in starting["checks"] if check["id"] == "N-08")
    assert taken["status"] == "error"
    assert f"in use by pid {part.pid('api')}" in taken["actual"]


def test_no_part(tmp_path: Path) -> None:
    done = doctor("attach", "--run-dir", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"rtp-llm-doctor: no running part in {tmp_path}\n"


def test_no_part_among_the_processes() -> None:
    """In a pid namespace of its own, where no part can be seen."""
    inside = ["unshare", "--mount", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("no pid namespaces here")
    done = doctor("attach", inside=inside)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("rtp-llm-doctor: no running part among the processes that can be seen here")


@contextmanager
def called(*words: str) -> Iterator[int]:
    """A process with these words in its command line."""
    code = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.readline()
        yield process.pid
        process.communicate()


BROKEN = ["", "{", "[]", "null", '{"config": {}}', '{"config": {"tp_size": "x"}, "plan": {}}', "\ufffd", "[" * 100_000]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_what_is_called_like_a_part_is_no_part(text: str, tmp_path: Path) -> None:
    """Neither hinders the doctor."""
    (tmp_path / "part.json").write_text(text)
    env = {"START_PORT": "19871"}
    with called("rtp_llm.api.main"), called("rtp_llm.api.main", str(tmp_path)):
        done = doctor("-o", "short", "--only", "N-08", env=env)
        assert (done.returncode, done.stderr) == (0, "")
    done = doctor("attach", "--run-dir", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        f"rtp-llm-doctor: cannot run: {tmp_path}/part.json: is not what start_server writes: "
    )
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"epoch": 1, "ranks": {"0": {}}, "message": ""}'], ids="EBLR")
def test_a_board_that_is_none(text: str, part: Part, tmp_path: Path) -> None:
    (tmp_path / "part.json").write_text((part.run_dir / "part.json").read_text())
    (tmp_path / "gang.json").write_text(text)
    done = doctor("attach", "--run-dir", str(tmp_path))
    assert (done.returncode, done.stderr) == (1, "")
    assert f"  {tmp_path}/gang.json is not what the ranks post" in done.stdout.splitlines()


@pytest.mark.parametrize("change", [{"TP_SIZE": "1"}, {"CHECKPOINT_PATH": "/models/other"}], ids=["plan", "checkpoint"])
def test_another_deployment_on_its_port_is_in_the_way(change: dict[str, str], part: Part) -> None:
    env = {"START_PORT": str(part.port), "TP_SIZE": "2", **change}
    done = doctor("-o", "json", "--only", "N-08", env=env)
    assert [c["status"] for c in report(done)["checks"] if c["id"] == "N-08"] == ["error"]


def test_the_same_deployment_is_not_in_its_own_way(part: Part) -> None:
    settings = json.loads((part.run_dir / "part.json").read_text())["config"]
    env = {"START_PORT": str(part.port), "TP_SIZE": "2", "CHECKPOINT_PATH": settings["checkpoint_path"]}
    done = doctor("-o", "json", "--only", "N-08", env=env)
    assert [c["status"] for c in report(done)["checks"] if c["id"] == "N-08"] == ["ok"]
