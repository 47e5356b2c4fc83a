"""The process that downloads a model, with the real client against a hub on loopback."""

import hashlib
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.hub.fake_hub import COMMIT, FakeHub, FakeModel, running_hub
from tests.ports import free_start_port

LARGE = "model.safetensors"
CONFIG = b'{"model_type": "qwen3"}'
NEEDED = {"config.json": CONFIG, "tokenizer.json": b"{}", "chat_template.jinja": b"x", "tokenizer.model": b"y"}
UNNEEDED = ("pytorch_model.bin", "onnx/model.safetensors", "consolidated.00.safetensors", "model.gguf", "README.md")
MIB = 1 << 20
UPLOAD = """
import sys
from hf_xet import XetSession
with XetSession().new_upload_commit(endpoint=sys.argv[1]) as commit:
    upload = commit.start_upload_file(sys.argv[2])
print(upload.result().xet_info.hash)
"""
DEADLINE = 60.0


@pytest.fixture(scope="module")
def weights() -> bytes:
    return random.Random(1).randbytes(24 * MIB)  # of several of the client's chunks, 10 MiB


@pytest.fixture
def hub(weights: bytes) -> Iterator[FakeHub]:
    files = NEEDED | {LARGE: weights} | dict.fromkeys(UNNEEDED, b"not needed")
    with running_hub(org__demo=FakeModel(files)) as running:
        yield running


class Downloader:
    """Starts download processes with one cache, and ends them."""

    def __init__(self, hub: FakeHub, home: Path, stack: ExitStack):
        self.hub, self.home, self._stack = hub, home, stack

    def start(self, *, inside: tuple[str, ...] = (), stderr: int = subprocess.STDOUT, **settings: str) -> "Download":
        environ = {"PATH": os.environ["PATH"], "HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home)}
        port = free_start_port()
        flags = ("--checkpoint_path=org/demo", f"--start_port={port}", "--host=127.0.0.1")
        process = subprocess.Popen(
            [*inside, sys.executable, "-m", "rtp_llm.api.download", *flags],
            env={**environ, **settings},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        self._stack.enter_context(process)
        self._stack.callback(process.kill)
        return Download(process, port)

    @property
    def model(self) -> Path:
        return self.home / "hub" / "models--org--demo"

    @property
    def snapshot(self) -> Path:
        return self.model / "snapshots" / COMMIT


class Download:
    """One download process."""

    def __init__(self, process: "subprocess.Popen[str]", port: int):
        self.process, self.port = process, port

    def wait(self, code: int = 0) -> str:
        """Returns the output, after it has ended with this exit code."""
        output, _ = self.process.communicate(timeout=DEADLINE)
        assert self.process.returncode == code, output
        return output

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", headers=headers, trust_env=False)


@pytest.fixture
def downloader(hub: FakeHub, tmp_path: Path) -> Iterator[Downloader]:
    with ExitStack() as stack:
        stack.callback(hub.gate.set)
        yield Downloader(hub, tmp_path / "home", stack)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def incomplete_files(downloader: Downloader) -> list[Path]:
    return list((downloader.model / "blobs").glob("*.incomplete"))


def test_downloads_what_the_server_reads_and_nothing_else(downloader: Downloader, weights: bytes) -> None:
    log = downloader.start().wait()
    files = {path.name: path.read_bytes() for path in downloader.snapshot.iterdir()}
    assert files == NEEDED | {LARGE: weights}
    assert "downloading org/demo: 0% of 25.2 MB, commit aaaaaaa" in log
    assert "org/demo: 100% of 25.2 MB" in log
    assert (downloader.model / "refs" / "main").read_text() == COMMIT


def test_goes_on_where_the_connection_was_cut(downloader: Downloader, hub: FakeHub, weights: bytes) -> None:
    hub.cuts = [13 * MIB, 11 * MIB]
    downloader.start().wait()
    assert (downloader.snapshot / LARGE).read_bytes() == weights
    spans = [request.partition("bytes=")[2] for request in hub.downloads(LARGE)]
    assert spans[0] == ""
    assert [int(span.rstrip("-")) for span in spans[1:]] == [10 * MIB, 20 * MIB], "whole chunks of the client"


@pytest.mark.slow
def test_goes_on_after_a_reset(downloader: Downloader, hub: FakeHub, weights: bytes) -> None:
    """What the kernel had received is lost with the connection."""
    hub.cuts, hub.resets = [23 * MIB], True
    log = downloader.start().wait()
    assert (downloader.snapshot / LARGE).read_bytes() == weights
    assert "trying again in 2 s" in log
    whole, rest = hub.downloads(LARGE)
    assert rest in (f"{whole} bytes={10 * MIB}-", f"{whole} bytes={20 * MIB}-")
    assert len(hub.downloads("config.json")) == 1, "what was complete is not sent again"


def kill_in_the_middle(downloader: Downloader, hub: FakeHub) -> Path:
    """Kills a download when the small files and 10 MiB of the large one have arrived. Returns the unfinished file."""
    hub.gate.clear()
    killed = downloader.start()
    assert hub.started.wait(DEADLINE)
    wait_until(lambda: sum(path.stat().st_size for path in incomplete_files(downloader)) >= 10 * MIB)
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait()
    hub.gate.set()
    [unfinished] = incomplete_files(downloader)
    return unfinished


@pytest.mark.slow
def test_the_next_process_goes_on_after_a_kill(downloader: Downloader, hub: FakeHub, weights: bytes) -> None:
    unfinished = kill_in_the_middle(downloader, hub)
    assert unfinished.stat().st_size == 10 * MIB
    hub.bytes_sent.clear()
    log = downloader.start().wait()
    assert hub.bytes_sent[LARGE] == len(weights) - 10 * MIB
    assert "org/demo: resuming model.safetensors at 10 MB" in log
    assert not incomplete_files(downloader)
    assert (downloader.snapshot / LARGE).read_bytes() == weights


@pytest.mark.slow
def test_a_damaged_part_is_fetched_again(downloader: Downloader, hub: FakeHub, weights: bytes) -> None:
    """After a crash of the machine, the file system can have lost what the killed process wrote."""
    unfinished = kill_in_the_middle(downloader, hub)
    unfinished.write_bytes(bytes(10 * MIB))
    log = downloader.start().wait()
    assert "model.safetensors: the resumed download has SHA-256 " in log
    assert (downloader.snapshot / LARGE).read_bytes() == weights
    assert not incomplete_files(downloader)


@pytest.mark.slow
def test_of_several_parts_the_longest_is_continued(downloader: Downloader, hub: FakeHub, weights: bytes) -> None:
    unfinished = kill_in_the_middle(downloader, hub)
    etag = unfinished.name.partition(".")[0]
    unfinished.with_name(f"{etag}.resumable-1234.incomplete").write_bytes(weights[: 11 * MIB])
    hub.bytes_sent.clear()
    downloader.start().wait()
    assert hub.bytes_sent[LARGE] == len(weights) - 11 * MIB
    assert not incomplete_files(downloader)


@pytest.mark.slow
def test_parts_that_are_not_continued_are_removed(downloader: Downloader, hub: FakeHub, weights: bytes) -> None:
    unfinished = kill_in_the_middle(downloader, hub)
    etag = unfinished.name.partition(".")[0]
    of_the_library = unfinished.rename(unfinished.with_name(f"{etag}.1234.incomplete"))
    of_another_commit = unfinished.with_name(f"{'0' * 64}.resumable-1234.incomplete")
    of_another_commit.touch()
    (downloader.home / "hub" / ".locks" / "models--org--demo" / f"{'0' * 64}.lock").touch()
    log = downloader.start().wait()
    assert f"removed {of_the_library}" in log
    assert f"removed {of_another_commit}" in log
    assert (downloader.snapshot / LARGE).read_bytes() == weights


@pytest.mark.slow
def test_goes_on_from_xet_storage(downloader: Downloader, hub: FakeHub, tmp_path: Path, weights: bytes) -> None:
    storage = f"local://{tmp_path}/xet"  # what hf_xet has for tests; one process opens it
    (tmp_path / "weights").write_bytes(weights)
    upload = [sys.executable, "-c", UPLOAD, storage, str(tmp_path / "weights")]
    unfinished = kill_in_the_middle(downloader, hub)
    hub.models["org/demo"].xet[LARGE] = subprocess.check_output(upload, text=True).strip()
    hub.xet_storages = ["http://127.0.0.1:9", storage]
    hub.bytes_sent.clear()
    log = downloader.start().wait()
    assert "trying again in 2 s" in log
    assert log.count("resuming model.safetensors at 10 MB") == 2
    assert "SHA-256" not in log, "only the missing bytes were asked for"
    assert hub.bytes_sent[LARGE] == 0
    assert (downloader.snapshot / LARGE).read_bytes() == weights
    assert not unfinished.exists()


@pytest.mark.slow
def test_two_parts_of_a_machine_share_one_download(downloader: Downloader, hub: FakeHub) -> None:
    hub.gate.clear()
    first = downloader.start()
    assert hub.started.wait(DEADLINE)
    second = downloader.start()
    wait_until(lambda: phase(second)[1] > 0.4)
    assert phase(first)[0] == "download"
    assert incomplete_files(downloader), "the second one leaves the file alone"
    hub.gate.set()
    first.wait()
    second.wait()
    assert len(hub.downloads(LARGE)) == len(hub.downloads("config.json")) == 1


def phase(download: Download) -> tuple[str, float]:
    """Returns the phase and the progress that /health tells; "" and 0 as long as it does not listen."""
    try:
        body = download.get("/health").json()
    except httpx.TransportError:
        return "", 0.0
    return body["phase"], body["progress"]


def test_serves_health_meanwhile(downloader: Downloader, hub: FakeHub) -> None:
    hub.gate.clear()
    download = downloader.start()
    wait_until(lambda: phase(download)[1] > 0.4)
    health = download.get("/health")
    assert (health.status_code, health.headers["Retry-After"]) == (503, "1")
    assert 0.4 < health.json()["progress"] < 0.6
    assert health.json()["detail"].startswith("download: org/demo: ")
    assert " of 25.2 MB" in health.json()["detail"]
    assert download.get("/liveness").status_code == 200
    assert download.get("/metrics").status_code == 200
    assert download.get("/doctor", via="1.1 proxy").status_code == 403, "an admin route answers this machine only"
    doctor = download.get("/doctor")
    assert (doctor.status_code, doctor.headers["Retry-After"]) == (503, "1")
    assert "the doctor runs after the download; download: org/demo: " in doctor.text
    chat = httpx.post(f"http://127.0.0.1:{download.port}/v1/chat/completions", json={}, trust_env=False)
    assert (chat.status_code, chat.headers["Retry-After"]) == (503, "1")
    assert chat.json()["error"]["message"].startswith("download: org/demo: ")


@pytest.mark.slow
def test_health_tells_only_the_phase_to_strangers(downloader: Downloader, hub: FakeHub) -> None:
    hub.gate.clear()
    download = downloader.start(API_KEY="sk-1")
    assert hub.started.wait(DEADLINE)
    assert download.get("/health").json() == {"phase": "download"}
    assert "org/demo" in download.get("/health", authorization="Bearer sk-1").json()["detail"]
    assert (download.get("/liveness").status_code, download.get("/v1/models").status_code) == (200, 401)


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_download(downloader: Downloader, hub: FakeHub, tmp_path: Path) -> None:
    script = 'mount -t tmpfs -o size=30m tmpfs "$0" && exec "$@"'
    inside = ("unshare", "--mount", "sh", "-c", script, str(tmp_path))
    if not shutil.which("unshare") or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    hub.gate.clear()
    download = downloader.start(inside=inside)
    assert hub.started.wait(DEADLINE)
    filler = Path(f"/proc/{download.process.pid}/root{tmp_path}/filler")
    filler.write_bytes(bytes(12 * MIB))
    hub.gate.set()
    assert "org/demo: the disk of " in download.wait(code=64)


@pytest.mark.slow
def test_a_terminal_shows_a_bar(downloader: Downloader, hub: FakeHub) -> None:
    terminal, its_end = pty.openpty()
    termios.tcsetwinsize(its_end, (24, 80))
    hub.gate.clear()
    download = downloader.start(stderr=its_end)
    os.close(its_end)
    text = b""
    while b"org/demo:  42%" not in text:  # one of the client's chunks of 10 MiB
        text += os.read(terminal, 4096)
    hub.gate.set()
    download.wait()
    os.close(terminal)
    assert b"\r" in text
    assert b"25.2M" in text


def test_no_log_line_has_the_token(downloader: Downloader, hub: FakeHub) -> None:
    hub.models["org/demo"].access = "hf_secret"
    assert "hf_secret" not in downloader.start(HF_TOKEN="hf_secret", LOG_LEVEL="DEBUG").wait()
    log = downloader.start(HF_TOKEN="hf_other", HF_HUB_CACHE=str(downloader.home / "other")).wait(code=64)
    assert "org/demo: needs permission, but HF_TOKEN has no access" in log
    assert "hf_other" not in log


def test_the_cache_holds_what_the_hub_lists(downloader: Downloader, hub: FakeHub, weights: bytes) -> None:
    """Progress and space are counted by ETag, which is the name of a blob."""
    downloader.start().wait()
    names = {path.name for path in (downloader.model / "blobs").iterdir()}
    assert hashlib.sha256(weights).hexdigest() in names
    assert len(names) == len(NEEDED) + 1
