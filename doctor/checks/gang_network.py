"""Checks of the connections between the parts: ports, large transfers and speed."""

from collections.abc import Mapping, Sequence

from doctor import fixes
from doctor.check import CheckResult, Reading, Repair, Status, error, ok, skip, symptoms, unknown, warn
from doctor.checks.categories import gang_check
from doctor.context import CheckContext
from doctor.gang.gossip import SLOW_BYTES
from doctor.gang.part_report import PartReport
from doctor.gang.view import GangView
from doctor.host import format_bytes
from rtp_llm.model.spec import ModelSpec

# (report of the part that connects, report of the target, {unreachable port: result of `dial`})
UnreachableLink = tuple[PartReport, PartReport, dict[int, str]]


def _unreachable_links(view: GangView, ephemeral: bool) -> list[UnreachableLink]:
    """Returns every pair of parts of which one cannot reach some ports of the other.

    `ephemeral`: True considers only ephemeral ports, False only the ports in the plan.
    """
    links = []
    for source, target, _ in view.links():
        ports = view.unreachable_ports(source, target)
        ports = {port: outcome for port, outcome in ports.items() if (port in target.ephemeral_ports) == ephemeral}
        if ports:
            links.append((source, target, ports))
    return links


def _probable_cause(view: GangView, source: PartReport, target: PartReport, ports: Mapping[int, str]) -> str:
    """Returns as text why `source` probably cannot reach `ports` of `target`.

    Judges by the results of the attempts, and by whether `target` reaches `source`.
    """
    outcomes = set(ports.values())
    if outcomes <= {"not_doctor"}:
        return f"another program listens on ports that part{target.part} needs"
    if outcomes <= {"refused"}:
        return f"no process listens there, or part{target.part}'s firewall rejects the connection"
    if not view.unreachable_ports(target, source):
        return f"part{target.part} reaches part{source.part}, so incoming connections are filtered at part{target.part}"
    return (
        f"part{target.part} does not reach part{source.part} either: check the network between them and both firewalls"
    )


def _describe_link(source: PartReport, target: PartReport, ports: Mapping[int, str]) -> str:
    texts = {"timeout": "times out", "unreachable": "is unreachable", "not_doctor": "is answered by another program"}
    failures = ", ".join(
        f"{port} ({target.planned_ports.get(port, 'an ephemeral port, as NCCL uses')}) {texts.get(outcome, outcome)}"
        for port, outcome in sorted(ports.items())
    )
    return f"part{source.part} -> part{target.part} ({target.address}): {failures}"


def _incomplete(links: Sequence[tuple[PartReport, PartReport]], reason: str) -> CheckResult:
    """Returns a result with status UNKNOWN, which names the pairs of parts whose connection was not tested."""
    directions = ", ".join(f"part{source.part} -> part{target.part}" for source, target in links)
    return unknown(f"{reason}: {directions or 'no part'}", "raise the time to wait: --wait SECONDS")


@gang_check("N-01", "every part can connect to the planned ports of every other part", repair=Repair.OPEN_PORT)
@symptoms(
    "The client socket has timed out after …ms while trying to connect to (…)",
    "connect to …<…> failed : No route to host",
    "rendezvous at …: Connection refused",
)
def planned_ports_are_reachable(ctx: CheckContext, view: GangView) -> CheckResult:
    """Every part connects to all ports that the server uses on every other part: START_PORT, the doctor's port, and on
    part 0 also the ports below START_PORT, for the rendezvous, the steps that the scheduler sends to the ranks, and
    torch.distributed. A timeout means that a firewall drops packets; a refused connection, that no process listens."""
    links = _unreachable_links(view, ephemeral=False)
    if links:
        actual = "; ".join(f"{_describe_link(*link)}; {_probable_cause(view, *link)}" for link in links)
        ports = ",".join(str(port) for port in sorted({port for _, _, ports in links for port in ports}))
        source, target, _ = links[0]
        return error(actual, "connections to every planned port", fixes.open_ports(target.part, ports, source.address))
    unprobed = view.unprobed()
    if unprobed:
        return _incomplete(unprobed, "not all links were tested in time")
    num_ports = [len(link.ports) for _, _, link in view.links()]
    actual = f"{sum(num_ports)} ports accept connections, in {len(num_ports)} directions between parts"
    return ok(actual) if sum(num_ports) else skip("there is no other part")


@gang_check(
    "N-02", "ephemeral ports are open between the parts", needs=("C-09", "C-10", "N-01"), repair=Repair.OPEN_PORT
)
@symptoms(
    "Net : Connect to …<…> failed : No route to",
    "ncclSocketConnect: connect to … returned Connection refused, exceeded error retry count",
    "socketPollConnect: connect to … returned … exceeded",
)
def ephemeral_ports_are_reachable(ctx: CheckContext, view: GangView) -> CheckResult:
    """NCCL and gloo listen on ports that the kernel chooses from net.ipv4.ip_local_port_range. If a firewall opens only
    the planned ports, the rendezvous succeeds and the first collective hangs."""
    links = _unreachable_links(view, ephemeral=True)
    if links:
        source, target, _ = links[0]
        actual = f"{'; '.join(_describe_link(*link) for link in links)}; {_probable_cause(view, *links[0])}"
        low, _, high = target.port_range.partition("-")
        fix = fixes.open_ephemeral_ports(low, high, source.address)
        return error(actual, f"TCP ports {target.port_range} open between the parts", fix)
    if not any(port in target.ephemeral_ports for _, target, link in view.links() for port in link.ports):
        return skip("no ephemeral port was tried")
    return ok("all ephemeral ports that were tried accept connections")


@gang_check("N-10", "large transfers work between all parts", needs=("C-09", "C-10", "N-01"))
@symptoms("IBV_WC_LOC_LEN_ERR")
def large_transfers_work(ctx: CheckContext, view: GangView) -> CheckResult:
    """If one end sends jumbo frames and a device in between drops them, small messages arrive and large ones hang.
    Every part sends 8 MiB to every other part and receives 8 MiB from it, and the MTUs of the interfaces are compared.
    If even replies of a few KiB are lost, the doctors limit the segment size (MSS) of their connections, so that they
    can still exchange reports."""
    mtus = {(r.part, r.interface): r.mtu for r in view.comparable}
    lowest = min(mtus.values())
    listed = ", ".join(f"part{part} {interface} {mtu}" for (part, interface), mtu in mtus.items())
    fix = "; ".join(
        f"ip link set {interface} mtu {lowest} on part{part}" for (part, interface), mtu in mtus.items() if mtu > lowest
    )
    stalled = view.stalled()
    if stalled:
        actual = f"{'; '.join(stalled)}; MTU: {listed}"
        return error(
            actual, "transfers of 8 MiB in each direction", fix or "lower the MTU of the interfaces on both parts"
        )
    missing = view.links_without_transfer()
    if missing:
        return _incomplete(missing, "no transfer of 8 MiB finished in time")
    if not any(view.links()):
        return skip("there is no other part")
    if len(set(mtus.values())) > 1:
        return warn(f"the MTUs differ: {listed}", "the same MTU on all parts", fix)
    return ok(f"MTU {lowest}; 8 MiB passed in each direction")


@gang_check(
    "N-13", "the network between the parts is fast enough", severity=Status.WARN, needs=("C-09", "C-10", "N-01", "N-10")
)
def links_are_fast(ctx: CheckContext, view: GangView) -> CheckResult | Reading:
    """Tensor parallelism has two all-reduces per layer, so every token crosses the network 2 x layers times. The
    predicted time per token is computed from the measured throughput and round-trip time."""
    links = [link for _, _, link in view.links() if link.sent_speed and link.received_speed]
    if not links:
        return skip("no transfer between two parts finished")
    slowest = min(min(link.sent_speed, link.received_speed) for link in links)
    rtt = max(link.rtt for link in links)
    cost = f"; about {token_cost(ctx.spec, slowest, rtt) * 1000:.1f} ms per token" if ctx.spec else ""
    return Reading(
        slowest,
        f"{format_bytes(slowest)}/s, round trip {rtt * 1000:.2f} ms{cost}",
        "10 Gbit/s or more",
        "write addresses of a faster network into the member list",
        recommended=SLOW_BYTES,
    )


def token_cost(spec: ModelSpec, bytes_per_second: float, rtt: float) -> float:
    """Returns a prediction of the seconds that the all-reduces of one token take on the network between two parts.

    `rtt`: round-trip time in seconds. Assumes two all-reduces per layer, each of which takes half a round trip and
    sends one hidden vector of 2 bytes per element.
    """
    return 2 * spec.num_layers * (rtt / 2 + 2 * spec.hidden_size / bytes_per_second)
