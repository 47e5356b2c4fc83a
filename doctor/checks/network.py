"""Addresses, names, interfaces and ports of this part, against what the plan and the libraries will ask of them."""

import ctypes.util
import re
import time
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from doctor.check import CheckResult, Fix, Status, check, error, ok, skip, unknown, warn
from doctor.context import CheckContext
from doctor.host import Interface
from doctor.nccl import choose_interfaces
from rtp_llm.config import MAX_START_PORT
from rtp_llm.parallel.plan import PlannedPort
from rtp_llm.parallel.ports import port_conflict

CATEGORY = "network"
ONE_PART = "a single part"
SLOW_NAME_SECONDS = 1.0
NODE_PORTS = range(30000, 32768)  # Kubernetes' default
RAS_PORT = 28028


def _own_ports(ctx: CheckContext) -> list[PlannedPort]:
    if ctx.plan:
        return ctx.plan.local_ports()
    return [PlannedPort(ctx.config.start_port, "HTTP (START_PORT)")]


@check(
    "N-08",
    CATEGORY,
    "the planned ports are free",
    symptoms=(
        "The server socket has failed to listen on any local network address. port: …, … EADDRINUSE",
        "[Errno 98] Address already in use",
        "port …, wanted for …: in use by pid …",
    ),
    needs=("N-15",),
    timeout=5,
)
def ports_free(ctx: CheckContext) -> CheckResult:
    """Another server, or an earlier one that has not ended yet, listens on a port that this part needs. All ports of
    the plan are tried, not only START_PORT."""
    planned = _own_ports(ctx)
    if ctx.running:
        return ok(f"{len(planned)} ports, used by this part, which is running")
    taken = [(port, why) for port, why in ((p, port_conflict(p)) for p in planned) if why]
    if taken:
        text = "; ".join(f"port {port.port}, for {port.purpose}: {why}" for port, why in taken)
        return error(text, "a free port", _fix_port(ctx, taken[0][1]))
    return ok(", ".join(str(port.port) for port in planned) + " are free")


def _fix_port(ctx: CheckContext, why: str) -> Fix:
    pid = re.search(r"pid (\d+)", why)
    stop = f"kill {pid[1]}" if pid else "stop its owner"
    other = _free_start_port(ctx)
    if other is None:
        return Fix(stop)
    stop += ", or "
    listed = "; the same port in the member list" if ctx.plan and ctx.plan.is_multi_part else ""
    return Fix(
        host=f"{stop}START_PORT={other}{listed}",
        docker=f"{stop}docker run -e START_PORT={other} -p {other}:{other} …{listed}",
        compose=f"{stop}START_PORT: {other}{listed}",
        kubernetes=f"with hostNetwork another pod has it: START_PORT={other}{listed}",
    )


def _free_start_port(ctx: CheckContext) -> int | None:
    """The next one up, or else from 10000 on, whose whole plan is free and allowed; rather none of those that outgoing
    connections or Services may get."""
    start, own, (low, high) = ctx.config.start_port, _own_ports(ctx), _ephemeral(ctx)
    candidates = [*range(start + 100, MAX_START_PORT + 1, 100), *range(10000, start, 100)]

    def safe(candidate: int) -> bool:
        ports = [port.port + candidate - start for port in own]
        return not any(low <= port <= high or port in NODE_PORTS for port in ports)

    def free(candidate: int) -> bool:
        moved = [replace(port, port=port.port + candidate - start) for port in own]
        return _fits(ctx, candidate) and not any(map(port_conflict, moved))

    return next(filter(free, [*filter(safe, candidates), *candidates]), None)


def _fits(ctx: CheckContext, start: int) -> bool:
    """Whether the block of ports that follows from this START_PORT is allowed, and no other part's on this address."""
    plan = ctx.plan
    own = next((m for m in plan.members if m.index == plan.part), None) if plan else None
    if plan is None or own is None:
        return True
    block = plan.reserved_ports(replace(own, port=start))
    others = [plan.reserved_ports(m) for m in plan.members if m.index != plan.part and m.ip == own.ip]
    return block.stop <= 65536 and all(block.stop <= o.start or o.stop <= block.start for o in others)


@check("N-09", CATEGORY, "the port plan collides with nothing", needs=("M-14", "C-02"))
def port_plan(ctx: CheckContext) -> CheckResult:
    """A planned port within the kernel's range for outgoing connections may be taken by any of them at any time; one
    in Kubernetes' NodePort range by a Service. Two parts on one address need blocks of their own."""
    fault = ctx.plan_result.config_error
    if fault and fault.check == "N-09":
        return error(
            str(fault), "blocks that do not overlap", "move one START_PORT by 100 or more, in the list as well"
        )
    planned = _own_ports(ctx)
    low, high = _ephemeral(ctx)
    inside = [p.port for p in planned if low <= p.port <= high and p.port not in _reserved(ctx)]
    listed = ", ".join(map(str, inside))
    if inside:
        return warn(
            f"ports {listed} lie in {low}-{high}, which outgoing connections use",
            f"ports below {low}",
            f"START_PORT below {min(low, NODE_PORTS.start)}, or sysctl net.ipv4.ip_local_reserved_ports={listed}",
        )
    node_ports = [p.port for p in planned if p.port in NODE_PORTS]
    if node_ports and ctx.host.runtime == "kubernetes":
        return warn(f"ports {', '.join(map(str, node_ports))} are NodePorts", "ports below 30000", "START_PORT=10000")
    least = ctx.host.read_int("/proc/sys/net/ipv4/ip_unprivileged_port_start") or 0
    closed = [p.port for p in planned if p.port < least]
    if closed and ctx.host.uid != 0:
        return error(f"ports {closed} need privileges (below {least})", f"{least} or above", "START_PORT=10000")
    return ok(f"outside {low}-{high}")


def _ephemeral(ctx: CheckContext) -> tuple[int, int]:
    words = (ctx.host.read("/proc/sys/net/ipv4/ip_local_port_range") or "").split()
    return (int(words[0]), int(words[1])) if len(words) == 2 else (32768, 60999)


def _reserved(ctx: CheckContext) -> set[int]:
    found: set[int] = set()
    text = (ctx.host.read("/proc/sys/net/ipv4/ip_local_reserved_ports") or "").strip()
    for piece in filter(None, text.split(",")):
        first, _, last = piece.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


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
        if _is_address(member.ip):
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
                return warn(text, "an IPv4 address before long: the rendezvous waits for it", fix, because="N-07")
            return error(text, "an IPv4 address", fix)
        if time.monotonic() - started > SLOW_NAME_SECONDS:
            slow.append(member.ip)
    if slow:
        return warn(f"{slow[0]} takes over a second to resolve", "an answer at once", "write addresses into the list")
    return ok(f"{len(ctx.plan.members)} members")


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


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
        found = [member.ip] if _is_address(member.ip) else ctx.host.resolve(member.ip)
        same_machine = any(m.ip == member.ip for m in ctx.plan.members if m.index == ctx.plan.part)
        if not _is_address(member.ip) and all(ip_address(a).is_loopback for a in found) and not same_machine:
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


def _route(ctx: CheckContext, ip: str) -> Interface | None:
    """The interface over which this machine reaches a peer. Raises OSError where there is no route."""
    address = ip if _is_address(ip) else ctx.host.resolve(ip)[0]
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
    if _is_address(name):
        return any(ip_address(name) in network for network in map(_network, spared) if network)
    return any(entry.startswith(".") and name.endswith(entry) for entry in spared)


def _network(text: str) -> IPv4Network | IPv6Network | None:
    try:
        return ip_network(text, strict=False)
    except ValueError:
        return None


@check(
    "N-12",
    CATEGORY,
    "RDMA cards are connected",
    symptoms=(
        "NET/IB : Got completion from peer … with status=12",
        "Call to ibv_modify_qp failed with error Invalid argument",
    ),
)
def infiniband(ctx: CheckContext) -> CheckResult:
    """NCCL uses every RDMA port that is active. If cards are here and none is, or their device files are not in the
    container, it falls back to TCP or fails."""
    cards = ctx.host.list_dir("/sys/class/infiniband")
    if not cards or not ctx.on_gpu or not ctx.plan or not ctx.plan.is_multi_part:
        return skip("no RDMA between parts")
    if ctx.nccl.value("NCCL_IB_DISABLE") == "1":
        return ok("NCCL_IB_DISABLE=1")
    states = [ctx.host.read(f"/sys/class/infiniband/{card}/ports/1/state") or "" for card in cards]
    active = sum("ACTIVE" in state for state in states)
    files = [name for name in ctx.host.list_dir("/dev/infiniband") if name.startswith("uverbs")]
    fix = Fix(
        host="connect the cards, or NCCL_IB_DISABLE=1",
        docker="docker run --device /dev/infiniband --ulimit memlock=-1 --cap-add IPC_LOCK …, or -e NCCL_IB_DISABLE=1",
        compose='devices: ["/dev/infiniband"], or NCCL_IB_DISABLE: 1',
        kubernetes="request the RDMA device plugin's resource, or NCCL_IB_DISABLE=1",
    )
    if not active:
        return error(f"none of {len(cards)} RDMA cards has an active port", "an active port", fix)
    if not files:
        return error("/dev/infiniband is not in this container", "its device files", fix)
    gid = ctx.nccl.value("NCCL_IB_GID_INDEX")
    if gid and ctx.nccl.version >= (2, 21):
        return warn(
            f"NCCL_IB_GID_INDEX={gid}: NCCL 2.21 and later finds the right one", "unset", "unset NCCL_IB_GID_INDEX"
        )
    return ok(f"{active} active ports")


@check(
    "N-16",
    CATEGORY,
    "NCCL's plugins can be found",
    severity=Status.WARN,
    symptoms=("Failed to initialize any NET plugin",),
)
def plugin(ctx: CheckContext) -> CheckResult:
    """NCCL_NET_PLUGIN names a library of the platform. Where it cannot be found NCCL falls back to sockets, or, if
    NCCL_NET asks for it by name, does not start."""
    name = ctx.nccl.value("NCCL_NET_PLUGIN")
    if not name or name in ("none", "None"):
        return ok("no plugin is asked for")
    candidates = (name, f"nccl-net-{name}", "nccl-net") if "/" not in name else ()
    folders = ctx.host.environ.get("LD_LIBRARY_PATH", "").split(":")
    wanted = (f"lib{c.removeprefix('lib').removesuffix('.so')}.so" for c in candidates)
    found = ctx.host.exists(name) if "/" in name else any(
        ctypes.util.find_library(c) or any(ctx.host.exists(f"{f}/{w}") for f in folders if f)
        for c, w in zip(candidates, wanted, strict=True)
    )  # fmt: skip
    if found:
        return ok(f"NCCL_NET_PLUGIN={name}")
    strict = ctx.nccl.value("NCCL_NET")
    fix = "add the plugin's folder to LD_LIBRARY_PATH, or unset NCCL_NET_PLUGIN"
    if strict and strict not in ("Socket", "IB"):
        return error(f"NCCL_NET={strict} needs plugin {name}, which is not found", "the library", fix)
    return warn(f"NCCL_NET_PLUGIN={name} is not found", "the library", fix)


@check("N-17", CATEGORY, "NCCL's status port is free", severity=Status.WARN)
def ras(ctx: CheckContext) -> CheckResult:
    """NCCL 2.24 and later listens on localhost:28028 for questions about its state; the second job of a machine cannot.
    For information."""
    if not ctx.on_gpu or ctx.local_ranks < 2:
        return skip("no NCCL on this machine")
    if ctx.nccl.value("NCCL_RAS_ENABLE") == "0" or "NCCL_RAS_ADDR" in ctx.nccl.settings or ctx.running:
        return ok("configured")
    taken = port_conflict(PlannedPort(RAS_PORT, "", "127.0.0.1"))
    return ok(
        f"localhost:{RAS_PORT} {taken}: this part answers no ncclras" if taken else f"localhost:{RAS_PORT} is free"
    )


@check("N-18", CATEGORY, "idle connections between parts are not dropped", severity=Status.WARN)
def conntrack(ctx: CheckContext) -> CheckResult:
    """A firewall that tracks connections forgets idle ones, or takes no new ones when its table is full. The heartbeat
    of every rank keeps this server's own alive."""
    count = ctx.host.read_int("/proc/sys/net/netfilter/nf_conntrack_count")
    most = ctx.host.read_int("/proc/sys/net/netfilter/nf_conntrack_max")
    if not ctx.plan or not ctx.plan.is_multi_part:
        return skip(ONE_PART)
    if count is None or not most:
        return ok("no connection tracking can be seen")
    if count > 0.9 * most:
        fix = f"sysctl net.netfilter.nf_conntrack_max={2 * most}"
        return warn(f"{count} of {most} tracked connections are in use", "room", fix)
    return ok(f"{count} of {most} tracked connections")


@check(
    "G-21",
    CATEGORY,
    "no debugging aid was left on",
    severity=Status.WARN,
)
def debugging(ctx: CheckContext) -> CheckResult:
    """Switches that help to find a fault make every step slower, or force NCCL onto slow ways, when they stay in the
    environment or in nccl.conf."""
    if not ctx.on_gpu:
        return skip("the ranks run on CPU")
    seen = []
    environ = ctx.host.environ
    if environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        seen.append("CUDA_LAUNCH_BLOCKING")
    seen += [name for name in ("CUDA_INJECTION64_PATH", "COMPUTE_PROFILE") if environ.get(name)]
    for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"):
        setting = ctx.nccl.settings.get(name)
        if setting and setting.value == "1":
            seen.append(name if setting.source == "environment" else f"{name} (in {setting.source})")
    if ctx.nccl.value("NCCL_DEBUG").upper() == "TRACE":
        seen.append("NCCL_DEBUG=TRACE")
    if seen:
        return warn(
            f"{', '.join(seen)} set", "unset, in production", "unset " + " ".join(s.split(" ")[0] for s in seen)
        )
    return ok("none")
