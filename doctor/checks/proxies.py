"""HTTP proxies between the parts."""

from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from doctor.check import CheckResult, Status, check, ok, warn
from doctor.context import CheckContext
from doctor.host import is_ip_address

CATEGORY = "network"


@check("N-11", CATEGORY, "no proxy stands between the parts", severity=Status.WARN)
def proxies(ctx: CheckContext) -> CheckResult:
    """With http_proxy set, clients and probes on this machine send requests for the parts to the proxy, unless no_proxy
    names them."""
    environ = {name.lower(): value for name, value in ctx.host.environ.items()}
    if not environ.get("http_proxy") and not environ.get("all_proxy"):
        return ok("no proxy is set")
    spared = {entry.strip() for entry in environ.get("no_proxy", "").split(",")}
    wanted = ["localhost", *(m.ip for m in (ctx.plan.members if ctx.plan and ctx.plan.is_multi_part else ()))]
    missing = [name for name in wanted if name not in spared and "*" not in spared and not _within(name, spared)]
    if missing:
        return warn(
            f"no_proxy lacks {', '.join(missing)}",
            "every part",
            f"no_proxy={','.join([*sorted(spared - {''}), *missing])}",
        )
    return ok("no_proxy names every part")


def _within(name: str, spared: set[str]) -> bool:
    """Whether a suffix (".internal"), a network ("10.0.0.0/8") or the loopback address covers a name."""
    if name == "localhost" and "127.0.0.1" in spared:
        return True
    if is_ip_address(name):
        return any(ip_address(name) in network for network in map(_network, spared) if network)
    return any(entry.startswith(".") and name.endswith(entry) for entry in spared)


def _network(text: str) -> IPv4Network | IPv6Network | None:
    try:
        return ip_network(text, strict=False)
    except ValueError:
        return None
