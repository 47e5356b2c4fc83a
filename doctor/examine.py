"""Runs all selected checks and builds the report: checks of this part, gang checks (tier 2), all-reduce (tier 3)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from doctor.all_reduce import measure_all_reduce
from doctor.attach import describe_running, is_running, running_part
from doctor.check import REGISTRY, Check, Status
from doctor.context import CheckContext
from doctor.executor import run_checks
from doctor.gang.local_errors import report_local_errors, say_farewell
from doctor.gang.session import exchange_reports
from doctor.host import Host
from doctor.report import Finding, Report, make_report
from rtp_llm.errors import FatalError
from rtp_llm.parallel.plan import Plan

# These checks of tier 0 run again when the reports of the other parts are known, and then compare all parts.
RERUN_WITH_GANG = ("C-01", "C-02", "G-10", "G-11")
FAREWELL_SECONDS = 5.0  # a part that starts at the same time has its doctor listening by then


@dataclass(frozen=True)
class RunOptions:
    """Options of the doctor's command line.

    `tier`: the highest tier of checks to run, 0 to 3. `gang`: exchange reports with the other parts. `only`: checks to
    run, None for all. `ignore`: ids of checks whose errors count as warnings. `strict`: exit with 1 on warnings.
    `wait`: seconds to wait for other parts. `starting`: the server starts after this run, so a part that already uses
    its ports is an error.
    """

    tier: int = 0
    gang: bool = False
    only: list[Check] | None = None
    ignore: tuple[str, ...] = ()
    strict: bool = False
    wait: float = 30.0
    starting: bool = False


def run_doctor(host: Host, argv: Sequence[str], options: RunOptions, on_progress: Callable[[str], None]) -> Report:
    """Runs the checks that `options` select, and returns the report.

    `argv`: the server's command-line flags. `on_progress`: called with each message to show to the user during the run.
    """
    started = time.time()
    ctx = CheckContext(host, argv, 1 if options.tier in (1, 3) else 0)
    ctx.ignored = frozenset(options.ignore)
    ctx.preload_with_timeouts()
    ctx.starting = options.starting
    ctx.running = not options.starting and is_running(ctx)
    if ctx.running and (part_spec := running_part(ctx.config.start_port)):
        on_progress(f"{describe_running(part_spec)}; see rtp-llm-doctor attach --run-dir {part_spec.run_dir}")
    checks = [
        c for c in (options.only or REGISTRY.values()) if c.tier <= options.tier and (c.tier != 2 or options.gang)
    ]
    findings = run_checks([c for c in checks if c.tier < 2], ctx)
    if options.gang:
        plan = _configured_plan(ctx)
        if plan is None:
            _handle_missing_plan(ctx, findings, options, on_progress)
        elif plan.is_multi_part:
            findings = _run_gang_checks(ctx, plan, checks, findings, options, on_progress)
    if options.tier >= 3:
        findings = _run_collective_checks(ctx, checks, findings)
    finished = {f.id for f in findings}
    findings += run_checks([c for c in checks if c.id not in finished], ctx, findings)
    order = [c.id for c in checks]
    findings.sort(key=lambda f: order.index(f.id))
    if options.starting:
        _say_farewell(ctx, errors_by_id(findings), on_progress)
    return make_report(ctx, findings, started=started, ignored=options.ignore, strict=options.strict)


def _configured_plan(ctx: CheckContext) -> Plan | None:
    """Returns the plan of the gang (its parts, their addresses and ranks), or None if settings are invalid.

    With invalid settings the plan is a guess: its addresses may be wrong, and no report may be sent to them.
    """
    return None if ctx.plan_result.config_error or ctx.parsed_config.config_errors else ctx.plan


def errors_by_id(findings: Sequence[Finding]) -> dict[str, str]:
    return {f.id: f.actual for f in findings if f.status == Status.ERROR}


def _run_gang_checks(
    ctx: CheckContext,
    plan: Plan,
    checks: Sequence[Check],
    local_findings: list[Finding],
    options: RunOptions,
    on_progress: Callable[[str], None],
) -> list[Finding]:
    try:
        ctx.gang = exchange_reports(ctx, plan, errors_by_id(local_findings), options.wait, on_progress)
    except (OSError, FatalError) as error:
        ctx.gang_failure = str(error)
    gang_checks = [c for c in checks if uses_all_reports(c)]
    kept = [f for f in local_findings if f.id not in RERUN_WITH_GANG]
    return [*kept, *run_checks(gang_checks, ctx, kept)]


def uses_all_reports(item: Check | Finding) -> bool:
    """Returns whether a check, or the check of a finding, uses the reports of all parts."""
    return item.tier == 2 or item.id in RERUN_WITH_GANG


def _say_farewell(ctx: CheckContext, errors: dict[str, str], on_progress: Callable[[str], None]) -> None:
    """Tells the other parts the errors because of which this part will not start."""
    is_refused = ctx.config.rtp_doctor == "enforce" or _configured_plan(ctx) is None
    if errors and is_refused:
        try:
            say_farewell(ctx, errors, FAREWELL_SECONDS)
        except (OSError, FatalError) as error:
            on_progress(f"cannot tell the other parts: {error}")


def _handle_missing_plan(
    ctx: CheckContext, local_findings: list[Finding], options: RunOptions, on_progress: Callable[[str], None]
) -> None:
    """Sends this part's errors to the other parts, because it has no valid plan. No gang check passes then."""
    errors = errors_by_id(local_findings)
    if not errors.keys() - ctx.ignored:
        ctx.gang_failure = "this part has no valid plan"
    if errors and not ctx.running:
        try:
            report_local_errors(ctx, errors, options.wait, on_progress)
        except (OSError, FatalError) as error:
            on_progress(f"cannot send the errors to the other parts: {error}")


def _run_collective_checks(ctx: CheckContext, checks: Sequence[Check], findings: list[Finding]) -> list[Finding]:
    """Runs an all-reduce and the checks of its result. Skips it if a check has failed, since the process group would
    only wait for its timeout."""
    plan = ctx.plan
    failed = [f.id for f in findings if f.status in (Status.ERROR, Status.CRASH) and f.id not in ctx.ignored]
    if failed:
        ctx.collective = {"skipped": f"not run, because {failed[0]} did not pass"}
    elif plan is None:
        ctx.collective = {"unasked": "the settings give no valid plan of ranks and addresses"}
    elif plan.world_size == 1:
        ctx.collective = {"skipped": "there is only one rank"}
    elif plan.is_multi_part and (ctx.gang is None or len(ctx.gang.comparable) < plan.num_parts):
        ctx.collective = {"unasked": "all parts must take part: run `rtp-llm-doctor gang --tier 3` on every part"}
    else:
        address = ctx.gang.part_reports[plan.part].address if ctx.gang else "127.0.0.1"
        ctx.collective = measure_all_reduce(ctx, plan, address)
    return [*findings, *run_checks([c for c in checks if c.tier == 3], ctx, findings)]
