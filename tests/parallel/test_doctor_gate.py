"""The doctor in a starting part: checks before the start, gang checks, and where their results appear."""

import json
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.parallel.conftest import BODIES
from tests.parallel.parts import Gang, Part
from tests.ports import free_start_port

SMALL_SHM_SCRIPT = 'mount -t tmpfs -o size=2m tmpfs /dev/shm && exec "$@"'


def small_shm_prefix() -> list[str]:
    """Returns the command prefix that runs a program with 2 MiB in /dev/shm, as `docker run --shm-size=2m` does."""
    prefix = ["unshare", "--mount", "sh", "-c", SMALL_SHM_SCRIPT, "sh"]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    return prefix


def test_too_little_shm_exits_75_with_the_fix(settings: dict[str, str]) -> None:
    port = free_start_port(2)
    env = {**settings, "TP_SIZE": "2", "START_PORT": str(port), "RTP_RUNTIME": "docker"}
    with Part(env, port=port, ranks=2, inside=small_shm_prefix()) as part:
        assert part.wait_end() == 75
        assert "S-01 /dev/shm has 2.0 MiB; expected 5.0 MiB for the shared memory of 2 ranks" in part.log
        assert "docker run --shm-size=2g" in part.log
        assert "engine.main" not in part.log


@pytest.mark.slow
def test_doctor_warn_logs_the_error_and_starts(settings: dict[str, str]) -> None:
    """With RTP_DOCTOR=warn and too little /dev/shm, the doctor logs the error; the ranks start, and then fail because
    of it."""
    port = free_start_port(2)
    env = {**settings, "TP_SIZE": "2", "START_PORT": str(port), "RTP_DOCTOR": "warn", "RESTART_LIMIT": "0"}
    with Part(env, port=port, ranks=2, inside=small_shm_prefix()) as part:
        assert part.wait_end() == 71
        assert "S-01 /dev/shm has 2.0 MiB" in part.log
        assert "cannot reserve 4 MiB: No space left on device; enlarge /dev/shm" in part.log


def test_findings_are_served_at_doctor_and_in_the_metrics(settings: dict[str, str]) -> None:
    port = free_start_port()
    with Part({**settings, "START_PORT": str(port), "TP_SZIE": "1", "PROMETHEUS_MULTIPROC_DIR": ""}, port=port) as part:
        assert part.wait_end() == 75, "a typo in the name of a size is an error"
        assert "did you mean TP_SIZE?" in part.log
    port = free_start_port()
    with Part({**settings, "START_PORT": str(port), "LOG_LEVLE": "INFO"}, port=port) as part:
        part.wait_healthy()
        status, text = part.fetch("/doctor")
        report = json.loads(text)
        assert (status, report["schema"], report["verdict"]) == (200, "rtp-llm-doctor/1", "warn")
        assert [c["id"] for c in report["checks"] if c["status"] == "warn"] == ["M-13"]
        metrics = part.fetch("/metrics")[1]
        assert 'rtp_llm_doctor_check_status{check="M-13",part="0"} 1.0' in metrics
        assert 'rtp_llm_doctor_check_status{check="S-03",part="0"} 0.0' in metrics
        assert "rtp_llm_doctor_last_run_timestamp_seconds" in metrics


@pytest.mark.slow
def test_doctor_off_runs_no_checks(settings: dict[str, str]) -> None:
    port = free_start_port()
    with Part({**settings, "START_PORT": str(port), "RTP_DOCTOR": "off"}, port=port) as part:
        part.wait_healthy()
        assert part.fetch("/doctor")[0] == 404
        assert "rtp_llm_doctor" not in part.fetch("/metrics")[1]
        assert "rtp_llm.start_server: doctor" not in part.log


def test_all_errors_are_reported_at_once(settings: dict[str, str]) -> None:
    """start_server exits with the code of the first error; the doctor lists the other errors in the log."""
    port = free_start_port()
    env = {**settings, "START_PORT": str(port), "TP_SIZE": "many", "CHECKPOINT_PATH": "/nowhere"}
    with Part(env, port=port) as part:
        assert part.wait_end() == 64
        assert "M-14 TP_SIZE='many'" in part.log
        assert "M-08 CHECKPOINT_PATH=/nowhere is not a folder here" in part.log


def two_parts(settings: dict[str, str], *settings_of_parts: dict[str, str]) -> list[Part]:
    ports = [free_start_port(), free_start_port()]
    members = {f"x_part{n}": {"name": f"x_part{n}", "ip": "127.0.0.1", "port": port} for n, port in enumerate(ports)}
    common = {**settings, "JSON_GANG_PARTS": json.dumps(members), "TP_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    ranks = [{"START_PORT": str(port), "WORLD_RANK": str(n)} for n, port in enumerate(ports)]
    return [
        Part({**common, **rank, **part_settings}, port=int(rank["START_PORT"]))
        for rank, part_settings in zip(ranks, settings_of_parts, strict=True)
    ]


@pytest.fixture(scope="module")
def gang(settings: dict[str, str]) -> Iterator[Gang]:
    with Gang(*two_parts(settings, {}, {})) as running:
        yield running.wait_healthy()


def assert_gang_checks_pass(part: Part) -> None:
    """Waits for the gang checks of the part. All must be ok, except that N-13 may find a slow link.

    The throughput of a link is low while other tests use the cores.
    """
    conclusions = ("the parts reach each other", "problems between the parts")
    part.until(lambda: any(text in part.log for text in conclusions), "gang checks")
    part.until(lambda: part.fetch("/doctor")[0] == 200, "the API")  # which starts beside the doctor
    checks = json.loads(part.fetch("/doctor")[1])["checks"]
    statuses = {c["id"]: c["status"] for c in checks if c["category"] == "gang"}
    throughput = next(c["status"] for c in checks if c["id"] == "N-13")
    assert throughput in ("ok", "warn")
    assert statuses
    assert {status for id, status in statuses.items() if id != "N-13"} == {"ok"}
    assert throughput == "warn" or "the parts reach each other and agree" in part.log


@pytest.mark.slow
def test_gang_checks_pass_on_all_parts(gang: Gang) -> None:
    for part in gang.parts:
        assert_gang_checks_pass(part)


@pytest.mark.slow
def test_gang_checks_pass_on_a_restarted_part(gang: Gang, settings: dict[str, str], expected: dict[str, str]) -> None:
    """The doctor of a restarted part reaches the doctor of the other part, which has already finished its checks."""
    old = gang.parts[1]
    old.kill("supervisord")
    assert old.wait_end() == 70
    members = json.loads((gang.leader.run_dir / "part.json").read_text())["plan"]["members"]
    member_list = {m["name"]: {"name": m["name"], "ip": m["ip"], "port": m["port"]} for m in members}
    env = {**settings, "JSON_GANG_PARTS": json.dumps(member_list), "TP_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    with Part({**env, "START_PORT": str(old.port), "WORLD_RANK": "1"}, port=old.port) as new:
        assert_gang_checks_pass(new)
        gang.leader.wait_healthy(2)
        assert gang.leader.complete(BODIES["short"]) == expected["short"]


@pytest.mark.slow
def test_different_nccl_settings_exit_75_on_both_parts(settings: dict[str, str]) -> None:
    with Gang(*two_parts(settings, {"NCCL_ALGO": "Ring"}, {})) as gang:
        assert [part.wait_end() for part in gang.parts] == [75, 75]
        for part in gang.parts:
            assert "C-06 env.NCCL_ALGO: part0=Ring part1=(unset)" in part.log
            assert "the doctor found errors; the part ends with exit code 75" in part.log
