"""Parser of /proc/self/mountinfo (proc(5))."""

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mount:
    """One line of /proc/self/mountinfo. `device`: "major:minor". `root`: the folder of the file system that is mounted,
    "/" for all of it. `point`: mount point.
    """

    device: str
    root: str
    point: str
    options: frozenset[str]
    fstype: str
    source: str
    super_options: frozenset[str]

    @property
    def read_only(self) -> bool:
        return "ro" in self.options or "ro" in self.super_options


def parse_mountinfo(text: str) -> list[Mount]:
    """Parses the text of /proc/self/mountinfo. Returns the mounts in the order of the file. Ignores malformed lines."""
    mounts = []
    for line in text.splitlines():
        left, dash, right = line.partition(" - ")
        before, after = left.split(), right.split(" ")
        if not dash or len(before) < 6 or len(after) < 3:
            continue
        device, root, point, options = before[2:6]
        fstype, source, super_options = after[:3]
        mounts.append(
            Mount(
                device,
                _unescape(root),
                _unescape(point),
                frozenset(options.split(",")),
                fstype,
                _unescape(source),
                frozenset(super_options.split(",")),
            )
        )
    return mounts


def mount_of(mounts: Sequence[Mount], path: str) -> Mount | None:
    """Returns the mount of the file system that contains an absolute path; None if there is none.

    That is the mount with the longest mount point above the path; of several, the last one mounted.
    """
    best: Mount | None = None
    for mount in mounts:
        point = mount.point.rstrip("/")
        if path == mount.point or path.startswith(point + "/"):
            best = mount if best is None or len(mount.point) >= len(best.point) else best
    return best


def _unescape(text: str) -> str:
    """Decodes octal escapes such as \\040, which mountinfo uses for spaces, tabs, newlines and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
