"""Checks of the host names in the member list (addresses of all parts), and of the addresses to which they resolve."""

import time
from ipaddress import ip_address

from doctor import fixes
from doctor.check import CheckResult, error, ok, symptoms, warn
from doctor.checks.categories import network_check
from doctor.checks.preconditions import MULTI_PART
from doctor.context import CheckContext
from doctor.host import is_ip_address

MAX_RESOLVE_SECONDS = 1.0


@network_check("N-07", "the members' host names resolve", needs=("C-02",), preconditions=(MULTI_PART,), timeout=12)
@symptoms(
    "The IPv6 network addresses of (…) cannot be retrieved (gai error: …)",
    "gai error: -2 - Name or service not known",
    "Temporary failure in name resolution",
)
def member_names_resolve(ctx: CheckContext) -> CheckResult:
    """The `ip` of a member may be a host name. It must resolve on every part, to an IPv4 address, and quickly."""
    slow = []
    for member in ctx.members:
        if is_ip_address(member.ip):
            continue
        started = time.monotonic()
        try:
            ctx.host.resolve(member.ip)
        except OSError as exception:
            actual, fix = f"{member.name}: {member.ip}: {exception.strerror}", fixes.resolvable_name(member.ip)
            if ctx.starting:  # the other machines, containers or pods may start later
                expected = "an IPv4 address when the other parts have started, for which the rendezvous waits"
                # "because" skips the checks that need N-07, although this is only a warning.
                return warn(actual, expected, fix, because="N-07")
            return error(actual, "an IPv4 address", fix)
        if time.monotonic() - started > MAX_RESOLVE_SECONDS:
            slow.append(member.ip)
    if slow:
        actual = f"{slow[0]} takes over a second to resolve"
        return warn(actual, "resolution within a second", "write IP addresses into the member list")
    return ok(f"the addresses of all {len(ctx.members)} parts are known")


@network_check(
    "N-04", "no other part's host name resolves to loopback", needs=("N-07",), preconditions=(MULTI_PART,), timeout=12
)
@symptoms(
    "Gloo connectFullMesh failed with … SO_ERROR: Connection refused, remote=[127.0.0.1]:…",
    "timed out connecting: … remote=[127.0.1.1]:…",
)
def no_loopback_names(ctx: CheckContext) -> CheckResult:
    """Debian writes `127.0.1.1 <host name>` into /etc/hosts. A process that resolves this name connects to its own
    machine. This server never derives its own address from the host name, but a member that is listed by name must
    resolve to that member's machine."""
    local_ip = ctx.local_member.ip if ctx.local_member else ""
    for member in ctx.peers:
        if is_ip_address(member.ip) or member.ip == local_ip:
            continue
        addresses = ctx.host.resolve(member.ip)
        if all(ip_address(a).is_loopback for a in addresses):
            actual = f"{member.name} is listed as {member.ip}, which is {addresses[0]} here"
            return error(actual, "the address of that part's machine", fixes.name_without_loopback(member.ip))
    return ok("no other part's name resolves to loopback")
