"""The machine as the checks see it. Everything is read below `root`, or by a method that a test can replace.

Needs no `ip`, `ss` or `nvidia-smi`, no root, and writes nothing.
"""

import os
import platform
import re
import resource
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path

import psutil

from doctor.mounts import Mount, mount_of, parse_mountinfo
from doctor.runtime import Runtime
from rtp_llm.machine.cgroup import Cgroup

RLIMITS = {
    "Max locked memory": "memlock",
    "Max open files": "nofile",
    "Max processes": "nproc",
    "Max stack size": "stack",
}
CAPABILITIES = {"IPC_LOCK": 14, "SYS_PTRACE": 19, "SYS_ADMIN": 21, "SYS_NICE": 23}  # capability.h
SECRET_WORDS = (
    "secret",
    "token",
    "password",
    "passwd",
    "passphrase",
    "passcode",
    "api_key",
    "apikey",
    "credential",
    "access_key",
    "private",
)
# Without this server's own settings that merely sound like it: TOKENIZER_PATH, MAX_BATCH_TOKENS_SIZE,
# DEFAULT_CHAT_TEMPLATE_KEY. The short words end a name that has more before them: MYKEY, DB_PASS; not KEYBOARD.
SHORT_WORDS = r"(?<=[\w-])(?<!by)(?<!template[_-])(?:pass|keys?|creds?)(?![a-z])"
SECRET = "|".join([*SECRET_WORDS, "api-key", SHORT_WORDS]).replace("token", "token(?!iz|s)")


KERNEL_RECORDS = 50_000  # more than its buffer holds


@dataclass(frozen=True)
class DiskSpace:
    """Of a file system, in bytes; `inodes` free ones, -1 where it does not count them."""

    size: int
    free: int
    inodes: int


@dataclass(frozen=True)
class Interface:
    """A network interface. `speed` in Mbit/s, 0 where the kernel does not know; `up`: it has a carrier."""

    name: str
    addresses: tuple[str, ...]
    mtu: int
    speed: int
    up: bool = True


class Host:
    """`root` is where /proc, /sys, /etc and /dev are looked for; `environ` is the environment of the server to be."""

    def __init__(self, root: Path = Path("/"), environ: Mapping[str, str] | None = None):
        self.root = root
        self.environ: Mapping[str, str] = os.environ if environ is None else environ

    # Files

    def path(self, name: str) -> Path:
        return self.root / name.lstrip("/")

    def read(self, name: str) -> str | None:
        """The text of a file; None where there is none, or it may not be read."""
        try:
            return self.path(name).read_text(errors="replace")
        except OSError:
            return None

    @cached_property
    def kernel_log(self) -> str | None:
        """What the kernel has logged since the machine started; None where that may not be read. /dev/kmsg gives a
        record a read, and would wait for the next one for ever."""
        try:
            fd = os.open(self.path("/dev/kmsg"), os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return None
        records: list[bytes] = []
        try:
            while len(records) < KERNEL_RECORDS and (record := os.read(fd, 8192)):
                records.append(record)
        except BlockingIOError:
            pass  # the last one was read
        except OSError:  # EPIPE: overwritten while it was read; EPERM where only opening is allowed
            return None if not records else b"".join(records).decode(errors="replace")
        finally:
            os.close(fd)
        return b"".join(records).decode(errors="replace") or None  # empty: /dev/null was mounted over it

    def read_int(self, name: str) -> int | None:
        text = (self.read(name) or "").strip()
        return int(text) if text.isascii() and text.removeprefix("-").isdigit() else None

    def list_dir(self, folder: str) -> list[str]:
        """Names in a folder, sorted; none where it cannot be listed."""
        try:
            return sorted(os.listdir(self.path(folder)))
        except OSError:
            return []

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    # What kind of machine

    @cached_property
    def runtime(self) -> Runtime:
        """RTP_RUNTIME where it is set (compose leaves no trace of its own), else by what each runtime leaves."""
        asked = self.environ.get("RTP_RUNTIME", "")
        if asked in list(Runtime):
            return Runtime(asked)
        if "KUBERNETES_SERVICE_HOST" in self.environ or self.exists("/var/run/secrets/kubernetes.io/serviceaccount"):
            return Runtime.KUBERNETES
        if self.exists("/.dockerenv") or self.exists("/run/.containerenv"):
            return Runtime.DOCKER
        return Runtime.HOST

    @cached_property
    def status(self) -> dict[str, str]:
        """/proc/self/status by name."""
        lines = (line.partition(":") for line in (self.read("/proc/self/status") or "").splitlines())
        return {name: value.strip() for name, _, value in lines}

    def has_capability(self, capability: str) -> bool:
        return bool(int(self.status.get("CapEff", "0"), 16) >> CAPABILITIES[capability] & 1)

    @cached_property
    def rlimits(self) -> dict[str, tuple[int, int]]:
        """(soft, hard) by short name; RLIM_INFINITY for "unlimited"."""
        found = {}
        for line in (self.read("/proc/self/limits") or "").splitlines():
            name = next((n for n in RLIMITS if line.startswith(n)), None)
            if name:
                soft, hard = line[len(name) :].split()[:2]
                found[RLIMITS[name]] = (_limit(soft), _limit(hard))
        return found

    @cached_property
    def mounts(self) -> list[Mount]:
        return parse_mountinfo(self.read("/proc/self/mountinfo") or "")

    def mount(self, path: str) -> Mount | None:
        """The mount that a path lies on."""
        return mount_of(self.mounts, path)

    @cached_property
    def cgroup(self) -> Cgroup:
        return Cgroup.read(self.read)

    def space(self, path: str) -> DiskSpace:
        """Raises OSError."""
        seen = os.statvfs(self.path(path))
        return DiskSpace(
            seen.f_blocks * seen.f_frsize, seen.f_bavail * seen.f_frsize, seen.f_favail if seen.f_files else -1
        )

    @property
    def uid(self) -> int:
        return os.getuid()

    @property
    def cores(self) -> int:
        return len(os.sched_getaffinity(0))

    @property
    def machine(self) -> str:
        return platform.machine()

    def memory_available(self) -> int:
        """Bytes: what the kernel says is to be had, and what the cgroup leaves of it."""
        return min(psutil.virtual_memory().available, self.cgroup.available_memory)

    # Network

    @cached_property
    def interfaces(self) -> list[Interface]:
        """Those that have an IPv4 address, in the kernel's order."""
        states = psutil.net_if_stats()
        found = []
        for name, entries in psutil.net_if_addrs().items():
            addresses = tuple(e.address for e in entries if e.family == socket.AF_INET)
            state = states.get(name)
            if addresses and state:
                found.append(Interface(name, addresses, state.mtu, state.speed, state.isup))
        return found

    @property
    def hostname(self) -> str:
        return socket.gethostname()

    def resolve(self, name: str) -> list[str]:
        """IPv4 addresses of a name. Raises OSError (gaierror) with the resolver's words."""
        return sorted(
            {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)}
        )

    def source_address(self, ip: str) -> str:
        """The address this machine would send from towards `ip`. Raises OSError where there is no route."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((ip, 9))  # sends nothing
            return str(probe.getsockname()[0])

    def interface_of(self, address: str) -> Interface | None:
        return next((i for i in self.interfaces if address in i.addresses), None)

    @property
    def addresses(self) -> set[str]:
        return {address for interface in self.interfaces for address in interface.addresses}


def _limit(text: str) -> int:
    return resource.RLIM_INFINITY if text == "unlimited" else int(text)


def is_ip_address(text: str) -> bool:
    """Returns whether `text` is an IPv4 or IPv6 address, and not a host name."""
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def is_secret(name: str) -> bool:
    """Whether a variable's value must never be shown."""
    return bool(re.search(SECRET, name, re.IGNORECASE))


def public_environ(environ: Mapping[str, str], prefixes: Sequence[str]) -> dict[str, str]:
    """The variables that begin with one of `prefixes`, secrets left out."""
    return {n: v for n, v in sorted(environ.items()) if n.startswith(tuple(prefixes)) and not is_secret(n)}


def format_bytes(count: float) -> str:
    """Bytes for people: "64.0 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB" if count < 1024 else f"{count / 1024:.1f} TiB"
