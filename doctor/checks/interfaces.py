"""Checks of the network interface that NCCL and gloo use."""

from doctor import fixes
from doctor.check import CheckResult, Status, error, ok, skip, symptoms, unknown, warn
from doctor.checks.categories import network_check
from doctor.checks.preconditions import MULTI_PART
from doctor.context import CheckContext
from doctor.host import Interface, is_ip_address
from doctor.nccl import choose_interfaces


def _interface_to(ctx: CheckContext, ip: str) -> Interface | None:
    """Returns the interface that routes to an address or host name; None if it is not known. Raises OSError if there is
    no route."""
    address = ip if is_ip_address(ip) else ctx.host.resolve(ip)[0]
    return ctx.host.interface_of(ctx.host.source_address(address))


@network_check("N-06", "NCCL_SOCKET_IFNAME matches an interface")
@symptoms("Bootstrap : no socket interface found", "NET/Socket : No usable listening interface found")
def nccl_ifname_matches(ctx: CheckContext) -> CheckResult:
    """NCCL_SOCKET_IFNAME takes prefixes (eth), exact names (=eth0) and exclusions (^docker), and is set in the
    environment or in nccl.conf. If it matches no interface, NCCL does not start."""
    setting = ctx.nccl.settings.get("NCCL_SOCKET_IFNAME")
    if setting is None:
        return ok("NCCL_SOCKET_IFNAME is not set: the server chooses the interface that routes to part 0")
    if setting.source != "environment":
        chosen = "the server chooses the interface that routes to part 0 instead"
        return ok(f"{setting.source} sets NCCL_SOCKET_IFNAME={setting.value}; {chosen}")
    if not choose_interfaces(ctx.host.interfaces, setting.value):
        names = ", ".join(i.name for i in ctx.host.interfaces)
        actual = f"NCCL_SOCKET_IFNAME={setting.value} matches none of {names}"
        return error(actual, "a name of an interface that is up", "unset NCCL_SOCKET_IFNAME")
    return ok(f"NCCL_SOCKET_IFNAME={setting.value}")


@network_check("N-05", "GLOO_SOCKET_IFNAME names one interface")
@symptoms("ifa != nullptr. Unable to find address for: …")
def gloo_ifname_exists(ctx: CheckContext) -> CheckResult:
    """Gloo needs the exact name of one interface, unlike NCCL, which takes prefixes and exclusions."""
    value = ctx.host.environ.get("GLOO_SOCKET_IFNAME", "")
    names = [i.name for i in ctx.host.interfaces]
    if not value:
        return ok("GLOO_SOCKET_IFNAME is not set: the server chooses the interface that routes to part 0")
    if value in names:
        return ok(f"GLOO_SOCKET_IFNAME={value}")
    actual = f"GLOO_SOCKET_IFNAME={value} is not an interface that is up"
    return error(actual, f"one of {', '.join(names)}", "unset GLOO_SOCKET_IFNAME")


@network_check(
    "N-03",
    "NCCL and gloo use the interface that routes to the other parts",
    needs=("N-04", "N-05", "N-06", "N-07"),
    preconditions=(MULTI_PART,),
    timeout=12,
)
@symptoms("NCCL INFO Bootstrap : Using docker0:172.17.0.1<0>", "connect() to 172.17.0.1 failed")
def interface_routes_to_peers(ctx: CheckContext) -> CheckResult:
    """By default NCCL takes the first interface that is not docker*, lo or virbr*: a bridge named br-… or cni0 is not
    excluded. This server sets the interface that routes to part 0, unless NCCL_SOCKET_IFNAME is set already: then that
    interface must route to the other parts as well."""
    peers, interfaces = ctx.peers, ctx.host.interfaces
    if not peers:
        return skip("the addresses of the other parts are not configured")
    try:
        routes = [_interface_to(ctx, member.ip) for member in peers]
    except OSError as exception:
        ips = ", ".join(m.ip for m in peers)
        return error(f"no route to {ips}: {exception.strerror}", "a route", "correct the member list, or add a route")
    route = routes[0]
    if route is None:
        return unknown("the interface that routes to the other parts is not known")
    setting = ctx.nccl.settings.get("NCCL_SOCKET_IFNAME")
    gloo = ctx.host.environ.get("GLOO_SOCKET_IFNAME")
    required = f"the interface to {peers[0].name} is {route.name}"
    if setting and setting.source == "environment":
        chosen = choose_interfaces(interfaces, setting.value)[0]
        if chosen != route:
            fix = f"export NCCL_SOCKET_IFNAME=={route.name}   (on this part), or unset it"
            return error(f"NCCL would use {chosen.name} ({chosen.addresses[0]}), {required}", route.name, fix)
    if gloo and gloo != route.name:
        fix = f"export GLOO_SOCKET_IFNAME={route.name}, or unset it"
        return error(f"gloo would use {gloo}, {required}", route.name, fix)
    if len({r.name for r in routes if r}) > 1:
        fix = "write addresses of one network into the member list"
        return warn("the routes to the other parts use several interfaces", "one interface", fix)
    default = (choose_interfaces(interfaces, "") or [route])[0]
    by_default = f"; by default NCCL would choose {default.name} ({default.addresses[0]})" if default != route else ""
    return ok(f"the route to the other parts uses {route.name} ({route.addresses[0]}){by_default}")


@network_check(
    "N-14",
    "this part's address in the member list is an address of this machine",
    severity=Status.WARN,
    needs=("C-01", "N-07"),
    preconditions=(MULTI_PART,),
)
def address_is_local(ctx: CheckContext) -> CheckResult:
    """In a bridged container network the address that other parts use is the host's, and only published ports are
    forwarded. NCCL and gloo listen on ephemeral ports, which are not published."""
    if ctx.plan_result.nat:
        return warn(ctx.plan_result.nat, "an address of this machine", fixes.LOCAL_ADDRESS)
    return ok("this part's address in the member list is an address of this machine")
