"""Checks that software, checkpoint, settings and clocks are the same on all parts."""

from doctor import fixes
from doctor.check import CheckResult, Reading, Status, error, ok, skip, symptoms, warn
from doctor.checks.alignment import alignment
from doctor.checks.categories import format_differences, gang_check
from doctor.context import CheckContext
from doctor.fixes import Fix
from doctor.gang.view import GangView

MAX_CLOCK_OFFSET_SECONDS = 1.0
SAME_IMAGE = "the same image on every part, by digest and not by tag"
SAME = "the same on all parts"
# Settings that select NCCL's transport: if they differ, ranks wait for each other on different transports.
TRANSPORT = (
    *("NCCL_IB_DISABLE", "NCCL_NET", "NCCL_NET_PLUGIN", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_ALGO"),
    *("NCCL_PROTO", "NCCL_SOCKET_FAMILY", "NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE", "NCCL_MNNVL_ENABLE"),
)


def same_facts_check(
    id: str,
    title: str,
    explanation: str,
    *,
    prefix: str,
    expected: str,
    fix: Fix | str,
    seen_as: tuple[str, ...] = (),
    needs: tuple[str, ...] = ("C-09", "C-10"),
) -> None:
    """Registers a check that fails unless all facts whose name begins with `prefix` are equal on all parts.

    Facts are named values, such as "version.torch", that each part reports to the others (doctor/gang/facts.py).

    `explanation`: the check's docstring. `expected`, `fix`: texts of the error. `seen_as`: texts that appear in a log
    if the problem exists.
    """

    def run(ctx: CheckContext, view: GangView) -> CheckResult:
        differences = view.differences(prefix)
        return error(format_differences(differences), expected, fix) if differences else ok(SAME)

    run.__doc__ = explanation
    gang_check(id, title, needs=needs)(symptoms(*seen_as)(run))


same_facts_check(
    "C-03",
    "all parts use the same NCCL version",
    "NCCL refuses to connect ranks of different versions.",
    prefix="gpu.nccl",
    expected="one NCCL version",
    fix=SAME_IMAGE,
    seen_as=("Mismatched NCCL version detected : rank … version … rank … version …",),
)


@gang_check("C-04", "all parts use the same software versions")
def same_software(ctx: CheckContext, view: GangView) -> CheckResult:
    """Different versions of torch compute slightly different numbers, and different versions of this server may use
    different protocols. Different drivers are only a warning."""
    versions, drivers = view.differences("version."), view.differences("gpu.driver")
    if versions:
        return error(format_differences(versions), "the same software versions on all parts", SAME_IMAGE)
    same_driver = "the same driver on every machine"
    return warn(format_differences(drivers), "one driver version on all parts", same_driver) if drivers else ok(SAME)


same_facts_check(
    "C-05",
    "all parts have the same checkpoint",
    """Ranks with slices of different checkpoints compute garbage, or fail with a shape mismatch. The check compares
    config.json and the headers of all files.""",
    prefix="model.",
    expected="one checkpoint",
    fix=fixes.SAME_CHECKPOINT,
    needs=("C-09", "C-10", "M-04", "M-05", "M-06"),
)


@gang_check("C-06", "all parts have the same NCCL settings")
@symptoms("Detected mixed local Net device counts across ranks")
def same_nccl_settings(ctx: CheckContext, view: GangView) -> CheckResult:
    """If NCCL uses InfiniBand on one part and not on another, the two wait for each other forever. The check compares
    the environment and nccl.conf, except for settings that may differ between parts (interface names)."""
    differences = view.differences("env.")
    if not differences:
        return ok(SAME)
    is_transport = any(key.removeprefix("env.").startswith(TRANSPORT) for key in differences)
    make_result = error if is_transport else warn
    return make_result(format_differences(differences), "the same on every part", fixes.SAME_ENVIRONMENT)


@gang_check("C-07", "all parts have the same engine settings")
@symptoms("MISMATCH … different collective operation counts")
def same_engine_settings(ctx: CheckContext, view: GangView) -> CheckResult:
    """MAX_SEQ_LEN, block sizes and batch limits determine the order and size of the collectives: ranks with different
    values hang in the first collective that does not match."""
    differences = view.differences("config.")
    if differences:
        return error(format_differences(differences), "the same on every part", alignment(differences))
    return ok(SAME)


@gang_check("C-08", "the clocks are synchronised", severity=Status.WARN, needs=("C-09", "C-10", "N-01"))
def clocks_in_sync(ctx: CheckContext, view: GangView) -> CheckResult | Reading:
    """The server itself works without synchronised clocks, but logs and metrics of several machines can be compared
    only with them."""
    measured = [(source, target, link) for source, target, link in view.links() if link.rtt]
    if not measured:
        return skip("no part could compare its clock with that of another part")
    source, target, link = max(measured, key=lambda entry: abs(entry[2].clock_offset))
    return Reading(
        abs(link.clock_offset) - link.clock_error,
        f"the clock of part{target.part} differs from part{source.part}'s by {link.clock_offset:+.3f} s"
        f" (+-{link.clock_error:.3f})",
        f"within {MAX_CLOCK_OFFSET_SECONDS:g} s",
        "run chrony or systemd-timesyncd on the machines",
        maximum=MAX_CLOCK_OFFSET_SECONDS,
    )
