"""Whether every part takes part in the gang's examination, with a doctor of the same version."""

from collections.abc import Mapping

from doctor.check import CheckResult, Fix, Repair, check, error, ok, skip, unknown
from doctor.context import CheckContext
from doctor.gang.view import GangView

CATEGORY = "gang"
NOT_RUN = "`rtp-llm-doctor gang` on every part"


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
    view = ctx.gang
    if view is None and ctx.gang_failure:
        return unknown(f"the other parts could not be asked: {ctx.gang_failure}")
    if view is None:
        return skip(NOT_RUN)
    if view.absent:
        names = ", ".join(view.plan.describe_part(part) for part in view.absent)
        first = view.absent[0] * view.plan.local_world_size
        return error(
            f"no word from {names}{_last_attempt(view)}",
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
    view = ctx.gang
    if view is None:
        return skip(NOT_RUN)
    strangers = view.foreign_listeners()
    if strangers:
        text = "; ".join(f"part{one} -> part{other}: something else answers at {at}" for one, other, at in strangers)
        return error(text, f"the doctor of part{strangers[0][1]}", _free(*strangers[0][1:]))
    refusals = view.refusals()
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
    view = ctx.gang
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
