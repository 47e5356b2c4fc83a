"""One examination: which checks, in which order, with the meeting and the collective between them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from doctor.all_reduce import measure_all_reduce
from doctor.attach import is_running
from doctor.check import REGISTRY, Check, Status
from doctor.context import CheckContext
from doctor.executor import run_checks
from doctor.gang.local_errors import report_local_errors
from doctor.gang.session import exchange_reports
from doctor.host import Host
from doctor.report import Finding, Report, make_report
from rtp_llm.errors import FatalError

# Asked again once the other parts have spoken.
RERUN_WITH_GANG = ("C-01", "C-02", "G-10", "G-11")


@dataclass(frozen=True)
class RunOptions:
    """What was asked for. `wait`: seconds for other parts to come; `starting`: a part that runs is in its way."""

    tier: int = 0
    gang: bool = False
    only: list[Check] | None = None
    ignore: tuple[str, ...] = ()
    strict: bool = False
    wait: float = 30.0
    starting: bool = False


def run_doctor(host: Host, argv: Sequence[str], wanted: RunOptions, say: Callable[[str], None]) -> Report:
    """Runs it all. `say` takes progress for people."""
    started = time.time()
    ctx = CheckContext(host, argv, 1 if wanted.tier in (1, 3) else 0)
    ctx.ignored = frozenset(wanted.ignore)
    ctx.preload_with_timeouts()
    ctx.starting = wanted.starting
    ctx.running = not wanted.starting and is_running(ctx)
    checks = [c for c in (wanted.only or REGISTRY.values()) if c.tier <= wanted.tier and (c.tier != 2 or wanted.gang)]
    alone = run_checks([c for c in checks if c.tier < 2], ctx)
    findings = alone
    if wanted.gang and _can_meet(ctx):
        findings = _run_gang_checks(ctx, checks, alone, wanted, say)
    elif wanted.gang:
        _handle_missing_plan(ctx, alone, wanted, say)
    if wanted.tier >= 3:
        findings = _run_collective_checks(ctx, checks, findings)
    rest = [c for c in checks if c.id not in {f.id for f in findings}]
    findings += run_checks(rest, ctx, findings)
    order = [c.id for c in checks]
    findings.sort(key=lambda f: order.index(f.id))
    return make_report(ctx, findings, started=started, ignored=wanted.ignore, strict=wanted.strict)


def _can_meet(ctx: CheckContext) -> bool:
    """Whether the plan is what the operator meant, and names other parts: a guess would talk to the wrong ones."""
    return bool(
        ctx.plan and ctx.plan.is_multi_part and not ctx.plan_result.config_error and not ctx.parsed_config.config_errors
    )


def errors_by_id(findings: Sequence[Finding]) -> dict[str, str]:
    return {f.id: f.actual for f in findings if f.status == Status.ERROR}


def _run_gang_checks(
    ctx: CheckContext, checks: Sequence[Check], alone: list[Finding], wanted: RunOptions, say: Callable[[str], None]
) -> list[Finding]:
    assert ctx.plan
    try:
        ctx.gang = exchange_reports(ctx, ctx.plan, errors_by_id(alone), wanted.wait, say)
    except (OSError, FatalError) as error:
        ctx.gang_failure = str(error)
    again = [c for c in checks if c.tier == 2 or c.id in RERUN_WITH_GANG]
    kept = [f for f in alone if f.id not in RERUN_WITH_GANG]
    return [*kept, *run_checks(again, ctx, kept)]


def _handle_missing_plan(
    ctx: CheckContext, alone: list[Finding], wanted: RunOptions, say: Callable[[str], None]
) -> None:
    """What stands for the meeting where this part has no plan: the others hear why, and here nothing is called well."""
    single = (
        ctx.plan
        and not ctx.plan.is_multi_part
        and not ctx.plan_result.config_error
        and not ctx.parsed_config.config_errors
    )
    wrong = errors_by_id(alone)
    if single:
        return
    if not wrong.keys() - ctx.ignored:
        ctx.gang_failure = "this part has no plan of its own"
    if wrong and not ctx.running:
        try:
            report_local_errors(ctx, wrong, wanted.wait, say)
        except (OSError, FatalError) as error:
            say(f"the other parts could not be told: {error}")


def _run_collective_checks(ctx: CheckContext, checks: Sequence[Check], findings: list[Finding]) -> list[Finding]:
    """Forms the group, unless something is wrong already: then it would only wait for its time-out."""
    plan = ctx.plan
    bad = (Status.ERROR, Status.CRASH)
    wrong = [f.id for f in findings if f.status in bad and f.id not in ctx.ignored]
    if wrong:
        ctx.collective = {"skipped": f"because {wrong[0]}"}
    elif plan is None:
        ctx.collective = {"unasked": "there is no plan"}
    elif plan.world_size == 1:
        ctx.collective = {"skipped": "a single rank"}
    elif plan.is_multi_part and (ctx.gang is None or len(ctx.gang.comparable) < plan.num_parts):
        ctx.collective = {"unasked": "the parts form one group: `rtp-llm-doctor gang --tier 3` on every part"}
    else:
        address = ctx.gang.part_reports[plan.part].address if ctx.gang else "127.0.0.1"
        ctx.collective = measure_all_reduce(ctx, plan, address)
    return [*findings, *run_checks([c for c in checks if c.tier == 3], ctx, findings)]
