"""Reads regular files up to a size limit: a FIFO without a writer, or an endless device, would block the start. Also
reads and atomically replaces files through which the processes of a part tell each other their state.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 16 << 20  # of a settings file; the member list of 4096 parts takes less than 1 MiB
_FILE_TYPES = {
    stat.S_IFIFO: "it is a FIFO",
    stat.S_IFCHR: "it is a device",
    stat.S_IFBLK: "it is a device",
    stat.S_IFSOCK: "it is a socket",
    stat.S_IFDIR: "Is a directory",
}


class NotRegularFileError(OSError):
    """The path is not a regular file, or the file is too large. `strerror` has the reason and what is allowed."""


def read(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Returns the content of a regular file. Raises OSError, with the reason in `strerror`."""
    check_regular(path, max_bytes)
    # The file may have been replaced since the check: O_NONBLOCK keeps the open of a FIFO from blocking.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        data = stream.read(max_bytes + 1)  # st_size is 0 for files in /proc
    if len(data) > max_bytes:
        raise _too_large(path, max_bytes)
    return data


def read_state(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file that another process replaces from time to time (see `replace`); {} if the file
    does not exist, cannot be read or is not valid JSON.
    """
    try:
        state: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return state


def replace(path: Path, text: str) -> None:
    """Replaces the text of a file, or creates the file, atomically: a process that reads it meanwhile gets either the
    old or the new text. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def check_regular(path: Path, max_bytes: int | None = None) -> None:
    """Raises OSError if the path is not a regular file of at most `max_bytes`.

    /dev/null counts as an empty file, even if it is bind-mounted under another name.
    """
    file_stat = path.stat()
    if stat.S_ISCHR(file_stat.st_mode) and file_stat.st_rdev == os.stat(os.devnull).st_rdev:
        return
    file_type = _FILE_TYPES.get(stat.S_IFMT(file_stat.st_mode))
    if file_type:
        raise NotRegularFileError(0, f"{file_type}; allowed: a regular file", str(path))
    if max_bytes is not None and file_stat.st_size > max_bytes:
        raise _too_large(path, max_bytes)


def _too_large(path: Path, max_bytes: int) -> NotRegularFileError:
    return NotRegularFileError(0, f"the file is larger than {max_bytes >> 20} MiB, the maximum", str(path))


def explain_missing(path: Path) -> str:
    """Returns the reason why a path does not exist: no such file, or a symbolic link without its target.

    The latter happens if a snapshot of a Hugging Face cache is mounted without its blobs.
    """
    if path.is_symlink():
        return f"it is a link to {path.readlink()}, which does not exist here: mount the folder that holds both"
    return "No such file or directory"
