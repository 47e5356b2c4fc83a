"""The addresses of this machine on which the HTTP server listens."""

import socket
from ipaddress import ip_address

from rtp_llm.errors import ConfigError


def listen_addresses(host: str) -> list[str]:
    """Returns the addresses to listen on if the setting HOST has the value `host`.

    They are `0.0.0.0` and `::` if it is empty, "::" or `is_machine_name`, the two loopback addresses if it is
    "localhost", and otherwise `host` itself. A family (IPv4, IPv6) that the machine does not have is left out. Each
    family gets its own socket, so that the log shows IPv4 clients as `10.0.0.2` instead of `::ffff:10.0.0.2`.

    Raises ConfigError if `host` is not an address of this machine.
    """
    if host in ("", "::") or is_machine_name(host):
        return _usable(["0.0.0.0", "::"])
    if host == "localhost":
        return _usable(["127.0.0.1", "::1"])
    try:
        ip_address(host)
    except ValueError:
        allowed = "an IP address of this machine, localhost, or unset for all addresses"
        raise ConfigError(f"HOST={host!r}: not valid; allowed: {allowed}", check="M-14", names=("HOST",)) from None
    if not _usable([host]):
        message = f"HOST={host!r}: not an address of this machine; allowed: one of its IP addresses"
        raise ConfigError(message, check="M-14", names=("HOST",))
    return [host]


def is_machine_name(host: str) -> bool:
    """Returns whether `host` is a host name that csh or conda, not an operator, has put into the variable HOST."""
    return host in (socket.gethostname(), socket.getfqdn()) or "-conda" in host


def listen_on(address: str, port: int, backlog: int = 1) -> socket.socket:
    """Returns a socket that listens on one address, of its family (IPv4 or IPv6) only. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=backlog)


def _usable(addresses: list[str]) -> list[str]:
    usable = []
    for address in addresses:
        try:
            listen_on(address, 0).close()
        except OSError:
            continue
        usable.append(address)
    return usable
