"""The cache of huggingface_hub on this machine, which other programs share (HF_HOME, HF_HUB_CACHE).

Per model it has `blobs/<etag>` with the content of the files, `snapshots/<commit>/` with links to them, and
`refs/<revision>` with the commit of a branch. A blob that is being written is `blobs/<etag>.<random>.incomplete`, or
`blobs/<etag>.resumable-<random>.incomplete` if another process can continue it (`weights_download.py`).
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from rtp_llm.hub.name import ModelName

log = logging.getLogger(__name__)

# What the server and its tokenizer read. Other formats of the same weights are many times as large: `consolidated…` is
# Mistral's and Meta's own, and folders hold ONNX, GGUF or a pipeline's other models.
NEEDED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model"]
UNNEEDED_FILES = ["*/*.safetensors", "consolidated*", "original/*", "onnx/*"]
INCOMPLETE = ".incomplete"
RESUMABLE = ".resumable-"


def cached_snapshot(name: ModelName) -> Path | None:
    """Returns the folder with the model's files, without asking the hub; None if the cache does not have all of them.

    A branch stands for the commit that it had at the last download. So a restart needs no network and serves the same
    weights.
    """
    try:
        path = snapshot_download(
            name.repo,
            revision=name.revision or None,
            local_files_only=True,
            allow_patterns=NEEDED_FILES,
            ignore_patterns=UNNEEDED_FILES,
        )
    except LocalEntryNotFoundError:
        return None
    return Path(path) if _has_weights(Path(path)) else None


def _has_weights(folder: Path) -> bool:
    """Returns whether a snapshot has its config and all weights. Other programs may have cached its tokenizer only."""
    if not (folder / "config.json").exists():
        return False
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        shards = set(index["weight_map"].values())
    except FileNotFoundError:
        return any(folder.glob("*.safetensors"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return True  # the server names what is wrong with it
    return all((folder / shard).exists() for shard in shards)


def model_folder(repo: str) -> Path:
    """Returns the model's folder in the cache."""
    return cache_folder() / _folder_name(repo)


def blob_lock(repo: str, etag: str) -> Path:
    """Returns the file that a process locks while it writes a blob. The kernel unlocks it if the process ends."""
    return cache_folder() / ".locks" / _folder_name(repo) / f"{etag}.lock"


def cache_folder() -> Path:
    return Path(constants.HF_HUB_CACHE).expanduser()


def free_bytes() -> int:
    """Returns the free bytes of the disk on which the cache folder is, or will be created."""
    cache = cache_folder().absolute()
    return shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free


def bytes_on_disk(repo: str, sizes: Mapping[str, int]) -> int:
    """Returns how many bytes of a model's files are in the cache, whichever process wrote them. `sizes`: {etag: size in
    bytes} of the files to count.

    Of an incomplete file, counts the allocated disk blocks: a download can write several places of a file at once, so
    the length of the file says little.
    """
    found: dict[str, int] = {}
    for path in (model_folder(repo) / "blobs").glob("*"):
        etag = path.name.partition(".")[0]
        if etag in sizes:
            found[etag] = max(found.get(etag, 0), _written_bytes(path, sizes[etag]))
    return sum(found.values())


def _written_bytes(path: Path, size: int) -> int:
    try:
        blocks = path.stat().st_blocks * 512
    except OSError:  # renamed or removed meanwhile
        return 0
    return min(size, blocks) if path.name.endswith(INCOMPLETE) else size


def remove_stale_files(repo: str, continued: Collection[str]) -> None:
    """Removes the incomplete files that ended processes have left in the model's cache folder, to free disk space.

    Keeps the resumable files whose etag is in `continued`, because the caller is about to resume them.
    """
    for path in (model_folder(repo) / "blobs").glob(f"*{INCOMPLETE}"):
        etag, _, rest = path.name.partition(".")
        if etag in continued and f".{rest}".startswith(RESUMABLE):
            continue
        try:
            lock = os.open(blob_lock(repo, etag), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            log.info("removed %s, which an interrupted download left behind", path)
        except OSError:
            pass  # it is being written
        finally:
            os.close(lock)


def _folder_name(repo: str) -> str:
    return "models--" + repo.replace("/", "--")
