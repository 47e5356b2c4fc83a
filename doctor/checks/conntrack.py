"""Connection tracking by the kernel's firewall."""

from doctor.check import CheckResult, Status, check, ok, skip, warn
from doctor.context import CheckContext

CATEGORY = "network"
ONE_PART = "a single part"


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
