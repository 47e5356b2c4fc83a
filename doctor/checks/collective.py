"""Tier 3: the group that the server would form, and whether what it adds up is right and arrives in time."""

from doctor.check import Outcome, Status, check, error, ok, skip, unknown, warn
from doctor.host import size_text
from doctor.node import Node

CATEGORY = "collective"
NOT_ASKED = "--tier 3, on every part at the same time"
SLOW_SECONDS = 0.05  # of a small all-reduce: a token would take a second and more


@check(
    "X-01",
    CATEGORY,
    "an all-reduce over the plan's group is right",
    tier=3,
    symptoms=("Watchdog caught collective operation timeout", "collective all_reduce failed: …"),
    needs=("C-01", "C-02", "C-09", "N-01", "N-02", "N-08", "S-01", "G-04", "P-01"),
)
def correct(node: Node) -> Outcome:
    """The ranks of the plan form their group as the server would, over NCCL, or gloo on CPU, on the planned ports, and
    sum numbers whose result is known: 8 bytes, 64 KiB and 16 MiB."""
    found = node.collective
    if found is None:
        return skip(NOT_ASKED)
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
    return ok(f"{found['backend']}: right at {', '.join(size_text(int(size)) for size in found['sizes'])}")


@check("X-02", CATEGORY, "an all-reduce is fast enough", tier=3, severity=Status.WARN, needs=("X-01",))
def fast(node: Node) -> Outcome:
    """Latency of the smallest and speed of the largest all-reduce, and what they mean for a token: two all-reduces per
    layer, each of one hidden vector."""
    found = node.collective
    if found is None or "sizes" not in found:
        return skip(NOT_ASKED)
    seconds = {int(size): float(entry["seconds"]) for size, entry in found["sizes"].items()}
    least, most = min(seconds), max(seconds)
    text = f"{seconds[least] * 1e6:.0f} us for {least} B, {size_text(most / seconds[most])}/s for {size_text(most)}"
    if node.spec:
        middle = sorted(seconds)[1]
        text += f"; about {2 * node.spec.num_layers * seconds[middle] * 1000:.2f} ms per token"
    if seconds[least] > SLOW_SECONDS:
        return warn(text, f"below {SLOW_SECONDS * 1000:.0f} ms", "see N-13, G-17 and L-06")
    return ok(text)
