"""When a download is tried again, and when it is given up."""

import errno
import time
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import constants

from rtp_llm.api.download import Reporter
from rtp_llm.errors import CommunicationError, ConfigError
from rtp_llm.hub import download as module
from rtp_llm.hub.download import MAX_FRUITLESS_ATTEMPTS, DownloadProgress, download
from rtp_llm.hub.name import ModelName
from rtp_llm.hub.remote import RemoteModel

CUT = httpx2.ReadError("connection reset")


class Attempts:
    """Takes the place of one attempt: adds bytes to the blob, then fails."""

    def __init__(self, blob: Path, *outcomes: tuple[int, Exception | None]):
        self.blob, self.outcomes, self.waits = blob, list(outcomes), list[float]()

    def __call__(self, model: RemoteModel) -> None:
        num_bytes, error = self.outcomes.pop(0)
        with self.blob.open("ab") as stream:
            stream.write(bytes(num_bytes))
        if error:
            raise error


@pytest.fixture
def model() -> RemoteModel:
    return RemoteModel(ModelName("org/demo"), "a" * 40, {"etag": 1 << 20})


@pytest.fixture
def blob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--demo" / "blobs"
    folder.mkdir(parents=True)
    return folder / "etag.1234.incomplete"


def attempts(monkeypatch: pytest.MonkeyPatch, blob: Path, *outcomes: tuple[int, Exception | None]) -> Attempts:
    fake = Attempts(blob, *outcomes)
    monkeypatch.setattr(module, "_download_once", fake)
    monkeypatch.setattr(time, "sleep", fake.waits.append)
    return fake


def test_goes_on_as_long_as_bytes_arrive(monkeypatch: pytest.MonkeyPatch, blob: Path, model: RemoteModel) -> None:
    outcomes = [(4096, CUT)] * (3 * MAX_FRUITLESS_ATTEMPTS)
    fake = attempts(monkeypatch, blob, *outcomes, (4096, None))
    download(model)
    assert fake.waits == [2.0] * len(outcomes)


def test_gives_up_if_nothing_arrives(monkeypatch: pytest.MonkeyPatch, blob: Path, model: RemoteModel) -> None:
    fake = attempts(monkeypatch, blob, (4096, CUT), *[(0, CUT)] * (MAX_FRUITLESS_ATTEMPTS - 1))
    with pytest.raises(CommunicationError, match=r"org/demo: .* sent nothing in 5 attempts: connection reset"):
        download(model)
    assert fake.waits == [2.0, 4.0, 8.0, 16.0]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"org/demo: the disk of /.* is full; free 0\.5 MB on it, or set HF_HOME to a "),
        (errno.EROFS, r"/.*: cannot be written: Read-only file system; set HF_HOME or HF_HUB_CACHE"),
    ],
)
def test_a_disk_that_fails_is_final(
    monkeypatch: pytest.MonkeyPatch, blob: Path, model: RemoteModel, number: int, message: str
) -> None:
    fake = attempts(monkeypatch, blob, (1 << 19, OSError(number, "Read-only file system")))
    with pytest.raises(ConfigError, match=message):
        download(model)
    assert not fake.waits


def test_a_log_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, blob: Path, model: RemoteModel, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rtp_llm.api.download.LOG_SECONDS", 0.01)
    monkeypatch.setattr("rtp_llm.api.download._has_terminal", lambda: False)
    caplog.set_level("INFO")
    blob.write_bytes(bytes(1 << 18))
    with Reporter(DownloadProgress(model)):
        while "org/demo: 25% of 1.0 MB" not in caplog.messages:
            time.sleep(0.01)
    assert caplog.messages[0] == "downloading org/demo: 25% of 1.0 MB, commit aaaaaaa"


def test_speed_and_remaining_time(monkeypatch: pytest.MonkeyPatch, blob: Path, model: RemoteModel) -> None:
    now = iter((0.0, 1.0, 2.0, 40.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    progress = DownloadProgress(model)
    texts = []
    for kib in (0, 256, 512, 512):
        blob.write_bytes(bytes(kib << 10))
        texts.append(progress.describe())
    assert texts == [
        "org/demo: 0% of 1.0 MB",
        "org/demo: 25% of 1.0 MB, 0.3 MB/s, 3 s left",
        "org/demo: 50% of 1.0 MB, 0.3 MB/s, 2 s left",
        "org/demo: 50% of 1.0 MB",
    ]
