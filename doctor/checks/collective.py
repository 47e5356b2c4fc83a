"""Checks that an all-reduce over all ranks is correct and fast (tier 3: they run only with `--tier 3`)."""

from doctor.check import CheckResult, Reading, Status, error, ok, skip, symptoms, unknown
from doctor.checks.categories import collective_check
from doctor.context import CheckContext
from doctor.host import format_bytes

# Bytes per second in each direction of one NVLink: generations 2 to 4, and 5 (Blackwell). From NVIDIA's data sheets.
NVLINK_BYTES, NVLINK_5_BYTES = 25e9, 50e9
NOT_RUN = "needs --tier 3, on every part at the same time"
MAX_SMALL_SECONDS = 0.05  # for a small all-reduce; with two per layer a token would take a second or more


@collective_check(
    "X-01",
    "an all-reduce over all ranks is correct",
    needs=("C-01", "C-02", "C-09", "N-01", "N-02", "N-08", "S-01", "G-04", "P-01"),
)
@symptoms("Watchdog caught collective operation timeout", "collective all_reduce failed: …")
def all_reduce_is_correct(ctx: CheckContext) -> CheckResult:
    """All ranks form their process group as the server would (over NCCL, or gloo on CPU, on the server's ports) and sum
    numbers whose result is known: 8 bytes, 64 KiB and 16 MiB."""
    measured = ctx.collective
    if measured is None:
        return skip(NOT_RUN)
    if "skipped" in measured:
        return skip(measured["skipped"])
    if "unasked" in measured:
        return unknown(measured["unasked"], "rtp-llm-doctor gang --tier 3")
    if "failure" in measured:
        fix = "see the message of the first rank, and the warnings of the other checks"
        return error(measured["failure"], "a correct sum on every rank", fix)
    for size, entry in measured["sizes"].items():
        if entry["wrong"]:
            actual = f"{entry['wrong']} wrong numbers in an all-reduce of {size} bytes"
            return error(actual, "no wrong number in any all-reduce", "NCCL_P2P_DISABLE=1; see check P-01")
    sizes = ", ".join(format_bytes(int(size)) for size in measured["sizes"])
    return ok(f"{measured['backend']}: correct sums of {sizes}")


@collective_check("X-02", "an all-reduce is fast enough", severity=Status.WARN, needs=("X-01",))
def all_reduce_is_fast(ctx: CheckContext) -> CheckResult | Reading:
    """Measures the latency of the smallest all-reduce and the throughput of the largest, compares the throughput with
    the maximum of the slowest link, and predicts the time per token: two all-reduces per layer, each of one hidden
    vector. In a ring of N ranks each link carries 2 (N-1)/N of the bytes."""
    if ctx.collective is None or "sizes" not in ctx.collective:
        return skip(NOT_RUN)
    seconds = {int(size): float(entry["seconds"]) for size, entry in ctx.collective["sizes"].items()}
    small, large = min(seconds), max(seconds)
    rate = large / seconds[large]
    actual = f"{seconds[small] * 1e6:.0f} us for {small} B, {format_bytes(rate)}/s for {format_bytes(large)}"
    actual += _compare_with_link(ctx, rate)
    if ctx.spec:
        token_seconds = 2 * ctx.spec.num_layers * seconds[sorted(seconds)[1]]
        actual += f"; about {token_seconds * 1000:.2f} ms per token"
    expected = f"below {MAX_SMALL_SECONDS * 1000:.0f} ms"
    return Reading(seconds[small], actual, expected, "see N-13, G-17 and L-06", maximum=MAX_SMALL_SECONDS)


def _compare_with_link(ctx: CheckContext, rate: float) -> str:
    """Returns text that compares the throughput of an all-reduce with the maximum of the slowest link between ranks.

    `rate`: bytes reduced per second.
    """
    link = _slowest_link(ctx)
    if ctx.plan is None or link is None:
        return "; the maximum of the slowest link is not known"
    name, max_rate = link
    carried = rate * 2 * (ctx.plan.world_size - 1) / ctx.plan.world_size
    return f"; {format_bytes(carried)}/s over {name}, at most {format_bytes(max_rate)}/s"


def _slowest_link(ctx: CheckContext) -> tuple[str, float] | None:
    """Returns (name, bytes per second in each direction) of the slowest link in the ring of ranks; None if it is not
    known."""
    if ctx.plan and ctx.plan.is_multi_part and ctx.gang:
        name = ctx.gang.part_reports[ctx.plan.part].interface
        speed = next((i.speed for i in ctx.host.interfaces if i.name == name), 0)  # Mbit/s
        return (name, speed * 1e6 / 8) if speed else None
    num_links = min((gpu.nvlinks[0] for gpu in ctx.used_gpus), default=0)
    if not num_links:
        return None
    is_generation_5 = all((gpu.capability or (0, 0)) >= (10, 0) for gpu in ctx.used_gpus)
    return f"{num_links} NVLinks", num_links * (NVLINK_5_BYTES if is_generation_5 else NVLINK_BYTES)
