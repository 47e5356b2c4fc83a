"""What NCCL would do here: its effective settings, its version, and the interface it would choose.

Rules from NCCL's documentation (environment variables) and its src/misc/socket.cc, src/misc/param.cc.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from doctor.host import Host, Interface

PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")


@dataclass(frozen=True)
class Setting:
    """`source` is "environment" or the file it stands in."""

    value: str
    source: str


@dataclass(frozen=True)
class Nccl:
    """`version` is () where no NCCL package is installed."""

    settings: Mapping[str, Setting]
    version: tuple[int, ...]

    def value(self, name: str) -> str:
        return self.settings[name].value if name in self.settings else ""

    @classmethod
    def read(cls, host: Host) -> "Nccl":
        return cls(effective_settings(host), installed_version())


def effective_settings(host: Host) -> dict[str, Setting]:
    """NCCL_* by name: the environment beats $NCCL_CONF_FILE (or ~/.nccl.conf), which beats /etc/nccl.conf."""
    found = {n: Setting(v, "environment") for n, v in sorted(host.environ.items()) if n.startswith("NCCL_")}
    own = host.environ.get("NCCL_CONF_FILE") or f"{host.environ.get('HOME', '/root')}/.nccl.conf"
    for file in (own, "/etc/nccl.conf"):
        for name, value in parse_conf(host.read(file) or "").items():
            found.setdefault(name, Setting(value, file))
    return found


def parse_conf(text: str) -> dict[str, str]:
    """NAME=value lines; # begins a comment line; the first of two wins, as setenv without overwriting does."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name.strip(), value.strip())
    return found


def installed_version() -> tuple[int, ...]:
    """Of the library that torch brought along, without loading it."""
    for package in PACKAGES:
        try:
            return tuple(int(piece) for piece in version(package).split(".")[:3])
        except PackageNotFoundError:
            continue
    return ()


@dataclass(frozen=True)
class NameFilter:
    """NCCL_SOCKET_IFNAME: "eth,ens" prefixes, "=eth0" whole names, "^docker" and "^=lo" all but these."""

    names: tuple[str, ...]
    exact: bool
    exclude: bool

    @classmethod
    def parse(cls, text: str) -> "NameFilter":
        exclude = text.startswith("^")
        text = text.removeprefix("^")
        exact = text.startswith("=")
        return cls(tuple(n for n in text.removeprefix("=").split(",") if n), exact, exclude)

    def takes(self, name: str) -> bool:
        hit = any(name == n if self.exact else name.startswith(n) for n in self.names)
        return hit != self.exclude


def choose_interfaces(interfaces: Sequence[Interface], setting: str) -> list[Interface]:
    """Those NCCL would use, the first for its bootstrap: by the setting, or InfiniBand's, any but docker's and
    loopback, docker's, loopback, virbr's: the first kind that exists."""
    interfaces = [i for i in interfaces if i.up]
    if setting:
        chosen = NameFilter.parse(setting)
        return [i for i in interfaces if chosen.takes(i.name)]
    for kind in ("ib", "^docker,lo,virbr", "docker", "lo", "virbr"):
        found = _matching(interfaces, NameFilter.parse(kind))
        if found:
            return found
    return []


def _matching(interfaces: Iterable[Interface], names: NameFilter) -> list[Interface]:
    return [i for i in interfaces if names.takes(i.name)]
