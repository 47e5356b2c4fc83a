"""/proc/self/mountinfo, parsed (proc(5))."""

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mount:
    """One line: where, of what kind, with which options; `device` is "major:minor"."""

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
    """In the file's order, which is the order of mounting; lines that are not understood are left out."""
    found = []
    for line in text.splitlines():
        left, dash, right = line.partition(" - ")
        before, after = left.split(), right.split(" ")
        if not dash or len(before) < 6 or len(after) < 3:
            continue
        _, _, device, root, point, options = before[:6]
        fstype, source, super_options = after[0], after[1], after[2]
        found.append(
            Mount(
                device,
                _plain(root),
                _plain(point),
                frozenset(options.split(",")),
                fstype,
                _plain(source),
                frozenset(super_options.split(",")),
            )
        )
    return found


def mount_of(mounts: Sequence[Mount], path: str) -> Mount | None:
    """The mount that holds an absolute path: the longest point above it, of equals the last mounted."""
    best: Mount | None = None
    for mount in mounts:
        point = mount.point.rstrip("/")
        if path == mount.point or path.startswith(point + "/"):
            best = mount if best is None or len(mount.point) >= len(best.point) else best
    return best


def _plain(text: str) -> str:
    """Spaces and backslashes are written as octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
