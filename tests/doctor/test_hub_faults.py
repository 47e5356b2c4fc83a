"""A model given by its name: what the doctor says before the download, of a hub on loopback."""

import dataclasses
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from doctor.examine import RunOptions, run_doctor
from rtp_llm.machine.gpus import completes_within
from tests.doctor.fixtures import DEMO, FakeHost, doctor, failed_checks, report
from tests.hub.fake_hub import FakeHub, FakeModel, demo_model, running_hub
from tests.ports import free_start_port
from tests.quick import slow_except

HUB_CHECKS = ("M-17", "M-18", "M-19", "M-20")
FAULTS: dict[str, tuple[str, str, dict[str, str], str, str]] = {
    # name: (check, CHECKPOINT_PATH, further environment, part of the message, part of the fix)
    "no network": (
        "M-17",
        "org/demo",
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        "http://127.0.0.1:9 cannot be reached: [Errno 111] Connection refused; allowed: an existing folder, or a hub",
        "https_proxy",
    ),
    "offline": ("M-17", "org/demo", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE=1 forbids the download", "HF_HOME"),
    "a typo": ("M-18", "org/dmeo", {}, "did you mean org/demo?", "correct the name"),
    "another organization": ("M-18", "orgs/demo", {}, "did you mean org/demo?", "correct the name"),
    "an unknown name": ("M-18", "nobody/nothing", {}, "has no such model (a private one needs HF_TOKEN);", "correct"),
    "an unknown revision": ("M-18", "org/demo@v7", {}, "org/demo has no revision 'v7'; allowed: a branch", "correct"),
    "another format": (
        "M-18",
        "org/pickled",
        {},
        "*.safetensors file; its files on the hub: config.json, pytorch_model.bin",
        "correct",
    ),
    "no token": ("M-19", "org/gated", {}, "needs permission, but no token is set", "HF_TOKEN"),
    "an expired token": (
        "M-19",
        "org/demo",
        {"HF_TOKEN": "hf_expired"},
        "HF_TOKEN has no access (Invalid credentials in Authorization header)",
        "HF_TOKEN",
    ),
    "no access": ("M-19", "org/gated", {"HF_TOKEN": "hf_other"}, "HF_TOKEN has no access", "accept the terms"),
}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    pickled = FakeModel({"config.json": b"{}", "pytorch_model.bin": b"x" * 100})
    gated = dataclasses.replace(demo_model(), access="hf_secret")
    with running_hub(org__demo=demo_model(), org__pickled=pickled, org__gated=gated) as running:
        yield running


@pytest.fixture
def environ(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    return {"START_PORT": str(free_start_port()), "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}


@pytest.mark.parametrize("name", slow_except(FAULTS, "a typo"))
def test_fault_is_the_only_problem_found(name: str, environ: dict[str, str]) -> None:
    id, model, settings, message, fix = FAULTS[name]
    found = report(doctor("-o", "json", env={**environ, "CHECKPOINT_PATH": model, **settings}))
    assert failed_checks(found) == {id: "error"}
    check = next(check for check in found["checks"] if check["id"] == id)
    assert message in check["actual"]
    assert fix in check["fix"]["docker"] or fix in check["fix"]["host"]


@pytest.mark.slow
def test_a_hub_out_of_order(hub: FakeHub, environ: dict[str, str]) -> None:
    hub.status = 503
    found = report(doctor("-o", "json", env={**environ, "CHECKPOINT_PATH": "org/demo"}))
    assert failed_checks(found) == {"M-17": "error"}
    assert any("answers 503 Service Unavailable; try again later" in check["actual"] for check in found["checks"])


@pytest.mark.slow
@pytest.mark.fault("M-20")
def test_a_disk_without_space(environ: dict[str, str], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    environ |= {"CHECKPOINT_PATH": "org/demo", "HF_HOME": str(disk / "home")}
    found = report(doctor("-o", "json", env=environ, inside=on_small_disk(disk)))
    assert failed_checks(found) == {"M-20": "error"}
    actual = next(check["actual"] for check in found["checks"] if check["id"] == "M-20")
    assert actual.startswith(f"{disk}/home/hub has 4.2 MB free, but 7.9 MB of org/demo are still to download")


def on_small_disk(mount_point: Path) -> list[str]:
    """Returns a command prefix that runs a program with a disk of 4 MiB at `mount_point`."""
    script = 'mount -t tmpfs -o size=4m tmpfs "$0" && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", script, str(mount_point)]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    return prefix


def test_a_model_to_download_is_no_problem(hub: FakeHub, environ: dict[str, str]) -> None:
    statuses = status_by_id({**environ, "CHECKPOINT_PATH": "org/demo"})
    assert {id: statuses[id] for id in HUB_CHECKS} == dict.fromkeys(HUB_CHECKS, "ok")
    assert statuses["M-08"] == statuses["M-12"] == "skip"
    assert not hub.downloads("config.json"), "the doctor downloads nothing"


@pytest.mark.timeout(60)
def test_a_hung_cache_does_not_hang_the_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doctor.context.localized", lambda config: threading.Event().wait())
    monkeypatch.setattr("doctor.context.completes_within", lambda question: completes_within(question, 0.3))
    monkeypatch.setattr("doctor.examine.is_running", lambda ctx: False)
    host = FakeHost(tmp_path, {"CHECKPOINT_PATH": "org/demo", "START_PORT": str(free_start_port())})
    found = run_doctor(host, (), RunOptions(), print)
    assert {f.id: f.status for f in found.problems()} == {"M-08": "error"}
    actual = next(check.actual for check in found.checks if check.id == "M-08")
    assert actual == "CHECKPOINT_PATH=org/demo: the file system of the cache (HF_HOME) does not respond"


def test_the_token_opens_a_gated_model(environ: dict[str, str]) -> None:
    statuses = status_by_id({**environ, "CHECKPOINT_PATH": "org/gated", "HF_TOKEN": "hf_secret"})
    assert statuses["M-19"] == "ok"


@pytest.mark.slow
def test_a_cached_model_is_checked_like_a_folder(hub: FakeHub, environ: dict[str, str], tmp_path: Path) -> None:
    """The cache as any huggingface_hub leaves it: `refs` and `snapshots`."""
    model = tmp_path / "home/hub/models--org--demo"
    shutil.copytree(DEMO, model / "snapshots" / ("a" * 40))
    (model / "refs").mkdir()
    (model / "refs/main").write_text("a" * 40)
    statuses = status_by_id({**environ, "CHECKPOINT_PATH": "org/demo"})
    assert {id: statuses[id] for id in HUB_CHECKS} == dict.fromkeys(HUB_CHECKS, "skip")
    assert statuses["M-08"] == statuses["M-12"] == statuses["M-07"] == "ok"
    assert not hub.requests


def status_by_id(environ: Mapping[str, str]) -> dict[str, str]:
    found = report(doctor("-o", "json", env=environ))
    assert failed_checks(found) == {}
    return {check["id"]: check["status"] for check in found["checks"]}
