"""Asks a hub for a model's commit and files, or reports why this machine cannot get them.

Every reason is a ConfigError with the id of the doctor's check that reports the same error.
"""

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import httpx2
from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, filter_repo_objects, set_client_factory

from rtp_llm.errors import ConfigError
from rtp_llm.hub.cache import NEEDED_FILES, UNNEEDED_FILES, bytes_on_disk, cache_folder, free_bytes
from rtp_llm.hub.name import ModelName

HUB_ANSWERS, MODEL_EXISTS, ACCESS_GRANTED, CACHE_HAS_SPACE = "M-17", "M-18", "M-19", "M-20"  # checks of the doctor
TIMEOUT_SECONDS = 5.0
MAX_NEAR_NAMES = 3
_INVALID_TOKEN = "Invalid credentials in Authorization header"
_MAX_LISTED = 200  # models of an organization among which a near name is looked for

# The library's own client has no timeout, except for calls that set one.
set_client_factory(lambda: httpx2.Client(follow_redirects=True, timeout=TIMEOUT_SECONDS))
logging.getLogger("httpx2").setLevel(logging.WARNING)  # else a line per request
logging.getLogger("huggingface_hub").handlers.clear()  # else each line appears twice
disable_progress_bars()  # which count files, and only those of this process


@dataclass(frozen=True)
class RemoteModel:
    """The files of one commit of a model on the hub.

    `blobs`: {etag: size in bytes} of all files that the server needs. The cache stores a file's content under its etag.
    `weights`: {etag: file name} of the large files (Git LFS), whose etag is their SHA-256.
    """

    name: ModelName
    commit: str
    blobs: dict[str, int]
    weights: dict[str, str] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        return sum(self.blobs.values())

    def bytes_on_disk(self) -> int:
        return bytes_on_disk(self.name.repo, self.blobs)

    def missing_bytes(self) -> int:
        """Returns how many bytes are still to download."""
        return self.total_bytes - self.bytes_on_disk()

    def check_space(self) -> None:
        """Raises ConfigError if the cache's disk has too little space for the missing files."""
        missing, free = self.missing_bytes(), free_bytes()
        if missing > free:
            raise ConfigError(
                f"{cache_folder()} has {gigabytes(free)} free, but {gigabytes(missing)} of {self.name} are"
                " still to download; set HF_HOME or HF_HUB_CACHE to a folder on a larger disk",
                check=CACHE_HAS_SPACE,
            )


def look_up(name: ModelName) -> RemoteModel:
    """Asks the hub for the model, and returns the list of its files at the commit of its revision. Raises ConfigError
    if this machine cannot get them.
    """
    if constants.is_offline_mode():
        raise ConfigError(
            f"{name}: is neither an existing folder nor complete in the cache {cache_folder()}, and HF_HUB_OFFLINE=1"
            " forbids the download",
            check=HUB_ANSWERS,
        )
    with _explained(name):
        info = HfApi().model_info(
            name.repo, revision=name.revision or None, files_metadata=True, timeout=TIMEOUT_SECONDS
        )
        files = {file.rfilename: file for file in info.siblings or ()}
        needed = list(filter_repo_objects(files, allow_patterns=NEEDED_FILES, ignore_patterns=UNNEEDED_FILES))
        if "config.json" not in needed or not any(file.endswith(".safetensors") for file in needed):
            found = ", ".join(sorted(files)[:8]) or "nothing"
            raise ConfigError(
                f"{name}: has no config.json or no *.safetensors file; its files on the hub: {found}; allowed: a model"
                " in transformers' format",
                check=MODEL_EXISTS,
            )
        # The list of a gated model is public, its files are not.
        get_hf_file_metadata(hf_hub_url(name.repo, "config.json", revision=info.sha), timeout=TIMEOUT_SECONDS)
    blobs = {_etag(files[file]): files[file].size or 0 for file in needed}
    weights = {_etag(files[file]): file for file in needed if getattr(files[file], "lfs", None)}
    return RemoteModel(name, info.sha or "", blobs, weights)


def _etag(file: object) -> str:
    lfs = getattr(file, "lfs", None)
    return str(lfs.sha256 if lfs else getattr(file, "blob_id", ""))


@contextmanager
def _explained(name: ModelName) -> Iterator[None]:
    """Converts the hub client's errors to a ConfigError that names the problem and a fix."""
    hub = constants.ENDPOINT
    try:
        yield
    except GatedRepoError as error:
        raise _access_error(name, error) from None
    except RevisionNotFoundError:
        raise ConfigError(
            f"{name}: {hub}/{name.repo} has no revision {name.revision!r}; allowed: a branch, a tag or a commit",
            check=MODEL_EXISTS,
        ) from None
    except RemoteEntryNotFoundError as error:
        raise ConfigError(
            f"{name}: {hub} lists a file of this model, but does not have its content: {error}; try again later, or set"
            " HF_ENDPOINT to another hub",
            check=MODEL_EXISTS,
        ) from None
    except RepositoryNotFoundError:
        raise _not_found(name) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401 and error.response.headers.get("X-Error-Message") != _INVALID_TOKEN:
            raise _not_found(name) from None  # so say hubs of a name that they do not have
        if status in (401, 403):
            raise _access_error(name, error) from None
        raise ConfigError(
            f"{name}: {hub} answers {status} {error.response.reason_phrase}; try again later, or set HF_ENDPOINT to a"
            " mirror",
            check=HUB_ANSWERS,
        ) from None
    except (httpx2.HTTPError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(
            f"{name}: is neither an existing folder nor complete in the cache {cache_folder()}, and {hub} cannot be"
            f" reached: {reason}; allowed: an existing folder, or a hub that this machine reaches (HF_ENDPOINT,"
            " https_proxy)",
            check=HUB_ANSWERS,
        ) from None


def _access_error(name: ModelName, error: HfHubHTTPError) -> ConfigError:
    """Returns the error for a gated model or an invalid token, with the hub's own message if it has one."""
    token = "HF_TOKEN has no access" if get_token() else "no token is set"
    reason = (error.server_message or "").strip().splitlines()
    said = f" ({reason[0]})" if reason else ""
    page = f"{constants.ENDPOINT}/{name.repo}"
    return ConfigError(
        f"{name}: needs permission, but {token}{said}; accept its terms on {page}, and set HF_TOKEN to a token of that"
        " account",
        check=ACCESS_GRANTED,
    )


def _not_found(name: ModelName) -> ConfigError:
    near = near_names(name)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    private = "a private one needs HF_TOKEN" if not get_token() else "HF_TOKEN has no access to a private one"
    return ConfigError(
        f"{name}: is not an existing folder, and {constants.ENDPOINT} has no such model ({private}){meant};"
        " allowed: an existing folder, or org/name of a model",
        check=MODEL_EXISTS,
    )


def near_names(name: ModelName) -> list[str]:
    """Returns names of similar models on the hub, the most similar first; none if the hub does not respond."""
    org, _, model = name.repo.partition("/")
    api = HfApi()
    try:
        listed = [*islice(api.list_models(author=org), _MAX_LISTED), *islice(api.list_models(search=model), 20)]
    except (httpx2.HTTPError, OSError):
        return []
    return difflib.get_close_matches(name.repo, {entry.id for entry in listed}, n=MAX_NEAR_NAMES)


def gigabytes(num_bytes: int) -> str:
    """Returns a size in bytes as text, in powers of ten as on hubs: "15.2 GB"."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
