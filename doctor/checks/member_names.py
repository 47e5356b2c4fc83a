"""Host names in the member list, and what they resolve to."""

import time
from ipaddress import ip_address

from doctor.check import CheckResult, Fix, check, error, ok, skip, warn
from doctor.context import CheckContext
from doctor.host import is_ip_address

CATEGORY = "network"
ONE_PART = "a single part"
SLOW_NAME_SECONDS = 1.0


@check(
    "N-07",
    CATEGORY,
    "the members' names can be resolved",
    symptoms=(
        "The IPv6 network addresses of (…) cannot be retrieved (gai error: …)",
        "gai error: -2 - Name or service not known",
        "Temporary failure in name resolution",
    ),
    needs=("C-02",),
    timeout=12,
)
def names(ctx: CheckContext) -> CheckResult:
    """The `ip` of a member may be a name. It must resolve on every part, to an IPv4 address, and quickly."""
    if not ctx.plan or not ctx.plan.is_multi_part:
        return skip(ONE_PART)
    slow = []
    for member in ctx.plan.members:
        if is_ip_address(member.ip):
            continue
        started = time.monotonic()
        try:
            ctx.host.resolve(member.ip)
        except OSError as problem:
            fix = Fix(
                host=f"add {member.ip} to /etc/hosts, or write its address into the member list",
                docker=f"docker run --add-host {member.ip}:<address> …, or write the address into the member list",
                compose=f'extra_hosts: ["{member.ip}:<address>"]',
                kubernetes="a headless Service with publishNotReadyAddresses: true, or hostAliases",
            )
            text = f"{member.name}: {member.ip}: {problem.strerror}"
            if ctx.starting:  # machines, containers and pods come one after another
                return warn(text, "an IPv4 address before long: the roll call waits for it", fix, because="N-07")
            return error(text, "an IPv4 address", fix)
        if time.monotonic() - started > SLOW_NAME_SECONDS:
            slow.append(member.ip)
    if slow:
        return warn(f"{slow[0]} takes over a second to resolve", "an answer at once", "write addresses into the list")
    return ok(f"{len(ctx.plan.members)} members")


@check(
    "N-04",
    CATEGORY,
    "no other part's name leads to this machine's loopback",
    symptoms=(
        "Gloo connectFullMesh failed with … SO_ERROR: Connection refused, remote=[127.0.0.1]:…",
        "timed out connecting: … remote=[127.0.1.1]:…",
    ),
    needs=("N-07",),
    timeout=12,
)
def loopback(ctx: CheckContext) -> CheckResult:
    """Debian writes `127.0.1.1 <host name>` into /etc/hosts. Whoever looks up such a name talks to itself. This server
    never takes its own address from the host name, but a member that is listed by name must lead to that machine."""
    if not ctx.plan or not ctx.plan.is_multi_part:
        return skip(ONE_PART)
    for member in ctx.peers:
        found = [member.ip] if is_ip_address(member.ip) else ctx.host.resolve(member.ip)
        same_machine = any(m.ip == member.ip for m in ctx.plan.members if m.index == ctx.plan.part)
        if not is_ip_address(member.ip) and all(ip_address(a).is_loopback for a in found) and not same_machine:
            fix = Fix(
                host=f"correct the line of {member.ip} in /etc/hosts",
                docker=f"docker run --add-host {member.ip}:<its address> …",
                compose=f'extra_hosts: ["{member.ip}:<its address>"]',
                kubernetes=f"hostAliases: [{{ip: <its address>, hostnames: [{member.ip}]}}]",
            )
            return error(
                f"{member.name} is listed as {member.ip}, which is {found[0]} here", "its machine's address", fix
            )
    return ok("the members' addresses lead to their machines")
