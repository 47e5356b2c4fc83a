"""Downloads a model's weights into the Hugging Face cache, and resumes files that an ended process left unfinished.

huggingface_hub alone starts every attempt with a new file, so that a killed process would lose up to 50 GB. This module
writes the files itself, with huggingface_hub's metadata, locks and transfer over HTTP and Xet. When huggingface_hub
downloads the rest of the model afterwards, it finds these files in the cache and only creates the links to them.

An unfinished file is `blobs/<etag>.resumable-<random>.incomplete`. One process writes it from start to end. A process
that resumes it first renames it, with a new random part. So two processes never write one file, even on file systems on
which locks do not work.
"""

import hashlib
import logging
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, XetFileData, build_hf_headers

from rtp_llm.hub.cache import INCOMPLETE, RESUMABLE, blob_lock, model_folder
from rtp_llm.hub.remote import TIMEOUT_SECONDS, RemoteModel

try:
    import hf_xet
except ImportError:  # huggingface_hub has it on common platforms only
    hf_xet = None

log = logging.getLogger(__name__)

MAX_PARALLEL_FILES = 8  # as huggingface_hub does


def download_weights(model: RemoteModel) -> None:
    """Downloads the files of `model.weights` that the cache lacks, several at once.

    Raises huggingface_hub's errors; the received part of a file stays in the cache, and the next call continues it.
    Raises OSError and removes the file if a continued file's SHA-256 is not its etag.
    """
    with ThreadPoolExecutor(MAX_PARALLEL_FILES) as pool:
        list(pool.map(partial(_download_file, model), model.weights))


def _download_file(model: RemoteModel, etag: str) -> None:
    blob = model_folder(model.name.repo) / "blobs" / etag
    lock = blob_lock(model.name.repo, etag)
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        unfinished = _claim_unfinished(blob, model.blobs[etag])
        with unfinished.open("r+b") as stream:
            start = stream.seek(0, 2)
            if start:
                log.info("%s: resuming %s at %.0f MB", model.name, model.weights[etag], start / 1e6)
            _receive(model, etag, stream)
        if start:
            _verify(unfinished, etag, f"{model.name}: {model.weights[etag]}")
        unfinished.rename(blob)


def _claim_unfinished(blob: Path, size: int) -> Path:
    """Returns the unfinished file to resume, under a new name: the longest one, or an empty one. Removes the others."""
    found = sorted(blob.parent.glob(f"{blob.name}{RESUMABLE}*"), key=lambda path: path.stat().st_size)
    claimed = blob.with_name(f"{blob.name}{RESUMABLE}{uuid.uuid4().hex[:8]}{INCOMPLETE}")
    if found and found[-1].stat().st_size <= size:
        found.pop().rename(claimed)
    else:
        claimed.touch(exist_ok=False)
    for path in found:
        path.unlink(missing_ok=True)
    return claimed


def _receive(model: RemoteModel, etag: str, stream: BinaryIO) -> None:
    """Appends the missing bytes of a file, of which `stream` has the first ones."""
    url = hf_hub_url(model.name.repo, model.weights[etag], revision=model.commit)
    headers, size = build_hf_headers(), model.blobs[etag]
    xet = get_hf_file_metadata(url, timeout=TIMEOUT_SECONDS).xet_file_data
    if not hf_xet or not xet or constants.HF_HUB_DISABLE_XET:
        http_get(url, stream, resume_size=stream.tell(), headers=headers, expected_size=size)
    elif stream.tell() < size:
        _receive_from_xet(xet, size, stream, headers)


def _receive_from_xet(xet: XetFileData, size: int, stream: BinaryIO, headers: dict[str, str]) -> None:
    try:
        group = _xet_session().new_download_stream_group(
            token_refresh_url=xet.refresh_route, token_refresh_headers=headers
        )
        stream.writelines(group.download_stream(hf_xet.XetFileInfo(xet.file_hash, size), start=stream.tell()))
    except RuntimeError as error:  # hf_xet's error for all that is not a failed connection
        raise OSError(f"Xet storage: {error}") from None
    if stream.tell() < size:  # a stream that fails only ends
        raise OSError(f"Xet storage ended the transfer of a file after {stream.tell()} of its {size} bytes")


@cache
def _xet_session() -> "hf_xet.XetSession":
    """Returns a session that leaves it to `download` to try again: its own attempts take a quarter of an hour."""
    limits = {"client.retry_max_attempts": 1, "client.read_timeout": "60s"}
    return hf_xet.XetSession(hf_xet.XetConfig().with_config(limits))


def _verify(path: Path, etag: str, label: str) -> None:
    """Raises OSError and removes a file whose SHA-256 is not `etag`, as after a crash of the machine."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != etag:
        path.unlink()
        raise OSError(
            f"{label}: the resumed download has SHA-256 {digest} instead of {etag}; its file was removed, and the next"
            " attempt starts from the beginning"
        )
