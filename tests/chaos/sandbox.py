"""The machine of one part, as far as faults reach it: network, /dev/shm, the disk of its run directory, its cgroup."""

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from tests.chaos.network import Namespace

SHM_MIB, DISK_MIB = 64, 16
REMOVE_SECONDS = 20.0
CGROUP_ROOTS = {Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes", Path("/sys/fs/cgroup"): "memory.max"}
# CHAOS_PRELOAD becomes LD_PRELOAD only here: a library that keeps files in /dev/shm must not see that of the machine.
ENTER = (
    'echo $$ > "$0/cgroup.procs" && mount -t tmpfs -o size={shm}m tmpfs /dev/shm'
    ' && exec env ${{CHAOS_PRELOAD:+LD_PRELOAD="$CHAOS_PRELOAD"}} "$@"'
)


def can_isolate() -> bool:
    """True if this process may create namespaces, mounts and cgroups."""
    return os.geteuid() == 0 and shutil.which("ip") is not None and _cgroup_root() is not None


def _cgroup_root() -> Path | None:
    return next((root for root in CGROUP_ROOTS if (root / "cgroup.procs").exists()), None)


class Sandbox:
    """A folder on a small disk of its own, a private /dev/shm and a memory cgroup; all plain without root."""

    def __init__(self, namespace: Namespace | None = None):
        self.namespace = namespace
        self.folder = Path(tempfile.mkdtemp(prefix="rtp-chaos-"))
        self.is_isolated = can_isolate()
        self.cgroup: Path | None = None
        self._shm: int | None = None
        if self.is_isolated:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(self.folder)], check=True)
            root = _cgroup_root()
            assert root
            self.cgroup = root / f"rtp-chaos-{secrets.token_hex(4)}"
            self.cgroup.mkdir()

    @property
    def network(self) -> Namespace | nullcontext[None]:
        return self.namespace or nullcontext()

    @property
    def prefix(self) -> list[str]:
        """Returns the command prefix that runs a program inside."""
        network = list(self.namespace.prefix) if self.namespace else []
        if not self.cgroup:
            return network
        return ["unshare", "--mount", "sh", "-c", ENTER.format(shm=SHM_MIB), str(self.cgroup), *network]

    def attach(self, pid: int) -> None:
        """Opens the private /dev/shm of a process inside: it can then be read after the process has ended."""
        if self.is_isolated and self._shm is None:
            self._shm = os.open(f"/proc/{pid}/root/dev/shm", os.O_RDONLY | os.O_DIRECTORY)

    def shm_files(self) -> list[str]:
        """Returns the files in the private /dev/shm; none without root, where it is everybody's."""
        names = os.listdir(self._shm) if self._shm is not None else []
        return sorted(name for name in names if "faketime" not in name)  # the clock's, see faults/machine.py

    def fill_shm(self) -> None:
        _fill(os.open("fill", os.O_CREAT | os.O_WRONLY, dir_fd=self._shm))

    def empty_shm(self) -> None:
        os.unlink("fill", dir_fd=self._shm)

    def fill_disk(self) -> None:
        _fill(os.open(self.folder / "fill", os.O_CREAT | os.O_WRONLY))

    def empty_disk(self) -> None:
        (self.folder / "fill").unlink()

    def limit_memory(self, limit: int) -> None:
        """`limit`: bytes; -1 for none."""
        assert self.cgroup
        name = CGROUP_ROOTS[self.cgroup.parent]
        (self.cgroup / name).write_text("max" if limit < 0 and name == "memory.max" else str(limit))

    def used_memory(self) -> int:
        """Returns the bytes that the part uses without the page cache, as the limit counts them."""
        assert self.cgroup
        statistics = dict(line.split() for line in (self.cgroup / "memory.stat").read_text().splitlines())
        names = ("anon", "shmem") if "anon" in statistics else ("total_rss", "total_shmem")
        return sum(int(statistics.get(name, 0)) for name in names)

    def close(self) -> None:
        """Removes everything. No process may run inside any longer."""
        if self._shm is not None:
            os.close(self._shm)
        if self.cgroup:
            _remove(self.cgroup)
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _remove(cgroup: Path) -> None:
    """Removes a cgroup once the kernel has ended the killed processes in it. Raises OSError after REMOVE_SECONDS."""
    deadline = time.monotonic() + REMOVE_SECONDS
    while True:
        try:
            cgroup.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _fill(fd: int) -> None:
    """Writes until the disk is full."""
    try:
        while os.write(fd, b"\1" * 65536):
            pass
    except OSError:
        pass
    finally:
        os.close(fd)
