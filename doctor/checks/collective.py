"""Tier 3: the group that the server would form, and whether what it adds up is right and arrives in time."""

from doctor.check import CheckResult, Status, check, error, ok, skip, unknown, warn
from doctor.context import CheckContext
from doctor.host import format_bytes

CATEGORY = "collective"
# Bytes per second, each way, of one link: the generations 2 to 4, and 5 (Blackwell); NVIDIA's data sheets.
NVLINK_BYTES, NVLINK_5_BYTES = 25e9, 50e9
NOT_RUN = "--tier 3, on every part at the same time"
SLOW_SECONDS = 0.05  # of a small all-reduce: a token would take a second and more


@check(
    "X-01",
    CATEGORY,
    "an all-reduce over the plan's group is right",
    tier=3,
    symptoms=("Watchdog caught collective operation timeout", "collective all_reduce failed: …"),
    needs=("C-01", "C-02", "C-09", "N-01", "N-02", "N-08", "S-01", "G-04", "P-01"),
)
def all_reduce_is_correct(ctx: CheckContext) -> CheckResult:
    """The ranks of the plan form their group as the server would, over NCCL, or gloo on CPU, on the planned ports, and
    sum numbers whose result is known: 8 bytes, 64 KiB and 16 MiB."""
    found = ctx.collective
    if found is None:
        return skip(NOT_RUN)
    if "skipped" in found:
        return skip(found["skipped"])
    if "unasked" in found:
        return unknown(found["unasked"], "rtp-llm-doctor gang --tier 3")
    if "failure" in found:
        return error(found["failure"], "a sum", "see the first rank's message; the checks above say what it needs")
    wrong = {size: entry["wrong"] for size, entry in found["sizes"].items() if entry["wrong"]}
    if wrong:
        size, count = next(iter(wrong.items()))
        return error(f"{count} wrong numbers in {size} bytes", "none", "NCCL_P2P_DISABLE=1; see P-01")
    return ok(f"{found['backend']}: right at {', '.join(format_bytes(int(size)) for size in found['sizes'])}")


@check("X-02", CATEGORY, "an all-reduce is fast enough", tier=3, severity=Status.WARN, needs=("X-01",))
def all_reduce_is_fast(ctx: CheckContext) -> CheckResult:
    """Latency of the smallest and speed of the largest all-reduce, beside what the link should give, and what they mean
    for a token: two all-reduces per layer, each of one hidden vector. In a ring of N ranks each link carries 2 (N-1)/N
    of the bytes."""
    found = ctx.collective
    if found is None or "sizes" not in found:
        return skip(NOT_RUN)
    seconds = {int(size): float(entry["seconds"]) for size, entry in found["sizes"].items()}
    least, most = min(seconds), max(seconds)
    text = (
        f"{seconds[least] * 1e6:.0f} us for {least} B, {format_bytes(most / seconds[most])}/s for {format_bytes(most)}"
    )
    text += _beside_the_link(ctx, most / seconds[most])
    if ctx.spec:
        middle = sorted(seconds)[1]
        text += f"; about {2 * ctx.spec.num_layers * seconds[middle] * 1000:.2f} ms per token"
    if seconds[least] > SLOW_SECONDS:
        return warn(text, f"below {SLOW_SECONDS * 1000:.0f} ms", "see N-13, G-17 and L-06")
    return ok(text)


def _beside_the_link(ctx: CheckContext, rate: float) -> str:
    """`rate`: bytes per second that were summed."""
    plan, given = ctx.plan, _link(ctx)
    if plan is None or given is None:
        return "; what this link should give is not known"
    name, limit = given
    carried = rate * 2 * (plan.world_size - 1) / plan.world_size
    return f"; {format_bytes(carried)}/s over {name}, which gives {format_bytes(limit)}/s"


def _link(ctx: CheckContext) -> tuple[str, float] | None:
    """The slowest link of a ring, as this part sees it, and its bytes per second each way; None where nobody tells."""
    if ctx.plan and ctx.plan.is_multi_part and ctx.gang:
        name = ctx.gang.part_reports[ctx.plan.part].interface
        speed = next((i.speed for i in ctx.host.interfaces if i.name == name), 0)  # Mbit/s
        return (name, speed * 1e6 / 8) if speed else None
    used = ctx.used_gpus
    links = min((gpu.nvlinks[0] for gpu in used), default=0)
    if not links:
        return None
    newest = all((gpu.capability or (0, 0)) >= (10, 0) for gpu in used)
    return f"{links} NVLinks", links * (NVLINK_5_BYTES if newest else NVLINK_BYTES)
