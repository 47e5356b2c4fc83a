"""Checks of the TCP ports on which this part listens."""

import re
from dataclasses import replace

from doctor import fixes
from doctor.attach import describe_running, running_part
from doctor.check import CheckResult, error, ok, symptoms, warn
from doctor.checks.categories import network_check
from doctor.context import CheckContext
from doctor.fixes import Fix
from doctor.host import parse_number_ranges
from rtp_llm.config import MAX_START_PORT
from rtp_llm.errors import ConfigError
from rtp_llm.parallel.plan import PlannedPort
from rtp_llm.parallel.ports import port_conflict

NODE_PORTS = range(30000, 32768)  # Kubernetes' default range for Services of type NodePort


def _planned_ports(ctx: CheckContext) -> list[PlannedPort]:
    if ctx.plan:
        return ctx.plan.local_ports()
    return [PlannedPort(ctx.config.start_port, "HTTP (START_PORT)", ctx.config.host)]


@network_check("N-08", "the planned ports are free", needs=("N-15",), timeout=5)
@symptoms(
    "The server socket has failed to listen on any local network address. port: …, … EADDRINUSE",
    "[Errno 98] Address already in use",
    "port …, wanted for …: in use by pid …",
)
def ports_are_free(ctx: CheckContext) -> CheckResult:
    """Fails if another server, or an earlier one that has not exited yet, listens on a port that this part needs. The
    doctor tries to listen on all of the part's ports, not only on START_PORT."""
    planned = _planned_ports(ctx)
    if ctx.running:
        return ok(f"this part's server is running and uses its {len(planned)} ports")
    try:
        conflicts = [(port, reason) for port, reason in ((p, port_conflict(p)) for p in planned) if reason]
    except ConfigError as config_error:
        return error(str(config_error), "an address of this machine", Fix("correct HOST, or leave it unset"))
    if conflicts:
        actual = "; ".join(f"port {port.port}, for {port.purpose}: {reason}" for port, reason in conflicts)
        part_spec = running_part(ctx.config.start_port)
        if part_spec:
            actual = f"{describe_running(part_spec)}: {actual}"
            return error(actual, "a free port", _fix_port(ctx, f"rtp-llm-doctor attach --run-dir {part_spec.run_dir}"))
        return error(actual, "a free port", _fix_port(ctx, _stop_owner(conflicts[0][1])))
    return ok(", ".join(str(port.port) for port in planned) + " are free")


def _stop_owner(conflict: str) -> str:
    pid = re.search(r"pid (\d+)", conflict)
    return f"kill {pid[1]}" if pid else "stop its owner"


def _fix_port(ctx: CheckContext, stop_owner: str) -> Fix:
    start_port = _free_start_port(ctx)
    if start_port is None:
        return Fix(stop_owner)
    same_in_list = "; the same port in the member list" if ctx.is_multi_part else ""
    return fixes.other_start_port(stop_owner, start_port, same_in_list)


def _free_start_port(ctx: CheckContext) -> int | None:
    """Returns the next START_PORT above the configured one, or else from 10000, for which all ports of this part are
    free and allowed.

    Prefers ports outside the ephemeral range and the NodePort range. Returns None if there is none.
    """
    start, planned, (low, high) = ctx.config.start_port, _planned_ports(ctx), _ephemeral_range(ctx)
    candidates = [*range(start + 100, MAX_START_PORT + 1, 100), *range(10000, start, 100)]

    def moved(candidate: int) -> list[PlannedPort]:
        return [replace(port, port=port.port + candidate - start) for port in planned]

    def is_outside_ranges(candidate: int) -> bool:
        return not any(low <= port.port <= high or port.port in NODE_PORTS for port in moved(candidate))

    def is_free(candidate: int) -> bool:
        return _is_allowed(ctx, candidate) and not any(map(port_conflict, moved(candidate)))

    return next(filter(is_free, [*filter(is_outside_ranges, candidates), *candidates]), None)


def _is_allowed(ctx: CheckContext, start_port: int) -> bool:
    """Returns whether the port range for this START_PORT is valid, and does not overlap that of another part at the
    same address."""
    plan, local = ctx.plan, ctx.local_member
    if plan is None or local is None:
        return True
    ports = plan.reserved_ports(replace(local, port=start_port))
    others = [plan.reserved_ports(m) for m in ctx.peers if m.ip == local.ip]
    return ports.stop <= 65536 and all(ports.stop <= o.start or o.stop <= ports.start for o in others)


@network_check("N-09", "the planned ports are outside reserved port ranges", needs=("M-14", "C-02"))
def ports_are_not_reserved(ctx: CheckContext) -> CheckResult:
    """An outgoing connection may take any port of the kernel's ephemeral range (net.ipv4.ip_local_port_range) at any
    time, and a Kubernetes Service any port of the NodePort range, so the server's ports should be outside both. The
    port ranges of two parts at one address must not overlap."""
    config_error = ctx.plan_result.config_error
    if config_error and config_error.check == "N-09":
        fix = "change one START_PORT by 100 or more, also in the member list"
        return error(str(config_error), "port ranges that do not overlap", fix)
    planned = [port.port for port in _planned_ports(ctx)]
    low, high = _ephemeral_range(ctx)
    reserved = parse_number_ranges(ctx.host.read("/proc/sys/net/ipv4/ip_local_reserved_ports") or "")
    ephemeral = [port for port in planned if low <= port <= high and port not in reserved]
    if ephemeral:
        ports = ", ".join(map(str, ephemeral))
        fix = f"START_PORT below {min(low, NODE_PORTS.start)}, or sysctl net.ipv4.ip_local_reserved_ports={ports}"
        return warn(f"ports {ports} are in {low}-{high}, which outgoing connections use", f"ports below {low}", fix)
    node_ports = ", ".join(str(port) for port in planned if port in NODE_PORTS)
    if node_ports and ctx.host.runtime == "kubernetes":
        return warn(f"ports {node_ports} are in the NodePort range", "ports below 30000", "START_PORT=10000")
    min_port = ctx.host.read_int("/proc/sys/net/ipv4/ip_unprivileged_port_start") or 0
    privileged = [port for port in planned if port < min_port]
    if privileged and ctx.host.uid != 0:
        ports = ", ".join(map(str, privileged))
        actual = f"only root may listen on ports {ports} (below {min_port})"
        return error(actual, f"ports of {min_port} or above", "START_PORT=10000")
    return ok(f"the ports are outside the ephemeral range {low}-{high}")


def _ephemeral_range(ctx: CheckContext) -> tuple[int, int]:
    fields = (ctx.host.read("/proc/sys/net/ipv4/ip_local_port_range") or "").split()
    return (int(fields[0]), int(fields[1])) if len(fields) == 2 else (32768, 60999)
