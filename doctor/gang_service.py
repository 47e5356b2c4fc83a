"""`python -m doctor.gang_service RUN_DIR`: the doctor of a running part of several, on its planned port.

Started with the ranks: while they call the roll, it meets the doctors of the other parts, and ends the part with exit
code 75 where they find something that the ranks would only hang on. Then it stays and answers, so that a part that is
started again, or an operator's `rtp-llm-doctor gang`, finds somebody to talk to.
"""

import asyncio
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path

from doctor import checks  # noqa: F401  # registers them
from doctor.check import REGISTRY, Status
from doctor.cli import save
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

# The rendezvous compares these as well, and reports a difference with its own exit code (69).
CHECKED_AT_RENDEZVOUS = {"C-01", "C-02", "C-05", "C-07", "C-09", "C-11"}


def environment(config: Config) -> dict[str, str]:
    """The environment, with what flags had said laid over it."""
    given = {
        name.upper(): str(value) for name, value in config if name in config.model_fields_set and value is not None
    }
    given.pop("GANG_SECRET", None)
    return {**os.environ, **given}


async def serve(part_spec: PartSpec, ctx: CheckContext) -> None:
    """Meets the other parts, judges, and answers for ever. Raises DoctorError where the part must not go on."""
    plan = part_spec.plan
    before = _startup_findings(part_spec.doctor_report_path)
    session = open_session(ctx, plan, errors_by_id(before), listening=False)
    responder = listen("0.0.0.0", plan.start_port + DOCTOR_PORT_OFFSET)
    async with serve_ports(plan.part, session.serve, responder, greeting_sockets(session)):
        deadline = time.monotonic() + part_spec.config.gang_timeout_min * 60
        await session.run(probed_members(ctx, plan), deadline, log.debug)  # the rendezvous reports missing parts
        await asyncio.to_thread(_run_gang_checks, part_spec, ctx, session, before)
        await asyncio.Event().wait()


def _run_gang_checks(part_spec: PartSpec, ctx: CheckContext, session: GossipSession, before: list[Finding]) -> None:
    started = time.time()
    ctx.gang = GangView(dict(session.part_reports), part_spec.plan)
    again = [c for c in REGISTRY.values() if c.tier == 2 or c.id in RERUN_WITH_GANG]
    kept = [f for f in before if f.id not in {c.id for c in again}]
    report = make_report(ctx, [*kept, *run_checks(again, ctx, kept)], started=started)
    save(report, part_spec.doctor_report_path)
    _enforce(part_spec.config, report)


def _enforce(config: Config, report: Report) -> None:
    found = [f for f in report.checks if f.tier == 2 and f.status not in (Status.OK, Status.SKIP)]
    if not found:
        log.info("the parts reach each other and agree: %d checks", sum(f.tier == 2 for f in report.checks))
        return
    text = short(report.model_copy(update={"checks": found}), Style.for_stream(sys.stdout)).rstrip()
    log.warning("what the doctors of all parts found:\n%s", text)
    decisive = [f.id for f in found if f.status == Status.ERROR and f.id not in CHECKED_AT_RENDEZVOUS]
    if decisive and config.rtp_doctor == "enforce":
        raise DoctorError(f"{', '.join(decisive)}: the gang would hang; RTP_DOCTOR=warn starts it all the same")


def _startup_findings(path: Path) -> list[Finding]:
    """What the gate found before the part was started."""
    return Report.model_validate_json(path.read_text()).checks if path.exists() else []


def main(run_dir: Path) -> None:
    part_spec = PartSpec.load(run_dir)
    logs.setup(f"{part_spec.label} doctor", part_spec.config.log_level, style=part_spec.config.log_format)
    ctx = CheckContext(Host(environ=environment(part_spec.config)), running=True)
    asyncio.run(serve(part_spec, ctx))


if __name__ == "__main__":
    exit_with_supervisord(Path(sys.argv[1]))
    run_main(partial(main, Path(sys.argv[1])))
