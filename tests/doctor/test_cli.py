"""The command line, as a process: exit codes, what it says to mistakes, and the poor places that it must work in."""

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
from tests.doctor.fixtures import REPOSITORY, doctor, failed_checks, report

PORT = {"START_PORT": "19861"}
HUB_NAME = {**PORT, "CHECKPOINT_PATH": "org/model"}  # M-08, an error
SLIP = {**PORT, "LOG_LEVLE": "INFO"}  # M-13, a warning
TIER_0 = [id for id, check in REGISTRY.items() if check.tier == 0]


def ids(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [check["id"] for check in report(done)["checks"]]


def usable(*words: str) -> list[str]:
    """The words that run a command in another place; skips where this machine does not allow it."""
    if (
        not shutil.which(words[0])
        or subprocess.run([*words, sys.executable, "--version"], capture_output=True).returncode
    ):
        pytest.skip(f"{words[0]} cannot be used here")
    return list(words)


@pytest.fixture
def stranger() -> list[str]:
    """Runs a command as a uid that nobody has given a name."""
    if os.getuid() != 0:
        pytest.skip("needs root, to become somebody else")
    words = usable("setpriv", "--reuid=967", "--regid=967", "--clear-groups")
    if subprocess.run([*words, sys.executable, "-c", "import doctor"], cwd=REPOSITORY, capture_output=True).returncode:
        pytest.skip("other users may not read this checkout")
    return words


# Exit codes


@pytest.mark.parametrize(
    ("arguments", "env", "code", "verdict"),
    [
        ((), PORT, 0, "ready:"),
        ((), SLIP, 0, "ready, with warnings:"),
        (("--strict",), SLIP, 1, "ready, with warnings:"),
        ((), HUB_NAME, 1, "not ready:"),
        (("--ignore", "M-08"), HUB_NAME, 1, "not ready:"),  # what follows from it is told then
        (("--ignore", "M-08,M-07"), HUB_NAME, 0, "ready, with warnings:"),
        (("--ignore", "m-08, M-07, M-13"), HUB_NAME, 0, "ready, with warnings:"),
        (("--ignore", "M-08,M-07", "--strict"), HUB_NAME, 1, "ready, with warnings:"),
        (("--only", "S-01"), HUB_NAME, 0, "ready:"),
    ],
)
def test_exit_codes(arguments: Sequence[str], env: dict[str, str], code: int, verdict: str) -> None:
    done = doctor(*arguments, env=env)
    assert done.stdout.splitlines()[-1].startswith(verdict)
    assert done.stdout.splitlines()[-1].endswith(f"(exit {code})")
    assert (done.returncode, done.stderr) == (code, "")


def test_what_cannot_be_examined_ends_with_3() -> None:
    """A check that gets no answer, as from a network disk."""
    code = "import sys, time; from doctor.host import Host; Host.space = lambda *a: time.sleep(60);"
    code += "from doctor.cli import main; sys.exit(main(['--only', 'S-01']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert "S-01 gave no answer within 2 s and was killed" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("incomplete: 1 unknown")
    assert done.returncode == 3


def test_a_fault_of_the_doctor_ends_with_2() -> None:
    """Not with Python's 1, which would say that errors were found and keep a part from starting."""
    code = "import sys; from doctor import cli; cli.run_doctor = None; sys.exit(cli.main([]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert "TypeError: 'NoneType' object is not callable" in done.stderr
    assert done.returncode == 2


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nodes",), COMMANDS),
        (("--tier", "9"), ("0", "1", "2", "3")),
        (("-o", "xml"), tuple(FORMATS)),
        (("--fix", "all"), ("shm",)),
        (("--wait", "long"), ("--wait", "float", "'long'")),
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
    ],
)
def test_mistakes_end_with_2_and_say_what_is_allowed(arguments: Sequence[str], words: Sequence[str]) -> None:
    done = doctor(*arguments, env=PORT)
    assert done.returncode == 2
    for word in words:
        assert word in done.stderr
    assert done.stderr.startswith("rtp-llm-doctor: ")
    assert len(done.stderr.splitlines()) == 1


# What is examined


def test_only_takes_ids_with_what_they_need() -> None:
    assert ids(doctor("-o", "json", "--only", "S-01", env=PORT)) == ["S-03", "S-02", "S-01"]
    assert ids(doctor("-o", "json", "--only", "l-10, M-15", env=PORT)) == ["M-15", "L-10"]


def test_only_takes_categories() -> None:
    limits = [id for id, check in REGISTRY.items() if check.category == "limits"]
    assert set(ids(doctor("-o", "json", "--only", "limits", env=PORT))) == {*limits, "G-01"}
    both = ids(doctor("-o", "json", "--only", "Shared Memory,L-10", env=PORT))
    assert both == [id for id in TIER_0 if id == "L-10" or REGISTRY[id].category == "shared memory"]


def test_a_selection_is_not_green_where_its_cause_is_red() -> None:
    """M-05 alone would find no folder to look into, and call that skipped."""
    done = doctor("-o", "json", "--only", "M-05", env=HUB_NAME)
    assert failed_checks(report(done)) == {"M-08": "error"}
    assert done.returncode == 1


def test_all_of_tier_0_is_examined() -> None:
    assert ids(doctor("-o", "json", env=PORT)) == TIER_0


def test_server_flags_come_after_two_dashes() -> None:
    assert "ranks 0-1 on" in doctor("--", "--tp_size", "2", env=PORT).stdout
    assert "rank 0 on" in doctor("--", env=PORT).stdout
    done = doctor("-o", "json", "--", "--start_port=19862", "-v")
    assert failed_checks(report(done)) == {"M-14": "error"}, "-v is no flag of the server"
    assert "'-v'" in next(c["actual"] for c in report(done)["checks"] if c["id"] == "M-14")


def test_flags_win_over_the_environment() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert failed_checks(report(doctor("-o", "json", "--only", "N-08", "--", "--start_port", port, env=PORT))) == {
            "N-08": "error"
        }
        assert failed_checks(report(doctor("-o", "json", "--only", "N-08", env=PORT))) == {}


def test_options_stand_before_and_after_the_command(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Bus error (core dumped)\n")
    for words in (("explain-log", "-o", "short", str(log)), ("-o", "short", "explain-log", str(log))):
        assert doctor(*words, env=PORT).stdout.startswith("ready: ")


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
    done = doctor("explain-log", str(log), env=PORT)
    assert done.stdout.startswith("line 2: Bus error (core dumped)\n  S-01 /dev/shm is large enough\n\nrtp-llm-doctor ")
    assert ids(doctor("explain-log", "-o", "json", str(log), env=PORT)) == ["S-03", "S-02", "S-01"]
    command = [sys.executable, "-m", "doctor", "explain-log", "-"]
    piped = subprocess.run(
        command,
        input=b"\xff all is well\n",
        cwd=REPOSITORY,
        capture_output=True,
        env={**os.environ, **PORT},
        check=False,
    )
    assert piped.stdout.startswith(b"nothing in this log is a symptom")
    assert piped.returncode == 0


def test_explain_log_says_where_a_check_of_the_gang_is_asked(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("Detected mixed local Net device counts across ranks\n")
    assert "(asked by `rtp-llm-doctor gang` on every part)" in doctor("explain-log", str(log), env=PORT).stdout


def test_what_is_saved_is_what_is_shown(tmp_path: Path) -> None:
    done = doctor("-o", "json", "--save", str(tmp_path / "report.json"), env=PORT)
    assert json.loads((tmp_path / "report.json").read_text()) == report(done)
    assert os.listdir(tmp_path) == ["report.json"]


# Terminals, pipes and poor places


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """(ours, the program's) ends of a terminal."""
    ours, theirs = os.openpty()
    yield ours, theirs
    os.close(ours)


@pytest.mark.parametrize(("environ", "colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colour_on_a_terminal(terminal: tuple[int, int], environ: dict[str, str], colour: bool) -> None:
    ours, theirs = terminal
    env = {"PATH": os.environ["PATH"], "TERM": "xterm", **PORT, **environ}
    command = [sys.executable, "-m", "doctor", "-o", "short"]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=theirs)
    os.close(theirs)
    text = os.read(ours, 4096)
    assert process.wait() == 0
    assert (b"\033[" in text) == colour
    assert b"ready" in text


@pytest.mark.parametrize("words", [(), ("-v",), ("list",), ("-h",), ("manual",), ("-o", "json"), ("explain", "S-01")])
def test_a_reader_that_goes_is_no_error(words: Sequence[str]) -> None:
    """As `| head -1` does: here the reader is gone before the first byte."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "doctor", *words]
    env = {"PATH": os.environ["PATH"], **PORT}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("words", ["", "-v", "-o json", "list", "-h"])
def test_a_full_disk_below_stdout_is_one_line(words: str) -> None:
    done = shell(f"{sys.executable} -m doctor {words} >/dev/full")
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        ["rtp-llm-doctor: cannot run: [Errno 28] No space left on device"],
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("words", ["", "-o json", "explain-log -"])
def test_closed_streams_leave_the_verdict(words: str, closed: str) -> None:
    done = shell(f"{sys.executable} -m doctor {words} {closed} {'' if '<' in closed else '</dev/null'}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", ["explain", "explain S-99"])
def test_a_full_disk_below_stderr_leaves_the_code(words: str) -> None:
    assert shell(f"{sys.executable} -m doctor {words} 2>/dev/full").returncode == 2


@pytest.mark.timeout(30)
def test_explain_log_of_what_is_no_file(tmp_path: Path) -> None:
    """A FIFO that somebody writes to is a stream; at one that nobody writes to it does not wait."""
    os.mkfifo(tmp_path / "fifo")
    for path, why in (
        (tmp_path / "fifo", "is a FIFO that nobody writes to"),
        (Path("/dev/zero"), "is no file that has an end"),
        (tmp_path, "is no file that has an end"),
    ):
        done = doctor("explain-log", str(path), env=PORT)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"rtp-llm-doctor: explain-log: {path} {why}")
        assert len(done.stderr.splitlines()) == 1
    log = "sleep 0.5; echo starting; echo 'Bus error (core dumped)'"
    done = shell(
        f"({log}) > {tmp_path}/fifo & exec 3<{tmp_path}/fifo; {sys.executable} -m doctor explain-log /dev/fd/3"
    )
    assert done.stdout.startswith("line 2: Bus error (core dumped)\n  S-01 ")


def test_a_secret_of_the_environment_is_not_quoted_from_a_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("OSError: [Errno 24] Too many open files: battery-staple --api-key correct-horse\n")
    done = doctor("explain-log", str(tmp_path / "log"), env={**PORT, "RTP_MYKEY": "battery-staple"})
    assert "Too many open files" in done.stdout
    assert "staple" not in done.stdout
    assert "correct" not in done.stdout


def shell(line: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], **PORT}
    return subprocess.run(["sh", "-c", line], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("wait", ["nan", "inf", "-1", "soon"])
def test_a_wait_without_an_end_is_refused(wait: str) -> None:
    done = doctor("gang", f"--wait={wait}")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"argument --wait: '{wait}': allowed is a float from 0" in done.stderr


@pytest.mark.parametrize("only", ["N-01,S-01", "S-01,X-01"])
def test_what_is_named_and_not_looked_at_is_refused(only: str) -> None:
    """Else it would count as well."""
    done = doctor("--only", only)
    assert (done.returncode, done.stdout) == (2, "")
    assert "asked by" in done.stderr


def test_no_child_outlives_the_doctor() -> None:
    """SIGTERM while a check hangs: its process goes too."""
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
    except psutil.NoSuchProcess:  # a check's, and over
        return False


def test_no_rank_of_tier_3_outlives_the_doctor() -> None:
    """One rank is lost before they meet, so the other would wait for it for most of a minute."""
    env = {**os.environ, **PORT, "TP_SIZE": "2", "RTP_DEVICE": "cpu"}
    command = [sys.executable, "-m", "doctor", "--tier", "3", "--only", "X-01"]
    with subprocess.Popen(command, cwd=REPOSITORY, env=env) as process:
        itself = psutil.Process(process.pid)
        ranks: list[psutil.Process] = []
        while len(ranks) < 2 and process.poll() is None:
            ranks = [child for child in itself.children() if is_rank(child)]
        left, lost = ranks
        lost.kill()
        process.terminate()
    gone, _ = psutil.wait_procs([left], timeout=30)
    assert gone


def test_ctrl_c_is_no_traceback() -> None:
    code = "import os, signal; from doctor import cli; cli.run_doctor = lambda *a: os.kill(os.getpid(), signal.SIGINT);"
    done = subprocess.run(
        [sys.executable, "-c", f"{code} raise SystemExit(cli.main([]))"],
        cwd=REPOSITORY,
        capture_output=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, b"")


@pytest.mark.parametrize(
    "environ", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_an_encoding_without_our_symbols(environ: dict[str, str]) -> None:
    done = doctor("-v", env={**HUB_NAME, **environ})
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.isascii()


def test_an_unnamed_user_without_a_home(stranger: list[str]) -> None:
    """L-10 is what torch would fail on; the doctor itself does not."""
    done = doctor("-o", "json", env=PORT, inside=["env", "-u", "HOME", *stranger])
    assert failed_checks(report(done)) == {"L-10": "error"}
    assert (done.returncode, done.stderr) == (1, "")
    named = doctor("-o", "json", env={**PORT, "USER": "rtp"}, inside=["env", "-u", "HOME", *stranger])
    assert (failed_checks(report(named)), named.returncode) == ({}, 0)


def test_a_read_only_root() -> None:
    script = 'mount --make-rprivate / && mount -o remount,bind,ro / && exec "$@"'
    inside = usable("unshare", "--mount", "sh", "-c", script, "sh")
    done = doctor("-o", "json", env={**PORT, "TMPDIR": "/dev/shm"}, inside=inside)
    assert (failed_checks(report(done)), done.returncode, done.stderr) == ({}, 0, "")


def test_an_empty_path() -> None:
    done = doctor("-o", "json", env={**PORT, "PATH": ""})
    assert (failed_checks(report(done)), done.returncode, done.stderr) == ({}, 0, "")


def test_no_environment_at_all() -> None:
    done = subprocess.run([sys.executable, "-m", "doctor"], cwd=REPOSITORY, env={}, capture_output=True, check=False)
    assert done.returncode in (0, 1), "START_PORT 10000 may be taken"
    assert done.stderr == b""
