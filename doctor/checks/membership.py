"""Checks that every part responds, with a compatible doctor and without errors."""

from doctor import fixes
from doctor.check import CheckResult, Repair, check, error, ok, skip, symptoms, unknown
from doctor.checks.categories import NOT_RUN, format_differences, gang_check
from doctor.context import CheckContext
from doctor.gang.view import GangView


@check("C-09", "every part responds", category="gang", tier=2, needs=("M-14", "M-13", "C-01", "C-02"))
@symptoms("Timed out after … seconds waiting for clients", "waiting for part… (…rank…", "missing part… (…rank…")
def parts_respond(ctx: CheckContext) -> CheckResult:
    """If a part does not respond, its machine is down, its container is not started, or none of its ports can be
    reached. The doctors of all parts must run at the same time."""
    view = ctx.gang
    if view is None:
        failure = ctx.gang_failure
        return unknown(f"the parts could not exchange reports: {failure}") if failure else skip(NOT_RUN)
    if view.absent:
        names = ", ".join(view.plan.describe_part(part) for part in view.absent)
        fix = fixes.start_part(view.absent[0] * view.plan.local_world_size)
        return error(f"no response from {names}{_last_attempt(view)}", "a response from every part", fix)
    return ok(f"all {view.plan.num_parts} parts responded")


def _last_attempt(view: GangView) -> str:
    """Returns how the last connections to the absent parts failed, as text in parentheses; empty if there were none."""
    texts = {
        "refused": "refuses connections: no process listens",
        "timeout": "does not respond: the machine is down, or a firewall drops packets",
    }
    attempts = {
        f"port {port} {texts.get(outcome, outcome)}"
        for part_report in view.part_reports.values()
        for part in view.absent
        for port, outcome in (part_report.links[part].ports if part in part_report.links else {}).items()
    }
    return f" ({'; '.join(sorted(attempts))})" if attempts else ""


@gang_check("C-10", "the doctors of all parts are compatible", needs=("C-09",))
def doctors_are_compatible(ctx: CheckContext, view: GangView) -> CheckResult:
    """Doctors can exchange reports only if all parts run the same release, which is not so during a rolling update, and
    have the same GANG_SECRET. The check also fails if another program listens on the port of a part's doctor."""
    listeners = view.foreign_listeners()
    if listeners:
        actual = "; ".join(f"part{a} -> part{b}: another program answers at {address}" for a, b, address in listeners)
        _, part, address = listeners[0]
        port = int(address.rpartition(":")[2])
        return error(actual, f"an answer from the doctor of part{part}", fixes.free_doctor_port(part, port))
    refusals, differences = view.protocol_errors(), view.differences("doctor.")
    if refusals or differences:
        actual = refusals[0] if refusals else format_differences(differences)
        fix = "use the same image, by digest, and the same GANG_SECRET on every part"
        return error(actual, "the same release of rtp-llm and the same GANG_SECRET on all parts", fix)
    return ok(f"all parts have version {next(iter(view.part_reports.values())).facts['version.rtp-llm']}")


@gang_check("C-11", "no check fails on another part", repair=Repair.NONE)
def no_errors_on_other_parts(ctx: CheckContext, view: GangView) -> CheckResult:
    """Each part reports the errors of its own checks to the others, so that the cause is visible on every part."""
    local_part = ctx.plan.part if ctx.plan else -1
    errors = [
        (part, f"part{part}: {id} {text}")
        for part, part_report in sorted(view.part_reports.items())
        for id, text in part_report.problems.items()
    ]
    remote = [text for part, text in errors if part != local_part]
    if remote:
        return error("; ".join(remote), "no errors on any part", "see the output of the doctor on that part")
    return ok("the other parts report no error" if errors else "no part reports an error")
