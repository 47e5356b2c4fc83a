"""`python -m doctor.gang_service RUN_DIR`: the doctor process of a running part. Runs only if the gang has several
parts.

It starts with the ranks. During their rendezvous it exchanges reports with the doctors of the other parts and runs the
gang checks. It ends the part with exit code 75 if they find an error because of which the ranks would hang. Afterwards
it keeps serving reports, for parts that restart and for `rtp-llm-doctor gang` on another part.
"""

import asyncio
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path

from doctor import checks as _checks  # noqa: F401  # registers all checks
from doctor.check import REGISTRY, Status
from doctor.context import CheckContext
from doctor.examine import RERUN_WITH_GANG, errors_by_id
from doctor.executor import run_checks
from doctor.gang.connections import serve_ports
from doctor.gang.gossip import GossipSession
from doctor.gang.session import greeting_sockets, open_session, probed_members
from doctor.gang.view import GangView
from doctor.host import Host
from doctor.render import Style, short
from doctor.report import Finding, Report, make_report
from rtp_llm import log as logs
from rtp_llm.config import Config
from rtp_llm.errors import DoctorError
from rtp_llm.machine.process import exit_with_supervisord, run_main
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.plan import DOCTOR_PORT_OFFSET
from rtp_llm.parallel.wire import listen

log = logging.getLogger("doctor.gang_service")

# Errors of these checks do not end the part here: the rendezvous of the ranks detects them too, and exits with 69.
CHECKED_AT_RENDEZVOUS = {"C-01", "C-02", "C-05", "C-07", "C-09", "C-11"}


def effective_environment(config: Config) -> dict[str, str]:
    """Returns the environment, plus the settings that were given as flags, as variables. Leaves out a GANG_SECRET
    flag."""
    settings = {
        name.upper(): str(value) for name, value in config if name in config.model_fields_set and value is not None
    }
    settings.pop("GANG_SECRET", None)
    return {**os.environ, **settings}


async def serve(part_spec: PartSpec, ctx: CheckContext) -> None:
    """Exchanges reports, runs the gang checks and then serves forever. Raises DoctorError if the part must stop."""
    plan = part_spec.plan
    startup_findings = _startup_findings(part_spec.doctor_report_path)
    session = open_session(ctx, plan, errors_by_id(startup_findings), listening=False)
    responder = listen("0.0.0.0", plan.start_port + DOCTOR_PORT_OFFSET)
    async with serve_ports(plan.part, session.serve, responder, greeting_sockets(session)):
        deadline = time.monotonic() + part_spec.config.gang_timeout_min * 60
        await session.run(probed_members(ctx, plan), deadline, log.debug)  # the rendezvous reports missing parts
        await asyncio.to_thread(_run_gang_checks, part_spec, ctx, session, startup_findings)
        await asyncio.Event().wait()


def _run_gang_checks(
    part_spec: PartSpec, ctx: CheckContext, session: GossipSession, startup_findings: list[Finding]
) -> None:
    started = time.time()
    ctx.gang = GangView(dict(session.part_reports), part_spec.plan)
    gang_checks = [c for c in REGISTRY.values() if c.tier == 2 or c.id in RERUN_WITH_GANG]
    kept = [f for f in startup_findings if f.id not in {c.id for c in gang_checks}]
    report = make_report(ctx, [*kept, *run_checks(gang_checks, ctx, kept)], started=started)
    report.save(part_spec.doctor_report_path)
    _enforce(part_spec.config, report)


def _enforce(config: Config, report: Report) -> None:
    """Logs the problems of the gang checks. Raises DoctorError if one is an error and RTP_DOCTOR=enforce."""
    problems = [f for f in report.problems() if f.tier == 2]
    if not problems:
        log.info("the parts reach each other and agree (%d gang checks)", sum(f.tier == 2 for f in report.checks))
        return
    text = short(report.model_copy(update={"checks": problems}), Style.for_stream(sys.stdout)).rstrip()
    log.warning("problems between the parts:\n%s", text)
    errors = [f.id for f in problems if f.status == Status.ERROR and f.id not in CHECKED_AT_RENDEZVOUS]
    if errors and config.rtp_doctor == "enforce":
        ids = ", ".join(errors)
        raise DoctorError(f"the gang would hang, because gang checks failed: {ids}; RTP_DOCTOR=warn starts it anyway")


def _startup_findings(path: Path) -> list[Finding]:
    """Returns the findings of the doctor run before this start, from its report; empty if there is none."""
    return Report.model_validate_json(path.read_text()).checks if path.exists() else []


def main(run_dir: Path) -> None:
    part_spec = PartSpec.load(run_dir)
    logs.setup(f"{part_spec.label} doctor", part_spec.config.log_level, style=part_spec.config.log_format)
    ctx = CheckContext(Host(environ=effective_environment(part_spec.config)), running=True)
    asyncio.run(serve(part_spec, ctx))


if __name__ == "__main__":
    exit_with_supervisord(Path(sys.argv[1]))
    run_main(partial(main, Path(sys.argv[1])))
