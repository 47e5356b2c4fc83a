"""NCCL on this machine: its effective settings, its version and the network interface that it would choose.

Follows NCCL's documentation (environment variables), src/misc/socket.cc and src/misc/param.cc.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from doctor.host import Host, Interface

PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")


@dataclass(frozen=True)
class Setting:
    """The value of an NCCL_* setting. `source`: "environment", or the path of a configuration file."""

    value: str
    source: str


@dataclass(frozen=True)
class Nccl:
    """Settings and version of NCCL. `version`: such as (2, 27, 3), or () if no NCCL package is installed."""

    settings: Mapping[str, Setting]
    version: tuple[int, ...]

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))

    def value(self, name: str) -> str:
        return self.settings[name].value if name in self.settings else ""

    @classmethod
    def read(cls, host: Host) -> "Nccl":
        return cls(effective_settings(host), installed_version())


def effective_settings(host: Host) -> dict[str, Setting]:
    """Returns the NCCL_* settings by name.

    The environment takes precedence over $NCCL_CONF_FILE (or ~/.nccl.conf), and that over /etc/nccl.conf.
    """
    settings = {n: Setting(v, "environment") for n, v in sorted(host.environ.items()) if n.startswith("NCCL_")}
    user_file = host.environ.get("NCCL_CONF_FILE") or f"{host.environ.get('HOME', '/root')}/.nccl.conf"
    for path in (user_file, "/etc/nccl.conf"):
        for name, value in parse_conf(host.read(path) or "").items():
            settings.setdefault(name, Setting(value, path))
    return settings


def parse_conf(text: str) -> dict[str, str]:
    """Parses the text of an nccl.conf: lines NAME=value. Returns {name: value}; if a name occurs twice, its first
    value. Ignores lines that begin with #.
    """
    settings: dict[str, str] = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            settings.setdefault(name.strip(), value.strip())
    return settings


def installed_version() -> tuple[int, ...]:
    """Returns the version of the installed NCCL wheel (nvidia-nccl-cu12 or -cu13), such as (2, 27, 3), without loading
    the library; () if neither is installed.
    """
    for package in PACKAGES:
        try:
            return tuple(int(number) for number in version(package).split(".")[:3])
        except PackageNotFoundError:
            continue
    return ()


@dataclass(frozen=True)
class NameFilter:
    """A filter of interface names, as in NCCL_SOCKET_IFNAME: prefixes ("eth,ens"), exact names ("=eth0") or exclusions
    ("^docker", "^=lo")."""

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
        matches = any(name == n if self.exact else name.startswith(n) for n in self.names)
        return matches != self.exclude


def choose_interfaces(interfaces: Sequence[Interface], setting: str) -> list[Interface]:
    """Returns those of `interfaces` that NCCL would use. NCCL takes the first one for its bootstrap connections.

    `setting`: the value of NCCL_SOCKET_IFNAME. If it is empty, NCCL takes the first group that exists: ib*; all except
    docker*, lo and virbr*; docker*; lo; virbr*.
    """
    interfaces = [i for i in interfaces if i.up]
    if setting:
        return _matching(interfaces, setting)
    groups = (_matching(interfaces, names) for names in ("ib", "^docker,lo,virbr", "docker", "lo", "virbr"))
    return next(filter(None, groups), [])


def _matching(interfaces: Iterable[Interface], names: str) -> list[Interface]:
    name_filter = NameFilter.parse(names)
    return [i for i in interfaces if name_filter.takes(i.name)]
