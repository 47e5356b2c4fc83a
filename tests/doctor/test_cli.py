"""The command line, as a process: exit codes, usage errors, and restricted environments."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from doctor import cli
from doctor.check import REGISTRY
from doctor.cli import COMMANDS
from doctor.render import FORMATS
from tests.doctor.fixtures import DEMO, REPOSITORY, doctor, failed_checks, report
from tests.quick import slow_except

PORT = {"START_PORT": "19861", "CHECKPOINT_PATH": str(DEMO)}
NO_MODEL = {**PORT, "CHECKPOINT_PATH": "/models/org/model"}  # M-08, an error
TYPO = {**PORT, "LOG_LEVLE": "INFO"}  # M-13, a warning
TIER_0 = [id for id, check in REGISTRY.items() if check.tier == 0]


def ids(process: subprocess.CompletedProcess[str]) -> list[str]:
    return [check["id"] for check in report(process)["checks"]]


def usable(*prefix: str) -> list[str]:
    """Returns this command prefix; skips the test if this machine does not permit the command."""
    if (
        not shutil.which(prefix[0])
        or subprocess.run([*prefix, sys.executable, "--version"], capture_output=True).returncode
    ):
        pytest.skip(f"{prefix[0]} cannot be used here")
    return list(prefix)


@pytest.fixture
def unnamed_user() -> list[str]:
    """A command prefix that runs a command as a uid without a passwd entry."""
    if os.getuid() != 0:
        pytest.skip("needs root, to change the uid")
    prefix = usable("setpriv", "--reuid=967", "--regid=967", "--clear-groups")
    if subprocess.run([*prefix, sys.executable, "-c", "import doctor"], cwd=REPOSITORY, capture_output=True).returncode:
        pytest.skip("other users may not read this checkout")
    return prefix


# Exit codes


@pytest.mark.parametrize(
    ("arguments", "env", "code", "verdict"),
    [
        ((), PORT, 0, "ready:"),
        ((), TYPO, 0, "ready, with warnings:"),
        (("--strict",), TYPO, 1, "ready, with warnings:"),
        ((), NO_MODEL, 1, "not ready:"),
        (("--ignore", "M-08"), NO_MODEL, 1, "not ready:"),  # M-07, which needs M-08, runs and fails
        (("--ignore", "M-08,M-07"), NO_MODEL, 0, "ready, with warnings:"),
        (("--ignore", "m-08, M-07, M-13"), NO_MODEL, 0, "ready, with warnings:"),
        (("--ignore", "M-08,M-07", "--strict"), NO_MODEL, 1, "ready, with warnings:"),
        (("--only", "S-01"), NO_MODEL, 0, "ready:"),
    ],
)
def test_exit_codes(arguments: Sequence[str], env: dict[str, str], code: int, verdict: str) -> None:
    process = doctor(*arguments, env=env)
    assert process.stdout.splitlines()[-1].startswith(verdict)
    assert process.stdout.splitlines()[-1].endswith(f"(exit {code})")
    assert (process.returncode, process.stderr) == (code, "")


def test_unknown_result_exits_with_3() -> None:
    """A check that hangs, as on a network file system, has an unknown result."""
    code = "import sys, time; from doctor.host import Host; Host.space = lambda *a: time.sleep(60);"
    code += "from doctor.cli import main; sys.exit(main(['--only', 'S-01']))"
    process = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert "S-01 did not finish within 2 s and was killed" in process.stdout
    assert process.stdout.splitlines()[-1].startswith("incomplete: 1 unknown")
    assert process.returncode == 3


def test_bug_in_the_doctor_exits_with_2() -> None:
    """Python would exit with 1, which means that checks found errors, and the part would not start."""
    code = "import sys; from doctor import cli; cli.run_doctor = None; sys.exit(cli.main([]))"
    process = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert "TypeError: 'NoneType' object is not callable" in process.stderr
    assert process.returncode == 2


# Usage errors


USAGE_ERRORS: list[tuple[tuple[str, ...], Sequence[str]]] = [
    (("nodes",), COMMANDS),
    (("--tier", "9"), ("0", "1", "2", "3")),
    (("-o", "xml"), tuple(FORMATS)),
    (("--fix", "all"), ("shm",)),
    (("--wait", "long"), ("--wait", "a number of seconds", "'long'")),
    (("--only", "S-99,S-01"), ("no check or category S-99", "rtp-llm-doctor list")),
    (("--only", "X-01"), ("X-01", "--tier 3")),
    (("--only", "gang"), ("C-09", "`rtp-llm-doctor gang` on every part")),
    (("--only", "gang,S-01"), ("C-09", "`rtp-llm-doctor gang` on every part")),
    (("--tier", "3", "--only", "N-01"), ("N-01", "`rtp-llm-doctor gang` on every part")),
    (("--ignore", "S-99"), ("no check S-99", "rtp-llm-doctor list")),
    (("explain",), ("explain needs the id", "rtp-llm-doctor list")),
    (("explain", "S-99"), ("'S-99'", "rtp-llm-doctor list")),
    (("explain-log",), ("a file, or - for stdin",)),
    (("explain-log", "/no/such.log"), ("cannot run", "/no/such.log")),
    (("list", "S-01"), ("list takes no argument 'S-01'",)),
    (("list", "-o", "junit"), ("junit", "table", "json")),
    (("--tp_size", "2"), ("the server's flags follow after `--`",)),
    (("--tp_size=2",), ("--tp_size=2", "the server's flags follow after `--`")),
    (("attach", "--run-dir", "/no/such"), ("no running part in /no/such",)),
    (("--save", "/no/such/report.json"), ("cannot run", "/no/such")),
    (("--bundle", "/no/such/bundle.tgz"), ("cannot run", "/no/such")),
]


@pytest.mark.parametrize(("arguments", "texts"), slow_except(USAGE_ERRORS, *USAGE_ERRORS[::3]))
def test_usage_errors_exit_with_2_and_name_the_allowed_values(arguments: Sequence[str], texts: Sequence[str]) -> None:
    process = doctor(*arguments, env=PORT)
    assert process.returncode == 2
    for text in texts:
        assert text in process.stderr
    assert process.stderr.startswith("rtp-llm-doctor: ")
    assert len(process.stderr.splitlines()) == 1


# Selection of checks


def test_only_selects_ids_and_their_dependencies() -> None:
    assert ids(doctor("-o", "json", "--only", "S-01", env=PORT)) == ["S-03", "S-02", "S-01"]
    assert ids(doctor("-o", "json", "--only", "l-10, M-15", env=PORT)) == ["M-15", "L-10"]


def test_only_selects_categories() -> None:
    limits = [id for id, check in REGISTRY.items() if check.category == "limits"]
    assert set(ids(doctor("-o", "json", "--only", "limits", env=PORT))) == {*limits, "G-01"}
    both = ids(doctor("-o", "json", "--only", "Shared Memory,L-10", env=PORT))
    assert both == [id for id in TIER_0 if id == "L-10" or REGISTRY[id].category == "shared memory"]


def test_only_fails_if_a_dependency_fails() -> None:
    """M-05 is skipped because M-08 fails, so the run must fail although only M-05 was selected."""
    process = doctor("-o", "json", "--only", "M-05", env=NO_MODEL)
    assert failed_checks(report(process)) == {"M-08": "error"}
    assert process.returncode == 1


def test_default_runs_all_of_tier_0() -> None:
    assert ids(doctor("-o", "json", env=PORT)) == TIER_0


def test_server_flags_come_after_two_dashes() -> None:
    assert "ranks 0-1 on" in doctor("--", "--tp_size", "2", env=PORT).stdout
    assert "rank 0 on" in doctor("--", env=PORT).stdout
    process = doctor("-o", "json", "--", "--start_port=19862", "-v")
    assert failed_checks(report(process)) == {"M-14": "error"}, "-v is not a flag of the server"
    assert "'-v'" in next(c["actual"] for c in report(process)["checks"] if c["id"] == "M-14")


def test_flags_win_over_the_environment() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert failed_checks(report(doctor("-o", "json", "--only", "N-08", "--", "--start_port", port, env=PORT))) == {
            "N-08": "error"
        }
        assert failed_checks(report(doctor("-o", "json", "--only", "N-08", env=PORT))) == {}


def test_options_before_and_after_the_command(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Bus error (core dumped)\n")
    for arguments in (("explain-log", "-o", "short", str(log)), ("-o", "short", "explain-log", str(log))):
        assert doctor(*arguments, env=PORT).stdout.startswith("ready: ")


# Lists and explanations


def test_list_names_every_check() -> None:
    rows = doctor("list").stdout.splitlines()
    assert [row.split()[0] for row in rows] == list(REGISTRY)
    entries = json.loads(doctor("list", "-o", "json").stdout)
    assert [entry["id"] for entry in entries] == list(REGISTRY)
    assert all(entry.keys() == {"id", "category", "tier", "severity", "title"} for entry in entries)


def test_explain_of_every_id(capsys: pytest.CaptureFixture[str]) -> None:
    for id, check in REGISTRY.items():
        assert cli.main(["explain", id.lower()]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"{id}  {check.title}\n")
        assert " ".join(check.explanation.split())[:40] in " ".join(text.split())
        assert all(symptom.text in text for symptom in check.symptoms)
        assert all(need in text for need in check.needs)
    assert doctor("explain", "S-01").stdout.startswith("S-01  ")


def test_explain_log_reads_stdin_and_files(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("starting\nBus error (core dumped)\n")
    process = doctor("explain-log", str(log), env=PORT)
    assert process.stdout.startswith(
        "line 2: Bus error (core dumped)\n  S-01 /dev/shm is large enough\n\nrtp-llm-doctor "
    )
    assert ids(doctor("explain-log", "-o", "json", str(log), env=PORT)) == ["S-03", "S-02", "S-01"]
    command = [sys.executable, "-m", "doctor", "explain-log", "-"]
    piped = subprocess.run(
        command,
        input=b"\xff started\n",
        cwd=REPOSITORY,
        capture_output=True,
        env={**os.environ, **PORT},
        check=False,
    )
    assert piped.stdout.startswith(b"no line of this log is a known symptom")
    assert piped.returncode == 0


def test_explain_log_names_the_command_for_gang_checks(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("Detected mixed local Net device counts across ranks\n")
    assert "(needs `rtp-llm-doctor gang` on every part)" in doctor("explain-log", str(log), env=PORT).stdout


def test_save_writes_the_printed_report(tmp_path: Path) -> None:
    process = doctor("-o", "json", "--save", str(tmp_path / "report.json"), env=PORT)
    assert json.loads((tmp_path / "report.json").read_text()) == report(process)
    assert os.listdir(tmp_path) == ["report.json"]


# Terminals, pipes and restricted environments


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """(primary, secondary) file descriptors of a pseudo-terminal."""
    primary, secondary = os.openpty()
    yield primary, secondary
    os.close(primary)


@pytest.mark.slow
@pytest.mark.parametrize(("environ", "colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colour_on_a_terminal(terminal: tuple[int, int], environ: dict[str, str], colour: bool) -> None:
    primary, secondary = terminal
    env = {"PATH": os.environ["PATH"], "TERM": "xterm", **PORT, **environ}
    command = [sys.executable, "-m", "doctor", "-o", "short"]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=secondary)
    os.close(secondary)
    text = os.read(primary, 4096)
    assert process.wait() == 0
    assert (b"\033[" in text) == colour
    assert b"ready" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [(), ("-v",), ("list",), ("-h",), ("manual",), ("-o", "json"), ("explain", "S-01")]
)
def test_closed_pipe_is_no_error(arguments: Sequence[str]) -> None:
    """A reader that closes the pipe, such as `| head -1`, causes no error. Here it closes the pipe before the first
    byte."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "doctor", *arguments]
    env = {"PATH": os.environ["PATH"], **PORT}
    process = subprocess.run(command, cwd=REPOSITORY, env=env, stdout=write_end, stderr=subprocess.PIPE, check=False)
    os.close(write_end)
    assert (process.returncode, process.stderr) == (0, b"")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["", "-v", "-o json", "list", "-h"])
def test_full_disk_on_stdout_is_one_line(arguments: str) -> None:
    process = shell(f"{sys.executable} -m doctor {arguments} >/dev/full")
    assert (process.returncode, process.stderr.splitlines()) == (
        2,
        ["rtp-llm-doctor: cannot run: [Errno 28] No space left on device"],
    )


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("arguments", ["", "-o json", "explain-log -"])
def test_closed_streams_keep_the_exit_code(arguments: str, closed: str) -> None:
    process = shell(f"{sys.executable} -m doctor {arguments} {closed} {'' if '<' in closed else '</dev/null'}")
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize("arguments", ["explain", "explain S-99"])
def test_full_disk_on_stderr_keeps_the_exit_code(arguments: str) -> None:
    assert shell(f"{sys.executable} -m doctor {arguments} 2>/dev/full").returncode == 2


@pytest.mark.slow
@pytest.mark.timeout(30)
def test_explain_log_of_special_files(tmp_path: Path) -> None:
    """A FIFO with a writer is read to its end; one without a writer is an error and does not block."""
    os.mkfifo(tmp_path / "fifo")
    for path, reason in (
        (tmp_path / "fifo", "is a FIFO without a writer"),
        (Path("/dev/zero"), "is not a regular file"),
        (tmp_path, "is not a regular file"),
    ):
        process = doctor("explain-log", str(path), env=PORT)
        assert (process.returncode, process.stdout) == (2, "")
        assert process.stderr.startswith(f"rtp-llm-doctor: explain-log: {path} {reason}")
        assert len(process.stderr.splitlines()) == 1
    log = "sleep 0.5; echo starting; echo 'Bus error (core dumped)'"
    process = shell(
        f"({log}) > {tmp_path}/fifo & exec 3<{tmp_path}/fifo; {sys.executable} -m doctor explain-log /dev/fd/3"
    )
    assert process.stdout.startswith("line 2: Bus error (core dumped)\n  S-01 ")


def test_explain_log_redacts_secrets_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("OSError: [Errno 24] Too many open files: battery-staple --api-key correct-horse\n")
    process = doctor("explain-log", str(tmp_path / "log"), env={**PORT, "RTP_MYKEY": "battery-staple"})
    assert "Too many open files" in process.stdout
    assert "staple" not in process.stdout
    assert "correct" not in process.stdout


def shell(line: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], **PORT}
    return subprocess.run(["sh", "-c", line], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("wait", ["nan", "inf", "-1", "soon"])
def test_infinite_wait_is_a_usage_error(wait: str) -> None:
    process = doctor("gang", f"--wait={wait}")
    assert (process.returncode, process.stdout) == (2, "")
    assert f"argument --wait: '{wait}': allowed: a number of seconds, 0 or more" in process.stderr


@pytest.mark.parametrize("only", ["N-01,S-01", "S-01,X-01"])
def test_only_rejects_checks_outside_selected_tiers(only: str) -> None:
    process = doctor("--only", only)
    assert (process.returncode, process.stdout) == (2, "")
    assert ": to run " in process.stderr


def test_no_child_outlives_the_doctor() -> None:
    """SIGTERM while a check hangs ends the check's process too."""
    code = (
        "import time; from doctor import cli, check; from dataclasses import replace;"
        "hang = lambda node: print('hangs', flush=True) or time.sleep(100);"
        "check.REGISTRY['M-14'] = replace(check.REGISTRY['M-14'], run=hang, timeout=90); cli.main([])"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        [child] = psutil.Process(process.pid).children()
        process.terminate()
    gone, _ = psutil.wait_procs([child], timeout=20)
    assert gone


def is_rank(process: psutil.Process) -> bool:
    try:
        return "doctor.all_reduce" in process.cmdline()
    except psutil.NoSuchProcess:  # the process of a check, which has ended
        return False


@pytest.mark.slow
def test_no_rank_of_tier_3_outlives_the_doctor() -> None:
    """One rank is killed before the process group forms. Without the doctor, the other rank would wait for most of a
    minute."""
    env = {**os.environ, **PORT, "TP_SIZE": "2", "RTP_DEVICE": "cpu"}
    command = [sys.executable, "-m", "doctor", "--tier", "3", "--only", "X-01"]
    with subprocess.Popen(command, cwd=REPOSITORY, env=env) as process:
        doctor_process = psutil.Process(process.pid)
        ranks: list[psutil.Process] = []
        while len(ranks) < 2 and process.poll() is None:
            ranks = [child for child in doctor_process.children() if is_rank(child)]
        remaining, killed = ranks
        killed.kill()
        process.terminate()
    gone, _ = psutil.wait_procs([remaining], timeout=30)
    assert gone


def test_ctrl_c_prints_no_traceback() -> None:
    code = "import os, signal; from doctor import cli; cli.run_doctor = lambda *a: os.kill(os.getpid(), signal.SIGINT);"
    process = subprocess.run(
        [sys.executable, "-c", f"{code} raise SystemExit(cli.main([]))"],
        cwd=REPOSITORY,
        capture_output=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        check=False,
    )
    assert (process.returncode, process.stderr) == (2, b"")


@pytest.mark.slow
@pytest.mark.parametrize(
    "environ", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_encoding_without_the_symbols(environ: dict[str, str]) -> None:
    process = doctor("-v", env={**NO_MODEL, **environ})
    assert (process.returncode, process.stderr) == (1, "")
    assert process.stdout.isascii()


def test_an_unnamed_user_without_a_home(unnamed_user: list[str]) -> None:
    """torch cannot be imported by a user without a name (L-10). The doctor must run nevertheless."""
    process = doctor("-o", "json", env=PORT, inside=["env", "-u", "HOME", *unnamed_user])
    assert failed_checks(report(process)) == {"L-10": "error"}
    assert (process.returncode, process.stderr) == (1, "")
    with_user = doctor("-o", "json", env={**PORT, "USER": "rtp"}, inside=["env", "-u", "HOME", *unnamed_user])
    assert (failed_checks(report(with_user)), with_user.returncode) == ({}, 0)


def test_a_read_only_root() -> None:
    script = 'mount --make-rprivate / && mount -o remount,bind,ro / && exec "$@"'
    inside = usable("unshare", "--mount", "sh", "-c", script, "sh")
    process = doctor("-o", "json", env={**PORT, "TMPDIR": "/dev/shm"}, inside=inside)
    assert (failed_checks(report(process)), process.returncode, process.stderr) == ({}, 0, "")


def test_an_empty_path() -> None:
    process = doctor("-o", "json", env={**PORT, "PATH": ""})
    assert (failed_checks(report(process)), process.returncode, process.stderr) == ({}, 0, "")


def test_no_environment_at_all() -> None:
    process = subprocess.run([sys.executable, "-m", "doctor"], cwd=REPOSITORY, env={}, capture_output=True, check=False)
    assert process.returncode in (0, 1), "START_PORT 10000 may be taken"
    assert process.stderr == b""
