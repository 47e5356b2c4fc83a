"""The machine as the checks see it: files, limits, mounts and network interfaces.

All files are read below `Host.root`, which tests set to a folder with made-up files; all other values come from methods
that tests can replace. Needs neither root privileges nor the tools `ip`, `ss` and `nvidia-smi`, and writes nothing.
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
    *("secret", "token", "password", "passwd", "passphrase", "passcode", "private", "credential"),
    *("access_key", "api_key", "api-key", "apikey"),
)
# Excludes settings of this server that only look like secrets: TOKENIZER_PATH, MAX_BATCH_TOKENS_SIZE,
# DEFAULT_CHAT_TEMPLATE_KEY. Short words count only at the end of a longer name: MYKEY and DB_PASS, but not KEYBOARD.
SHORT_WORDS = r"(?<=[\w-])(?<!by)(?<!template[_-])(?:pass|keys?|creds?)(?![a-z])"
SECRET = "|".join([*SECRET_WORDS, SHORT_WORDS]).replace("token", "token(?!iz|s)")
MAX_KERNEL_RECORDS = 50_000  # more than the kernel's buffer holds


@dataclass(frozen=True)
class DiskSpace:
    """Size and free space of a file system, in bytes. `inodes`: number of free inodes, -1 if the file system does not
    limit them."""

    size: int
    free: int
    inodes: int


@dataclass(frozen=True)
class Interface:
    """A network interface. `addresses`: its IPv4 addresses. `speed`: Mbit/s, 0 if unknown. `up`: it is enabled and has
    a carrier.
    """

    name: str
    addresses: tuple[str, ...]
    mtu: int
    speed: int
    up: bool = True


class Host:
    """The machine that the checks inspect. `root`: folder that contains proc, sys, etc and dev; another one than / only
    in tests. `environ`: the server's environment variables; None takes those of this process.
    """

    def __init__(self, root: Path = Path("/"), environ: Mapping[str, str] | None = None):
        self.root = root
        self.environ: Mapping[str, str] = os.environ if environ is None else environ

    # Files

    def path(self, name: str) -> Path:
        return self.root / name.lstrip("/")

    def read(self, name: str) -> str | None:
        """Returns the text of a file, with invalid UTF-8 replaced; None if it cannot be read."""
        try:
            return self.path(name).read_text(errors="replace")
        except OSError:
            return None

    @cached_property
    def kernel_log(self) -> str | None:
        """Returns the kernel log since boot; None if it cannot be read.

        Opens /dev/kmsg non-blocking: each read returns one record, and after the last one a blocking read would wait.
        """
        try:
            fd = os.open(self.path("/dev/kmsg"), os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return None
        records: list[bytes] = []
        try:
            while len(records) < MAX_KERNEL_RECORDS and (record := os.read(fd, 8192)):
                records.append(record)
        except BlockingIOError:
            pass  # no more records
        except OSError:  # EPIPE: the record was overwritten; EPERM: this process may open the log, but not read it
            return None if not records else b"".join(records).decode(errors="replace")
        finally:
            os.close(fd)
        return b"".join(records).decode(errors="replace") or None  # empty if /dev/null is mounted over /dev/kmsg

    def read_int(self, name: str) -> int | None:
        text = (self.read(name) or "").strip()
        return int(text) if text.isascii() and text.removeprefix("-").isdigit() else None

    def list_dir(self, folder: str) -> list[str]:
        """Returns the sorted names of the entries of a folder; empty if the folder cannot be listed."""
        try:
            return sorted(os.listdir(self.path(folder)))
        except OSError:
            return []

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    # Runtime and limits

    @cached_property
    def runtime(self) -> Runtime:
        """Returns the container runtime in which this process runs: the value of RTP_RUNTIME if it is valid. Otherwise
        detects kubernetes or docker by their files and variables, else returns host. Compose looks like docker.
        """
        name = self.environ.get("RTP_RUNTIME", "")
        if name in list(Runtime):
            return Runtime(name)
        if "KUBERNETES_SERVICE_HOST" in self.environ or self.exists("/var/run/secrets/kubernetes.io/serviceaccount"):
            return Runtime.KUBERNETES
        if self.exists("/.dockerenv") or self.exists("/run/.containerenv"):
            return Runtime.DOCKER
        return Runtime.HOST

    @cached_property
    def status(self) -> dict[str, str]:
        """Returns the fields of /proc/self/status by name."""
        lines = (line.partition(":") for line in (self.read("/proc/self/status") or "").splitlines())
        return {name: value.strip() for name, _, value in lines}

    def has_capability(self, capability: str) -> bool:
        return bool(int(self.status.get("CapEff", "0"), 16) >> CAPABILITIES[capability] & 1)

    @cached_property
    def rlimits(self) -> dict[str, tuple[int, int]]:
        """Returns (soft limit, hard limit) of this process for memlock, nofile, nproc and stack, by name.

        RLIM_INFINITY means unlimited. Empty if /proc/self/limits cannot be read.
        """
        limits = {}
        for line in (self.read("/proc/self/limits") or "").splitlines():
            name = next((n for n in RLIMITS if line.startswith(n)), None)
            if name:
                soft, hard = line[len(name) :].split()[:2]
                limits[RLIMITS[name]] = (_limit(soft), _limit(hard))
        return limits

    @cached_property
    def mounts(self) -> list[Mount]:
        return parse_mountinfo(self.read("/proc/self/mountinfo") or "")

    def mount(self, path: str) -> Mount | None:
        """Returns the mount of the file system that contains the absolute path `path`; None if there is none."""
        return mount_of(self.mounts, path)

    @cached_property
    def cgroup(self) -> Cgroup:
        return Cgroup.read(self.read)

    def space(self, path: str) -> DiskSpace:
        """Returns size and free space of the file system that contains `path`. Raises OSError if `path` does not exist
        or its file system cannot be queried.
        """
        stat = os.statvfs(self.path(path))
        inodes = stat.f_favail if stat.f_files else -1
        return DiskSpace(stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize, inodes)

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
        """Returns the available memory in bytes: the machine's, or the cgroup's if that is less."""
        return min(psutil.virtual_memory().available, self.cgroup.available_memory)

    # Network

    @cached_property
    def interfaces(self) -> list[Interface]:
        """Returns the network interfaces that have an IPv4 address, in the order in which the kernel lists them."""
        states = psutil.net_if_stats()
        interfaces = []
        for name, entries in psutil.net_if_addrs().items():
            addresses = tuple(e.address for e in entries if e.family == socket.AF_INET)
            state = states.get(name)
            if addresses and state:
                interfaces.append(Interface(name, addresses, state.mtu, state.speed, state.isup))
        return interfaces

    @property
    def hostname(self) -> str:
        return socket.gethostname()

    def resolve(self, name: str) -> list[str]:
        """Returns the sorted IPv4 addresses of a host name. Raises OSError (gaierror) if it does not resolve."""
        return sorted(
            {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)}
        )

    def source_address(self, ip: str) -> str:
        """Returns the local address from which packets to `ip` are sent. Raises OSError if there is no route."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((ip, 9))  # on a UDP socket this only selects the route
            return str(probe.getsockname()[0])

    def interface_of(self, address: str) -> Interface | None:
        return next((i for i in self.interfaces if address in i.addresses), None)

    @property
    def addresses(self) -> set[str]:
        return {address for interface in self.interfaces for address in interface.addresses}


def _limit(text: str) -> int:
    return resource.RLIM_INFINITY if text == "unlimited" else int(text)


def parse_number_ranges(text: str) -> set[int]:
    """Parses a list of CPU cores or ports as in /proc and /sys: "0-3,8" gives {0, 1, 2, 3, 8}. Ignores malformed
    entries.
    """
    numbers: set[int] = set()
    for entry in filter(None, text.strip().split(",")):
        first, _, last = entry.partition("-")
        if entry.isascii() and first.isdigit() and (last or first).isdigit():
            numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def is_ip_address(text: str) -> bool:
    """Returns whether `text` is an IPv4 or IPv6 address; a host name is not."""
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def is_secret(name: str) -> bool:
    """Returns whether an environment variable or setting with this name, such as HF_TOKEN, holds a secret, which must
    not appear in reports.
    """
    return bool(re.search(SECRET, name, re.IGNORECASE))


def public_environ(environ: Mapping[str, str], prefixes: Sequence[str]) -> dict[str, str]:
    """Returns the environment variables whose name begins with one of `prefixes`, without those that hold secrets."""
    return {n: v for n, v in sorted(environ.items()) if n.startswith(tuple(prefixes)) and not is_secret(n)}


def format_bytes(count: float) -> str:
    """Returns a size as text, such as "64.0 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB" if count < 1024 else f"{count / 1024:.1f} TiB"
