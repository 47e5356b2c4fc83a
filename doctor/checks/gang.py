"""What only shows when the parts talk to each other: ways that are closed, and things that differ."""

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
CLOCK_SECONDS = 1.0
# Which transport NCCL takes: where these differ, ranks wait for each other on different ways.
TRANSPORT = (
    *("NCCL_IB_DISABLE", "NCCL_NET", "NCCL_NET_PLUGIN", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_ALGO"),
    *("NCCL_PROTO", "NCCL_SOCKET_FAMILY", "NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE", "NCCL_MNNVL_ENABLE"),
)
SAME_ENV_FIX = Fix(
    host="give all parts the same environment; only WORLD_RANK, START_PORT and CUDA_VISIBLE_DEVICES may differ",
    docker="docker run --env-file gang.env …, the same file on every machine",
    compose="env_file: gang.env, the same for every part",
    kubernetes="one ConfigMap for all pods, with envFrom",
)


def _view(ctx: CheckContext) -> GangView | None:
    return ctx.gang


def _table(differences: Mapping[str, Mapping[str, str]]) -> str:
    return "; ".join(
        f"{key}: " + " ".join(f"{p}={v}" for p, v in values.items()) for key, values in differences.items()
    )


@check(
    "C-09",
    CATEGORY,
    "every part is here",
    tier=2,
    symptoms=("Timed out after … seconds waiting for clients", "waiting for part… (…rank…", "missing part… (…rank…"),
    needs=("M-14", "M-13", "C-01", "C-02"),
)
def parts_respond(ctx: CheckContext) -> CheckResult:
    """A part that never answered: its machine is down, its container not started, or nothing of it can be reached.
    The doctor of every part must run at the same time."""
    view = _view(ctx)
    if view is None and ctx.gang_failure:
        return unknown(f"the other parts could not be asked: {ctx.gang_failure}")
    if view is None:
        return skip(NOT_RUN)
    if view.absent:
        names = ", ".join(view.plan.describe_part(part) for part in view.absent)
        first = view.absent[0] * view.plan.local_world_size
        return error(
            f"no response from {names}{_last_attempt(view)}",
            "an answer from every part",
            Fix(
                host=f"start it, with WORLD_RANK={first}, or run `rtp-llm-doctor gang` there as well",
                kubernetes="kubectl get pods -o wide: is it Pending?",
            ),
        )
    return ok(f"all {view.plan.num_parts} parts answered")


def _last_attempt(view: GangView) -> str:
    """How the connections to the parts that are not here ended: nobody there, or nothing gets through."""
    words = {"refused": "refuses: nothing runs there", "timeout": "does not answer: down, or filtered"}
    tries = {
        f"port {port} {words.get(how, how)}"
        for part_report in view.part_reports.values()
        for part in view.absent
        for port, how in (part_report.links[part].ports if part in part_report.links else {}).items()
    }
    return f" ({'; '.join(sorted(tries))})" if tries else ""


@check(
    "C-10",
    CATEGORY,
    "the parts' doctors understand each other",
    tier=2,
    needs=("C-09",),
)
def versions(ctx: CheckContext) -> CheckResult:
    """Doctors of different releases, or with different secrets, cannot compare notes: during a rolling update, or when
    GANG_SECRET was not given to all. Or another program has the port on which a part's doctor should answer."""
    view = _view(ctx)
    if view is None:
        return skip(NOT_RUN)
    strangers = view.foreign_listeners()
    if strangers:
        text = "; ".join(f"part{one} -> part{other}: something else answers at {at}" for one, other, at in strangers)
        return error(text, f"the doctor of part{strangers[0][1]}", _free(*strangers[0][1:]))
    refusals = view.protocol_errors()
    differing = view.differences("doctor.")
    if refusals or differing:
        fix = "the same image, by digest, and the same GANG_SECRET on every part"
        return error(refusals[0] if refusals else _table(differing), "one version and one secret", fix)
    return ok(f"all of {next(iter(view.part_reports.values())).facts['version.rtp-llm']}")


def _free(part: int, address: str) -> Fix:
    port = int(address.rpartition(":")[2])
    other = f"give part{part} another START_PORT, there and in the member list"
    return Fix(
        host=f"on part{part}'s machine: `ss -ltnp sport = :{port}` shows who has port {port}: stop it, or {other}",
        kubernetes=f"with hostNetwork another pod has port {port} of part{part}'s machine: move it, or {other}",
    )


@check("C-11", CATEGORY, "every part is well by itself", tier=2, needs=("C-09", "C-10"), repair=Repair.NONE)
def problems(ctx: CheckContext) -> CheckResult:
    """Each part tells the others what its own checks found, so that whoever looks at any of them sees the cause."""
    view = _view(ctx)
    if view is None:
        return skip(NOT_RUN)
    own = ctx.plan.part if ctx.plan else -1
    found = [
        f"part{part_report.part}: {id} {text}"
        for _, part_report in sorted(view.part_reports.items())
        for id, text in part_report.problems.items()
    ]
    elsewhere = [text for text in found if not text.startswith(f"part{own}:")]
    if elsewhere:
        return error("; ".join(elsewhere), "no errors on any part", "see what the doctor of that part prints")
    return ok("no part reports an error of its own" if not found else "the other parts report none")


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
    if kinds <= {"not_doctor"}:
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
    words = {"timeout": "times out", "unreachable": "is unreachable", "not_doctor": "is answered by something else"}
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
        "rendezvous at …: Connection refused",
    ),
    needs=("C-09", "C-10"),
    repair=Repair.OPEN_PORT,
)
def planned_ports(ctx: CheckContext) -> CheckResult:
    """All ports of the plan are dialled from every part: those below START_PORT on part 0 carry the rendezvous, the
    steps and torch's TCPStore. A time-out means a filter, a refusal that nobody listens."""
    view = _view(ctx)
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
    the planned ports lets the rendezvous pass and the first collective hang."""
    view = _view(ctx)
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
    view = _view(ctx)
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
    view = _view(ctx)
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


@check(
    "C-03",
    CATEGORY,
    "all parts have the same NCCL",
    tier=2,
    symptoms=("Mismatched NCCL version detected : rank … version … rank … version …",),
    needs=("C-09", "C-10"),
)
def nccl_version(ctx: CheckContext) -> CheckResult:
    """NCCL refuses to connect ranks of different versions."""
    return _compare_facts(ctx, ("gpu.nccl",), "one NCCL", Fix("the same image on every part, by digest and not by tag"))


@check("C-04", CATEGORY, "all parts run the same software", tier=2, needs=("C-09", "C-10"))
def software(ctx: CheckContext) -> CheckResult:
    """Another torch computes other last bits, and another version of this server may speak another protocol. A driver
    that differs is a warning."""
    fix = Fix("the same image on every part, by digest and not by tag")
    found = _compare_facts(ctx, ("version.",), "one version of everything", fix)
    return found if found.status != Status.OK else _compare_facts(ctx, ("gpu.driver",), "one driver", fix, judge=warn)


@check("C-05", CATEGORY, "all parts hold the same checkpoint", tier=2, needs=("C-09", "C-10", "M-04", "M-05", "M-06"))
def checkpoints(ctx: CheckContext) -> CheckResult:
    """Ranks with slices of different checkpoints compute garbage, or fail on a shape. config.json and the headers of
    all files are compared."""
    fix = Fix(
        host="rsync --checksum -a the checkpoint from one part to the others, or share it",
        kubernetes="one ReadOnlyMany volume for all pods",
    )
    return _compare_facts(ctx, ("model.",), "one checkpoint", fix)


@check(
    "C-06",
    CATEGORY,
    "NCCL is told the same on all parts",
    tier=2,
    symptoms=("Detected mixed local Net device counts across ranks",),
    needs=("C-09", "C-10"),
)
def environment_matches(ctx: CheckContext) -> CheckResult:
    """Where one part's NCCL may use InfiniBand and another's may not, they wait for each other for ever. Environment
    and nccl.conf are compared; names that are rightly local (interfaces) are left out."""
    view = _view(ctx)
    if view is None:
        return skip(NOT_RUN)
    differing = view.differences("env.")
    if not differing:
        return ok("the same on all parts")
    judge = error if any(key.removeprefix("env.").startswith(TRANSPORT) for key in differing) else warn
    return judge(_table(differing), "the same on every part", SAME_ENV_FIX)


@check(
    "C-07",
    CATEGORY,
    "settings that shape the steps are the same",
    tier=2,
    symptoms=("MISMATCH … different collective operation counts",),
    needs=("C-09", "C-10"),
)
def settings(ctx: CheckContext) -> CheckResult:
    """MAX_SEQ_LEN, block sizes and batch limits decide what is computed in which order: ranks that disagree hang in
    the first collective in which they differ."""
    return _compare_facts(ctx, ("config.",), "the same on every part", SAME_ENV_FIX)


@check("C-08", CATEGORY, "the clocks agree", tier=2, severity=Status.WARN, needs=("C-09", "C-10", "N-01"))
def clocks_in_sync(ctx: CheckContext) -> CheckResult:
    """Nothing here depends on it, but logs and dashboards of several machines can only be read together when their
    clocks agree."""
    view = _view(ctx)
    if view is None:
        return skip(NOT_RUN)
    offsets = [(abs(link.clock_offset), link.clock_error, a, b, link) for a, b, link in view.links() if link.rtt]
    if not offsets:
        return skip("no clock was compared")
    worst, margin, one, other, link = max(offsets, key=lambda entry: entry[0])
    text = f"part{other.part} is {link.clock_offset:+.3f} s (+-{margin:.3f}) from part{one.part}"
    if worst - margin > CLOCK_SECONDS:
        return warn(text, f"within {CLOCK_SECONDS:g} s", "run chrony or systemd-timesyncd on the machines")
    return ok(text)


@check(
    "S-05",
    CATEGORY,
    "NCCL can tell which parts share a machine",
    tier=2,
    symptoms=(
        "Error while attaching to shared memory segment …: No such file or directory (2)",
        "nvmlDeviceGetHandleByPciBusId() failed: Not Found",
        "failed to open CUDA IPC handle",
    ),
    needs=("C-09", "C-10"),
)
def one_machine(ctx: CheckContext) -> CheckResult:
    """NCCL takes ranks with the same host name and boot id for neighbours that share /dev/shm. Two containers with one
    name and memories of their own are not; two with different names on one machine use the network between them."""
    view = _view(ctx)
    if view is None:
        return skip(NOT_RUN)
    if not ctx.on_gpu:
        return ok("NCCL is not used")
    fix = Fix(
        host="run both parts in one container, or set another NCCL_HOSTID on each",
        docker="one container for both, or --ipc=host --pid=host --gpus all, or another -e NCCL_HOSTID on each",
        kubernetes="one pod per machine, or another NCCL_HOSTID per pod",
    )
    confused = view.hosts_sharing_nccl_id()
    if confused:
        return error(f"{' and '.join(confused[0])} look like one machine, and share no memory", "one or the other", fix)
    apart = view.separated_hosts()
    if apart:
        return warn(
            f"{' and '.join(apart[0])} are on one machine, and NCCL will use the network between them", "one part", fix
        )
    return ok("each part is a machine of its own")


def _compare_facts(
    ctx: CheckContext, prefixes: tuple[str, ...], expected: str, fix: Fix, judge: object = error
) -> CheckResult:
    view = _view(ctx)
    if view is None:
        return skip(NOT_RUN)
    differing = {key: values for prefix in prefixes for key, values in view.differences(prefix).items()}
    if not differing:
        return ok("the same on all parts")
    return (warn if judge is warn else error)(_table(differing), expected, fix)
