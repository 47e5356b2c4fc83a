"""Connections between the parts: ports, large transfers and speed."""

from collections.abc import Mapping

from doctor.check import CheckResult, Fix, Repair, Status, check, error, ok, skip, unknown, warn
from doctor.context import CheckContext
from doctor.gang.gossip import SLOW_BYTES
from doctor.gang.part_report import PartReport
from doctor.gang.view import GangView
from doctor.host import format_bytes
from rtp_llm.model.spec import ModelSpec

CATEGORY = "gang"
NOT_RUN = "`rtp-llm-doctor gang` on every part"


def _unreachable_links(view: GangView, random: bool) -> list[tuple[PartReport, PartReport, dict[int, str]]]:
    """Directions in which ports are closed: the planned ones, or those that the kernel chose."""
    found = []
    for one, other, _ in view.links():
        closed = {p: o for p, o in view.unreachable_ports(one, other).items() if (p in other.ephemeral_ports) == random}
        if closed:
            found.append((one, other, closed))
    return found


def _probable_cause(view: GangView, one: PartReport, other: PartReport, closed: Mapping[int, str]) -> str:
    """Who is to mend it, by what the opposite direction and the kind of failure say."""
    back = view.unreachable_ports(other, one)
    kinds = set(closed.values())
    if kinds <= {"foreign"}:
        return f"another program has what part{other.part} needs"
    if kinds <= {"refused"}:
        return f"nothing listens there, or part{other.part}'s firewall refuses"
    if not back:
        return f"part{other.part} reaches part{one.part}, so incoming connections are filtered at part{other.part}"
    return f"part{other.part} does not reach part{one.part} either: the network between them, or both firewalls"


def _incomplete(ways: list[tuple[PartReport, PartReport]], what: str) -> CheckResult:
    """What was not tried is not green."""
    listed = ", ".join(f"part{one.part} -> part{other.part}" for one, other in ways)
    return unknown(f"{what}: {listed or 'no part'}", "give it more time: --wait")


def _format_ports(closed: Mapping[int, str], part_report: PartReport) -> str:
    words = {"timeout": "times out", "unreachable": "is unreachable", "foreign": "is answered by something else"}
    return ", ".join(
        f"{port} ({part_report.planned_ports.get(port, 'chosen by the kernel, as NCCL does')}) {words.get(how, how)}"
        for port, how in sorted(closed.items())
    )


@check(
    "N-01",
    CATEGORY,
    "every part reaches the planned ports of every other",
    tier=2,
    symptoms=(
        "The client socket has timed out after …ms while trying to connect to (…)",
        "connect to …<…> failed : No route to host",
        "roll call at …: Connection refused",
    ),
    needs=("C-09", "C-10"),
    repair=Repair.OPEN_PORT,
)
def planned_ports(ctx: CheckContext) -> CheckResult:
    """All ports of the plan are dialled from every part: those below START_PORT on part 0 carry the roll call, the
    steps and torch's rendezvous. A time-out means a filter, a refusal that nobody listens."""
    view = ctx.gang
    if view is None:
        return skip(NOT_RUN)
    ways = _unreachable_links(view, random=False)
    if ways:
        text = "; ".join(
            f"part{a.part} -> part{b.part} ({b.address}): {_format_ports(closed, b)}; {_probable_cause(view, a, b, closed)}"
            for a, b, closed in ways
        )
        ports = ",".join(str(port) for port in sorted({p for _, _, closed in ways for p in closed}))
        target = ways[0][1]
        return error(
            text,
            "an answer on every port",
            Fix(
                host=f"on part{target.part}'s machine: open tcp {ports} from {ways[0][0].address}",
                docker=f"docker run --network host …, and open tcp {ports} on part{target.part}'s machine",
                compose=f"network_mode: host, and open tcp {ports} on part{target.part}'s machine",
                kubernetes=f"allow tcp {ports} between the gang's pods in the NetworkPolicy",
            ),
        )
    untried = view.unprobed()
    if untried:
        return _incomplete(untried, "the time was up before all ways were tried")
    count = sum(len(link.ports) for _, _, link in view.links())
    if not count:
        return skip("there was no way to try")
    return ok(f"{count} ports in {sum(1 for _ in view.links())} directions")


@check(
    "N-02",
    CATEGORY,
    "ports that the kernel chooses are open as well",
    tier=2,
    symptoms=(
        "Net : Connect to …<…> failed : No route to",
        "ncclSocketConnect: connect to … returned Connection refused, exceeded error retry count",
        "socketPollConnect: connect to … returned … exceeded",
    ),
    needs=("C-09", "C-10", "N-01"),
    repair=Repair.OPEN_PORT,
)
def ephemeral_ports(ctx: CheckContext) -> CheckResult:
    """NCCL and gloo listen on ports that the kernel picks from net.ipv4.ip_local_port_range. A firewall that opens only
    the planned ports lets the roll call pass and the first collective hang."""
    view = ctx.gang
    if view is None:
        return skip(NOT_RUN)
    ways = _unreachable_links(view, random=True)
    if ways:
        one, other, closed = ways[0]
        text = "; ".join(f"part{a.part} -> part{b.part} ({b.address}): {_format_ports(c, b)}" for a, b, c in ways)
        low, _, high = other.port_range.partition("-")
        return error(
            f"{text}; {_probable_cause(view, one, other, closed)}",
            f"tcp {other.port_range} open between the parts",
            Fix(
                host=f"open tcp {low}:{high} from {one.address}, or narrow the range (sysctl -w"
                ' net.ipv4.ip_local_port_range="50000 51000") and open that',
                docker=f"open tcp {low}:{high} between the machines, or docker run --sysctl"
                ' net.ipv4.ip_local_port_range="50000 51000" … and open that',
                kubernetes=f"allow tcp {low}-{high} (endPort) between the gang's pods in the NetworkPolicy",
            ),
        )
    if not any(port in other.ephemeral_ports for _, other, link in view.links() for port in link.ports):
        return skip("none was tried")
    return ok("every one that was tried")


@check(
    "N-10",
    CATEGORY,
    "large messages pass as small ones do",
    tier=2,
    symptoms=("IBV_WC_LOC_LEN_ERR",),
    needs=("C-09", "C-10", "N-01"),
)
def mtu(ctx: CheckContext) -> CheckResult:
    """Where one end sends jumbo frames and something between drops them, small messages pass and large ones hang. 8 MiB
    are sent each way between all parts, and the interfaces' MTUs compared. Where answers of a few KiB are lost already,
    the doctors go on in segments that every link carries."""
    view = ctx.gang
    if view is None:
        return skip(NOT_RUN)
    stalled = view.stalled()
    sizes = {f"part{part_report.part} {part_report.interface}": part_report.mtu for part_report in view.comparable}
    listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
    low = min(sizes.values())
    fix = "; ".join(
        f"ip link set {n.split()[1]} mtu {low} on {n.split()[0]}" for n, size in sizes.items() if size > low
    )
    if stalled:
        return error(f"{'; '.join(stalled)}; MTU: {listed}", "8 MiB each way", fix or "lower the MTU on both ends")
    missing = view.links_without_transfer()
    if missing:
        return _incomplete(missing, "no transfer of 8 MiB came to an end")
    if not any(view.links()):
        return skip("there was no way to try")
    if len(set(sizes.values())) > 1:
        return warn(f"MTU differs: {listed}", "one MTU", fix)
    return ok(f"MTU {low}; 8 MiB each way went through")


@check(
    "N-13", CATEGORY, "the links are fast enough", tier=2, severity=Status.WARN, needs=("C-09", "C-10", "N-01", "N-10")
)
def speed(ctx: CheckContext) -> CheckResult:
    """Tensor parallelism sums activations twice per layer, so every token crosses the network 2 x layers times: the
    predicted cost per token is printed from the measured speed and round trip."""
    view = ctx.gang
    if view is None:
        return skip(NOT_RUN)
    links = [link for _, _, link in view.links() if link.sent_speed and link.received_speed]
    if not links:
        return skip("no transfer was made")
    slow = min(min(link.sent_speed, link.received_speed) for link in links)
    rtt = max(link.rtt for link in links)
    cost = f"; {token_cost(ctx.spec, slow, rtt) * 1000:.1f} ms per token" if ctx.spec else ""
    text = f"{format_bytes(slow)}/s, round trip {rtt * 1000:.2f} ms{cost}"
    if slow < SLOW_BYTES:
        return warn(text, "10 Gbit/s or more", "use the faster network's addresses in the member list")
    return ok(text)


def token_cost(spec: ModelSpec, bytes_per_second: float, rtt: float) -> float:
    """Seconds that the all-reduces of one token take between two parts: two per layer, each half a round trip and one
    hidden vector."""
    return 2 * spec.num_layers * (rtt / 2 + 2 * spec.hidden_size / bytes_per_second)
