"""Check that the parts of a gang (its containers) reach each other without an HTTP proxy."""

from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from doctor.check import CheckResult, Status, ok, warn
from doctor.checks.categories import network_check
from doctor.context import CheckContext
from doctor.host import is_ip_address


@network_check("N-11", "no HTTP proxy is used between the parts", severity=Status.WARN)
def no_proxy_between_parts(ctx: CheckContext) -> CheckResult:
    """If http_proxy is set, clients and probes on this machine send their requests to the parts through the proxy,
    unless no_proxy lists the parts."""
    environ = {name.lower(): value for name, value in ctx.host.environ.items()}
    if not any(environ.get(name) for name in ("http_proxy", "https_proxy", "all_proxy")):
        return ok("no proxy is set")
    entries = {entry.strip() for entry in environ.get("no_proxy", "").split(",")}
    names = dict.fromkeys(["localhost", "127.0.0.1", *(m.ip for m in (ctx.members if ctx.is_multi_part else ()))])
    missing = [name for name in names if not _is_covered(name, entries)]
    if missing:
        fix = f"no_proxy={','.join([*sorted(entries - {''}), *missing])}"
        return warn(f"no_proxy lacks {', '.join(missing)}", "every part in no_proxy", fix)
    return ok("no_proxy lists every part")


def _is_covered(name: str, entries: set[str]) -> bool:
    """Returns whether an entry of no_proxy covers a name: the name itself, "*", ".internal" for subdomains,
    "10.0.0.0/8" for addresses."""
    if name in entries or "*" in entries:
        return True
    if is_ip_address(name):
        return any(ip_address(name) in network for network in map(_network, entries) if network)
    return any(entry.startswith(".") and name.endswith(entry) for entry in entries)


def _network(text: str) -> IPv4Network | IPv6Network | None:
    try:
        return ip_network(text, strict=False)
    except ValueError:
        return None
