"""Files that an operator names, read with bounds: a FIFO that nobody writes to, or a device without an end, must not
hold the server before it has said a word.
"""

import os
import stat
from pathlib import Path

MAX_FILE_BYTES = 16 << 20  # bytes of a settings file; the member list of 4096 parts takes less than one
_KINDS = {
    stat.S_IFIFO: "it is a FIFO",
    stat.S_IFCHR: "it is a device",
    stat.S_IFBLK: "it is a device",
    stat.S_IFSOCK: "it is a socket",
    stat.S_IFDIR: "Is a directory",
}


class NotRegularFileError(OSError):
    """It is there, and no file of the kind that is read here; `strerror` says what it is and what is allowed."""


def read(path: Path, most: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file. Raises OSError, whose `strerror` says why not."""
    check_regular(path, most)
    # The path may have become another thing meanwhile: opened so, even a FIFO lets go at once.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        data = stream.read(most + 1)  # files below /proc say that they have no size
    if len(data) > most:
        raise _too_large(path, most)
    return data


def check_regular(path: Path, most: int | None = None) -> None:
    """Raises OSError where the path is none of a regular file, or of one that is larger than `most`. /dev/null, under
    whatever name it is mounted, is an empty file."""
    seen = path.stat()
    if stat.S_ISCHR(seen.st_mode) and seen.st_rdev == os.stat(os.devnull).st_rdev:
        return
    kind = _KINDS.get(stat.S_IFMT(seen.st_mode))
    if kind:
        raise NotRegularFileError(0, f"{kind}; allowed: a regular file", str(path))
    if most is not None and seen.st_size > most:
        raise _too_large(path, most)


def _too_large(path: Path, most: int) -> NotRegularFileError:
    return NotRegularFileError(0, f"it is larger than {most >> 20} MiB, which is allowed at most", str(path))


def explain_missing(path: Path) -> str:
    """Why a path leads to nothing: it is not there, or is a link whose target is not, as where a snapshot of a
    Hugging Face cache was mounted without its blobs."""
    if path.is_symlink():
        return f"it is a link to {path.readlink()}, which is not here: mount the folder that holds both"
    return "No such file or directory"
