"""Check of the kernel's connection tracking table, which firewalls and NAT use."""

from doctor.check import CheckResult, Reading, Status, ok
from doctor.checks.categories import network_check
from doctor.checks.preconditions import MULTI_PART
from doctor.context import CheckContext

MAX_FILL_RATIO = 0.9


@network_check(
    "N-18", "the connection tracking table has free entries", severity=Status.WARN, preconditions=(MULTI_PART,)
)
def conntrack_has_free_entries(ctx: CheckContext) -> CheckResult | Reading:
    """A firewall that tracks connections drops new ones when its table is full, and forgets idle ones. The heartbeat of
    every rank keeps this server's own connections alive."""
    count = ctx.host.read_int("/proc/sys/net/netfilter/nf_conntrack_count")
    capacity = ctx.host.read_int("/proc/sys/net/netfilter/nf_conntrack_max")
    if count is None or not capacity:
        return ok("the kernel does not track connections")
    actual, fix = f"{count} of {capacity} tracked connections", f"sysctl net.netfilter.nf_conntrack_max={2 * capacity}"
    expected = f"at most {MAX_FILL_RATIO:.0%} of the table used"
    return Reading(count, actual, expected, fix, maximum=MAX_FILL_RATIO * capacity)
