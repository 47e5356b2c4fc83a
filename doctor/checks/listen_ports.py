"""The TCP ports that this part listens on."""

import re
from dataclasses import replace

from doctor.check import CheckResult, Fix, check, error, ok, warn
from doctor.context import CheckContext
from rtp_llm.config import MAX_START_PORT
from rtp_llm.parallel.plan import PlannedPort
from rtp_llm.parallel.ports import port_conflict

CATEGORY = "network"
NODE_PORTS = range(30000, 32768)  # Kubernetes' default


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
