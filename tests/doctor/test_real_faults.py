"""Faults that need the real kernel: mounts, ports in use, limits, other users, orphaned shared memory files.

The doctor runs as a process. It must find the faults that the test adds, and no other.
"""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from doctor.context import CheckContext
from doctor.examine import RunOptions, run_doctor
from doctor.host import Host
from rtp_llm.machine.gpus import DRIVER_TIMEOUT, completes_within
from rtp_llm.parallel import segment
from tests.doctor.fixtures import REPOSITORY, FakeHost, by_id, doctor, failed_checks, report


def in_mount_namespace(script: str) -> list[str]:
    """Returns a command prefix that runs `script` and then a command in a new mount namespace."""
    command = ["unshare", "--mount", "sh", "-c", f'{script} && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    return command


def another_user(uid: int) -> list[str]:
    """Returns the command prefix that runs a command as another user. Skips the test if that user may not read the
    checkout, for example because it is below /root."""
    command = ["setpriv", f"--reuid={uid}", "--regid=0", "--clear-groups"]
    import_doctor = [*command, sys.executable, "-B", "-c", "import doctor"]
    if not shutil.which("setpriv") or subprocess.run(import_doctor, cwd=REPOSITORY, capture_output=True).returncode:
        pytest.skip("cannot run the doctor as another user here")
    return command


@contextmanager
def listening() -> Iterator[int]:
    with closing(socket.socket()) as sock:
        sock.bind(("0.0.0.0", 0))
        sock.listen()
        yield int(sock.getsockname()[1])


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "model"
    subprocess.run([sys.executable, "-m", "tests.random_model", str(path)], cwd=REPOSITORY, check=True)
    return path


@pytest.fixture
def two_ranks(demo: Path) -> dict[str, str]:
    """The settings of a part with two ranks, on a free port outside of the range from which outgoing connections get
    theirs."""
    return {"TP_SIZE": "2", "CHECKPOINT_PATH": str(demo), "START_PORT": "19871", "RTP_RUNTIME": "docker"}


def remedy(done: subprocess.CompletedProcess[str], id: str, runtime: str = "docker") -> str:
    check = next(c for c in report(done)["checks"] if c["id"] == id)
    return str(check["fix"][runtime] or check["fix"]["host"])


def test_healthy_machine_has_no_problems(two_ranks: dict[str, str]) -> None:
    assert failed_checks(report(doctor("-o", "json", env=two_ranks))) == {}


@pytest.mark.fault("S-01")
@pytest.mark.parametrize("runtime", ["docker", "compose", "kubernetes"])
def test_small_shm_is_an_error(two_ranks: dict[str, str], runtime: str) -> None:
    inside = in_mount_namespace("mount -t tmpfs -o size=2m tmpfs /dev/shm")
    done = doctor("-o", "json", env=two_ranks, inside=inside)
    assert failed_checks(report(done)) == {"S-01": "error"}
    assert done.returncode == 1
    texts = {"docker": "--shm-size=2g", "compose": "shm_size: 2gb", "kubernetes": "sizeLimit: 2Gi"}
    assert texts[runtime] in remedy(done, "S-01", runtime)


@pytest.mark.fault("S-03")
@pytest.mark.parametrize("script", ["mount -o remount,ro,bind /dev/shm", "mount --bind /var /dev/shm"])
def test_unusable_shm_is_an_error(two_ranks: dict[str, str], script: str) -> None:
    prepare = "mount --bind /dev/shm /dev/shm && " if "remount" in script else ""
    assert failed_checks(report(doctor("-o", "json", env=two_ranks, inside=in_mount_namespace(prepare + script)))) == {
        "S-03": "error"
    }


@pytest.mark.fault("N-08")
def test_port_in_use_is_an_error(two_ranks: dict[str, str]) -> None:
    with listening() as port:
        done = doctor("-o", "json", env={**two_ranks, "START_PORT": str(port)})
        found = failed_checks(report(done))
        assert found.pop("N-09", "warn") == "warn", "an ephemeral port"
        assert found == {"N-08": "error"}
        check = next(c for c in report(done)["checks"] if c["id"] == "N-08")
        assert f"in use by pid {os.getpid()} (" in check["actual"]
        other = int(check["fix"]["docker"].split("START_PORT=")[1].split()[0])
        with closing(socket.socket()) as probe:
            probe.bind(("0.0.0.0", other))


@pytest.mark.fault("L-02")
def test_low_open_file_limit_is_an_error(two_ranks: dict[str, str]) -> None:
    inside = ["prlimit", "--nofile=200:200"]
    if not shutil.which("prlimit"):
        pytest.skip("no prlimit here")
    done = doctor("-o", "json", env=two_ranks, inside=inside)
    assert failed_checks(report(done)) == {"L-02": "error"}
    assert "--ulimit nofile=1048576:1048576" in remedy(done, "L-02")


@pytest.mark.fault("L-10")
def test_user_without_a_name_is_an_error(two_ranks: dict[str, str]) -> None:
    done = doctor("-o", "json", env={**two_ranks, "PYTHONDONTWRITEBYTECODE": "1"}, inside=another_user(54321))
    assert failed_checks(report(done)).get("L-10") == "error", done.stderr
    assert (
        failed_checks(report(doctor("-o", "json", env={**two_ranks, "USER": "rtp"}, inside=another_user(54321)))).get(
            "L-10"
        )
        is None
    )


@pytest.mark.fault("M-11")
def test_unreadable_checkpoint_is_an_error(
    two_ranks: dict[str, str], demo: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    inside = another_user(54321)
    for parent in (tmp_path_factory.getbasetemp(), *tmp_path_factory.getbasetemp().parents[:2]):
        if parent.owner() == "root" and parent != Path("/tmp"):
            parent.chmod(0o755)
    copy = tmp_path_factory.mktemp("closed")
    copy.chmod(0o755)
    shutil.copytree(demo, copy / "model")
    next((copy / "model").glob("*.safetensors")).chmod(0o600)
    env = {**two_ranks, "USER": "rtp", "CHECKPOINT_PATH": str(copy / "model")}
    done = doctor("-o", "json", env=env, inside=inside)
    assert failed_checks(report(done)) == {"M-11": "error"}, done.stdout
    assert f"chmod -R a+rX {copy / 'model'}" in remedy(done, "M-11", "host")


@dataclass(frozen=True)
class SharedMemoryMount:
    """A file system at /dev/shm. `directory`: its path in this process; `inside`: a command prefix that runs a command
    with it."""

    directory: Path
    inside: list[str]


@pytest.fixture
def shm_mount() -> Iterator[SharedMemoryMount]:
    """Mounts a separate /dev/shm if this user may, so that the doctors of other tests do not see the orphaned files."""
    hold = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /dev/shm && echo mounted && exec sleep 600"]
    if not shutil.which("unshare") or subprocess.run([*hold[:2], "true"], capture_output=True).returncode:
        yield SharedMemoryMount(Path("/dev/shm"), [])
        return
    with subprocess.Popen(hold, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "mounted\n"
        enter = ["nsenter", f"--target={holder.pid}", "--mount", f"--wd={REPOSITORY}"]
        yield SharedMemoryMount(Path(f"/proc/{holder.pid}/root/dev/shm"), enter)
        holder.kill()


@pytest.fixture
def shm_files(shm_mount: SharedMemoryMount) -> Iterator[dict[str, Path]]:
    """Creates files in /dev/shm: of a killed rank, of a live rank and of other programs. All but one are older than
    MIN_AGE_SECONDS."""
    ours = f"rtp-llm-{os.getpid():012x}-"
    paths = {
        "ours": shm_mount.directory / f"{ours}00000001",
        "locked": shm_mount.directory / f"{ours}00000002",
        "new": shm_mount.directory / f"{ours}00000003",
        "foreign": shm_mount.directory / f"nccl-Test{os.getpid()}",
        "unknown": shm_mount.directory / f"other-program-{os.getpid()}",
    }
    for path in paths.values():
        path.write_bytes(b"x" * 4096)
    for name, path in paths.items():
        age = -600 if name == "new" else 600  # seconds; on a busy machine a doctor may take longer than a file is new
        os.utime(path, (time.time() - age,) * 2)
    with paths["locked"].open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        yield paths
    for path in paths.values():
        path.unlink(missing_ok=True)


def can_not_inspect_a_process() -> bool:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            (process / "maps").read_bytes()
        except (FileNotFoundError, ProcessLookupError):  # it has exited
            continue
        except OSError:
            return True
    return False


@pytest.mark.fault("S-02")
def test_orphaned_files_are_found_and_only_this_servers_removed(
    two_ranks: dict[str, str], shm_files: dict[str, Path], shm_mount: SharedMemoryMount
) -> None:
    done = doctor("-o", "json", env=two_ranks, inside=shm_mount.inside)
    assert failed_checks(report(done)) == {"S-02": "warn"}
    check = next(c for c in report(done)["checks"] if c["id"] == "S-02")
    # A process that cannot be inspected may use the files that are not provably this server's.
    num_orphans = 1 if can_not_inspect_a_process() else 2
    assert check["actual"].startswith(f"{num_orphans} files that no process uses")
    assert "--fix shm removes 1 of them" in remedy(done, "S-02")
    fixed = doctor("--fix", "shm", env=two_ranks, inside=shm_mount.inside)
    assert f"removed 1 orphaned segments, 4.0 KiB\n  {shm_files['ours'].name}" in fixed.stderr
    assert {name for name, path in shm_files.items() if path.exists()} == {"locked", "new", "foreign", "unknown"}
    again = doctor("--fix", "shm", env=two_ranks, inside=shm_mount.inside)
    assert "removed 0 orphaned segments" in again.stderr


def test_segment_of_a_live_process_is_not_orphaned() -> None:
    path, lock = segment.create_segment(f"rtp-llm-{os.getpid():012x}-", "0000000a", 1)
    try:
        os.utime(path, (time.time() - 600,) * 2)
        assert "removed 0 orphaned" in doctor("--fix", "shm").stderr
    finally:
        os.close(lock)
        path.unlink()


def test_three_faults_give_three_problems(demo: Path) -> None:
    """The faults are those of the screen in the README."""
    inside = in_mount_namespace("mount -t tmpfs -o size=2m tmpfs /dev/shm")
    with listening() as port:
        env = {"TP_SIZE": "2", "CHECKPOINT_PATH": str(demo), "START_PORT": str(port), "WROLD_RANK": "0"}
        range_file = Path("/proc/sys/net/ipv4/ip_local_port_range")
        done = doctor("-o", "json", env={**env, "RTP_RUNTIME": "docker"}, inside=inside)
    found = failed_checks(report(done))
    assert range_file.exists()
    assert found.pop("N-09", "warn") == "warn"
    assert found == {"M-13": "error", "S-01": "error", "N-08": "error"}
    assert done.returncode == 1
    assert json.loads(done.stdout)["verdict"] == "error"
    assert all(remedy(done, id) for id in found)


def test_value_of_a_misspelled_secret_is_not_shown(two_ranks: dict[str, str]) -> None:
    done = doctor("-o", "json", env={**two_ranks, "GANG_SERCET": "hunter2"})
    assert failed_checks(report(done)) == {"M-13": "error"}
    assert "hunter2" not in done.stdout + done.stderr


def test_host_of_another_machine(two_ranks: dict[str, str]) -> None:
    done = doctor("-o", "json", env={**two_ranks, "HOST": "192.0.2.1"})
    assert failed_checks(report(done)) == {"N-08": "error"}
    assert "correct HOST" in remedy(done, "N-08")


def test_ignored_error_does_not_skip_dependent_checks(two_ranks: dict[str, str]) -> None:
    """S-01 needs S-03, but is not skipped if S-03 is ignored."""
    inside = in_mount_namespace("mount -t tmpfs -o size=2m tmpfs /dev/shm && mount -o remount,ro,bind /dev/shm")
    done = doctor("-o", "json", "--ignore", "S-03", env=two_ranks, inside=inside)
    assert failed_checks(report(done)) == {"S-03": "warn", "S-01": "error"}


def test_hung_driver_does_not_hang_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not completes_within(lambda: time.sleep(600), 0.2)
    assert completes_within(lambda: None)
    monkeypatch.setattr("doctor.context.completes_within", lambda question: False)
    assert CheckContext(Host()).gpus.failure == DRIVER_TIMEOUT


@pytest.mark.timeout(60)
def test_hung_disk_does_not_hang_the_doctor(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a file on the hung disk blocks forever, so a forked process must try it first."""

    def dead(path: Path, most: int = 0) -> bytes:
        threading.Event().wait()
        raise AssertionError

    monkeypatch.setattr("doctor.context.completes_within", lambda question: completes_within(question, 0.3))
    host = FakeHost(tmp_path, {"CHECKPOINT_PATH": str(demo), "START_PORT": "19871"})
    monkeypatch.setattr("doctor.examine.is_running", lambda ctx: False)
    monkeypatch.setattr("rtp_llm.files.read", dead)
    found = run_doctor(host, (), RunOptions(), print)
    assert {f.id: f.status for f in found.problems()} == {"M-08": "error"}
    assert by_id(found.checks, "M-08").actual == f"CHECKPOINT_PATH={demo}: the file system does not respond"
    host.environ = {**host.environ, "DISTRIBUTE_CONFIG_FILE": "/mnt/list.json", "CHECKPOINT_PATH": ""}
    found = run_doctor(host, (), RunOptions(), print)
    assert {f.id: f.status for f in found.problems()} == {"C-02": "error", "M-08": "error"}
    assert by_id(found.checks, "M-08").actual == "CHECKPOINT_PATH is not set"
    assert "/mnt/list.json: cannot be read: the file system does not respond" in by_id(found.checks, "C-02").actual
