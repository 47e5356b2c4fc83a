"""The network interface that NCCL and gloo use."""

from doctor.check import CheckResult, Fix, Status, check, error, ok, skip, unknown, warn
from doctor.context import CheckContext
from doctor.host import Interface, is_ip_address
from doctor.nccl import choose_interfaces

CATEGORY = "network"
ONE_PART = "a single part"


def _route(ctx: CheckContext, ip: str) -> Interface | None:
    """The interface over which this machine reaches a peer. Raises OSError where there is no route."""
    address = ip if is_ip_address(ip) else ctx.host.resolve(ip)[0]
    return ctx.host.interface_of(ctx.host.source_address(address))


@check(
    "N-06",
    CATEGORY,
    "NCCL_SOCKET_IFNAME matches an interface",
    symptoms=("Bootstrap : no socket interface found", "NET/Socket : No usable listening interface found"),
)
def nccl_name(ctx: CheckContext) -> CheckResult:
    """NCCL_SOCKET_IFNAME takes prefixes (eth), exact names (=eth0) and exclusions (^docker), and stands in the
    environment or in nccl.conf. Where it matches nothing, NCCL does not start."""
    setting = ctx.nccl.settings.get("NCCL_SOCKET_IFNAME")
    names = ", ".join(i.name for i in ctx.host.interfaces)
    if setting is None:
        return ok("not set: the server chooses the interface that leads to part 0")
    if setting.source != "environment":
        return ok(f"{setting.source} says {setting.value}; the server's own choice comes before it")
    if not choose_interfaces(ctx.host.interfaces, setting.value):
        return error(
            f"NCCL_SOCKET_IFNAME={setting.value} matches none of {names}",
            "an interface that is up",
            "unset NCCL_SOCKET_IFNAME",
        )
    return ok(f"NCCL_SOCKET_IFNAME={setting.value}")


@check(
    "N-05",
    CATEGORY,
    "GLOO_SOCKET_IFNAME is one interface",
    symptoms=("ifa != nullptr. Unable to find address for: …",),
)
def gloo_name(ctx: CheckContext) -> CheckResult:
    """Gloo wants the exact name of one interface, where NCCL takes prefixes and exclusions."""
    value = ctx.host.environ.get("GLOO_SOCKET_IFNAME", "")
    if not value:
        return ok("not set: the server chooses")
    if value in {i.name for i in ctx.host.interfaces}:
        return ok(f"GLOO_SOCKET_IFNAME={value}")
    names = ", ".join(i.name for i in ctx.host.interfaces)
    return error(
        f"GLOO_SOCKET_IFNAME={value} is no interface that is up", f"one of {names}", "unset GLOO_SOCKET_IFNAME"
    )


@check(
    "N-03",
    CATEGORY,
    "the interface of the collectives leads to the peers",
    symptoms=("NCCL INFO Bootstrap : Using docker0:172.17.0.1<0>", "connect() to 172.17.0.1 failed"),
    needs=("N-04", "N-05", "N-06", "N-07"),
    timeout=12,
)
def interface(ctx: CheckContext) -> CheckResult:
    """Left to itself NCCL takes the first interface that is not docker*, lo or virbr*: a bridge called br-… or cni0 is
    not excluded. This server names the interface that leads to part 0, unless NCCL_SOCKET_IFNAME is set already: then
    that must lead there as well."""
    if not ctx.plan or not ctx.plan.is_multi_part or not ctx.peers:
        return skip(ONE_PART)
    peers = ctx.peers
    try:
        routes = {member.name: _route(ctx, member.ip) for member in peers}
    except OSError as problem:
        listed = ", ".join(m.ip for m in peers)
        return error(f"no route to {listed}: {problem.strerror}", "a route", "correct the member list, or add a route")
    towards = next(iter(routes.values()))
    if towards is None:
        return unknown("the interface towards the peers cannot be told")
    left_alone = choose_interfaces(ctx.host.interfaces, "")
    first = left_alone[0] if left_alone else towards
    alone = "" if first == towards else f"; left alone NCCL would choose {first.name} ({first.addresses[0]})"
    setting = ctx.nccl.settings.get("NCCL_SOCKET_IFNAME")
    fix = Fix(f"export NCCL_SOCKET_IFNAME=={towards.name}   (on this part), or unset it")
    if setting and setting.source == "environment":
        chosen = choose_interfaces(ctx.host.interfaces, setting.value)[0]
        if chosen != towards:
            where = f"NCCL would use {chosen.name} ({chosen.addresses[0]})"
            return error(f"{where}, the way to {peers[0].name} is {towards.name}", f"{towards.name}", fix)
    gloo = ctx.host.environ.get("GLOO_SOCKET_IFNAME")
    if gloo and gloo != towards.name:
        return error(f"gloo would use {gloo}, the way to {peers[0].name} is {towards.name}", towards.name,
                     f"export GLOO_SOCKET_IFNAME={towards.name}, or unset it")  # fmt: skip
    if len({route.name for route in routes.values() if route}) > 1:
        return warn(
            "the peers are reached over different interfaces",
            "one network",
            "give the members addresses of one network",
        )
    return ok(f"{towards.name} ({towards.addresses[0]}){alone}")


@check("N-14", CATEGORY, "this part's address is one of its own", severity=Status.WARN, needs=("C-01", "N-07"))
def address_is_local(ctx: CheckContext) -> CheckResult:
    """In a bridged container network the address that others use is the host's, and only published ports are passed
    on; NCCL and gloo listen on ports that the kernel chooses, which nobody publishes."""
    if not ctx.plan or not ctx.plan.is_multi_part:
        return skip(ONE_PART)
    if not ctx.plan_result.nat:
        return ok("the member list's address is an interface's")
    fix = Fix(
        host="write an address of this machine into the member list",
        docker="docker run --network host …",
        compose="network_mode: host, or one compose network for all parts and their service names in the list",
        kubernetes="the pod's own address in the list (a headless Service), or hostNetwork: true",
    )
    return warn(ctx.plan_result.nat, "an address of this machine", fix)
