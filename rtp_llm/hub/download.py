"""Downloads a model into the cache and reports the progress."""

import errno
import logging
import time
from dataclasses import dataclass, field

import httpx2
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from rtp_llm.errors import CommunicationError, ConfigError
from rtp_llm.hub.cache import NEEDED_FILES, UNNEEDED_FILES, cache_folder, remove_stale_files
from rtp_llm.hub.remote import CACHE_HAS_SPACE, HUB_ANSWERS, RemoteModel, gigabytes, look_up
from rtp_llm.hub.weights_download import download_weights

log = logging.getLogger(__name__)

MAX_FRUITLESS_ATTEMPTS = 5  # one after another, in which no byte arrives
MAX_WAIT_SECONDS = 30.0
_RATE_SECONDS = 30.0  # over which the speed is averaged


@dataclass
class DownloadProgress:
    """The fraction of a model that is in the cache. Measured on the disk, so files from other processes count too."""

    model: RemoteModel
    _samples: list[tuple[float, int]] = field(default_factory=list)

    def share(self) -> float:
        """Returns the fraction of the bytes that are in the cache, 0 … 1."""
        return min(1.0, self.model.bytes_on_disk() / max(1, self.model.total_bytes))

    def describe(self) -> str:
        """Returns the state for humans: "org/name: 42 % of 15.2 GB, 85.0 MB/s, 2 min left"."""
        done, total = self.model.bytes_on_disk(), self.model.total_bytes
        rate = self._rate(done)
        text = f"{self.model.name}: {done / max(1, total):.0%} of {gigabytes(total)}"
        return f"{text}, {rate / 1e6:.1f} MB/s, {_minutes((total - done) / rate)} left" if rate else text

    def _rate(self, done: int) -> float:
        """Returns bytes per second since the oldest call of the last 30 s; 0 if nothing arrived since."""
        now = time.monotonic()
        self._samples = [sample for sample in self._samples if sample[0] > now - _RATE_SECONDS] + [(now, done)]
        started, before = self._samples[0]
        return max(0, done - before) / (now - started) if now > started else 0.0


def download(model: RemoteModel) -> None:
    """Downloads the files that the cache does not have. Retries after network errors; what has arrived is kept.

    huggingface_hub locks each file, so that several processes share the work. Raises ConfigError if the disk is full or
    the hub denies access, CommunicationError if the hub does not respond.
    """
    remove_stale_files(model.name.repo, model.weights)
    attempt, best = 0, model.bytes_on_disk()
    while True:
        try:
            return _download_once(model)
        except (httpx2.HTTPError, LocalEntryNotFoundError, OSError) as error:
            _raise_if_final(model, error)
            done = model.bytes_on_disk()
            attempt, best = (1, done) if done > best else (attempt + 1, best)
            if attempt >= MAX_FRUITLESS_ATTEMPTS:
                raise CommunicationError(
                    f"{model.name}: {constants.ENDPOINT} sent nothing in {attempt} attempts: {_reason(error)};"
                    " what has arrived stays in the cache, and the next start resumes the download",
                    check=HUB_ANSWERS,
                ) from None
            wait = min(MAX_WAIT_SECONDS, 2.0**attempt)
            log.warning("%s: the download failed: %s; trying again in %.0f s", model.name, _reason(error), wait)
            time.sleep(wait)


def _download_once(model: RemoteModel) -> None:
    download_weights(model)
    # Under the branch's name, not the commit's, so that the cache learns which commit the branch is.
    snapshot_download(
        model.name.repo,
        revision=model.name.revision or None,
        allow_patterns=NEEDED_FILES,
        ignore_patterns=UNNEEDED_FILES,
    )


def _raise_if_final(model: RemoteModel, error: Exception) -> None:
    """Raises ConfigError if another attempt would fail in the same way."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise ConfigError(
            f"{model.name}: the disk of {cache_folder()} is full; free {gigabytes(model.missing_bytes())} on it, or set"
            " HF_HOME to a folder on a larger disk",
            check=CACHE_HAS_SPACE,
        ) from None
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        raise ConfigError(
            f"{cache_folder()}: cannot be written: {error.strerror}; set HF_HOME or HF_HUB_CACHE to a writable folder"
        ) from None
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
        look_up(model.name)  # says why


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
