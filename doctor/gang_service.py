"""The doctor process of a running part. Runs only if the gang has several parts.

It starts with the ranks. During their rendezvous it exchanges reports with the doctors of the other parts and runs the
gang checks. It ends the part with exit code 75 if they find an error that would make the ranks hang. Afterwards it
keeps serving reports, for parts that restart and for `rtp-llm-doctor gang` on another part.
"""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from doctor import checks as _checks  # noqa: F401  # registers all checks
from doctor.check import REGISTRY, Check, Status
from doctor.checks.alignment import alignment
from doctor.checks.categories import format_differences
from doctor.context import CheckContext
from doctor.examine import errors_by_id, uses_all_reports
from doctor.executor import run_checks
from doctor.gang.connections import serve_ports
from doctor.gang.gossip import GossipSession
from doctor.gang.part_report import LinkResult
from doctor.gang.session import greeting_sockets, open_session, probed_members
from doctor.gang.view import GangView
from doctor.host import Host
from doctor.render import Style, problem_lines
from doctor.report import Finding, Report, make_report
from rtp_llm import files
from rtp_llm import log as logs
from rtp_llm.config import SECRET_FIELDS, Config
from rtp_llm.errors import DoctorError, FatalError, GangError
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.plan import DOCTOR_PORT_OFFSET, PlannedPort
from rtp_llm.parallel.ports import listen_as_planned

log = logging.getLogger("doctor.gang_service")

# Errors of these checks do not end the part here: the rendezvous of the ranks detects them too, and exits with 69.
CHECKED_AT_RENDEZVOUS = {"C-01", "C-02", "C-05", "C-07", "C-09", "C-10", "C-11"}
GANG_CHECKS = [check for check in REGISTRY.values() if uses_all_reports(check)]
# Checks that compare what the parts report; they need neither final reports nor measured links.
COMPARISONS = ("C-01", "C-02", "C-03", "C-04", "C-05", "C-06", "C-07", "C-10", "C-11")
SHARED_FACTS = ("plan.", "members.", "model.", "config.")  # what the rendezvous compares as well
WATCH_SECONDS = 1.0
DISAGREE_SECONDS = 6.0  # the rendezvous ends parts that disagree within 2 s; these have not reached it


def effective_environment(config: Config) -> dict[str, str]:
    """Returns this process's environment variables, plus a variable for each setting that the server got as a
    command-line flag, so that the checks see the same settings.
    """
    names = config.model_fields_set - set(SECRET_FIELDS)
    settings = {name.upper(): str(value) for name, value in config if name in names and value is not None}
    return {**os.environ, **settings}


async def serve(part_spec: PartSpec, ctx: CheckContext) -> None:
    """Runs the doctor process of one part: exchanges reports with the other parts, runs the gang checks and then serves
    the reports until it is stopped.

    Raises FatalError, which ends the part, if the doctor's port is in use or, with RTP_DOCTOR=enforce, if the parts
    disagree or a gang check finds an error that would make the ranks hang.
    """
    plan = part_spec.plan
    startup_findings = _startup_findings(part_spec.doctor_report_path)
    session = open_session(ctx, plan, errors_by_id(startup_findings), listening=False, persistent=True)
    port, purpose = plan.start_port + DOCTOR_PORT_OFFSET, f"doctor (START_PORT + {DOCTOR_PORT_OFFSET})"
    responder = listen_as_planned(PlannedPort(port, purpose))
    async with serve_ports(plan.part, session.serve, responder, greeting_sockets(session)):
        deadline = time.monotonic() + part_spec.config.gang_timeout_min * 60
        exchange = asyncio.create_task(session.run(probed_members(ctx, plan), deadline, log.debug))
        examiner = _Examiner(part_spec, ctx, session, startup_findings)
        while not exchange.done():  # a part that disagrees may never send its final report
            await asyncio.wait({exchange}, timeout=WATCH_SECONDS)
            await examiner.enforce(examiner.compare)
        exchange.result()
        await examiner.enforce(examiner.conclude)
        while True:  # a part may restart with other settings
            await asyncio.sleep(WATCH_SECONDS)
            await examiner.enforce(examiner.compare)


class _Examiner:
    """Runs gang checks on the reports that have arrived, and logs each problem once."""

    def __init__(self, part_spec: PartSpec, ctx: CheckContext, session: GossipSession, startup_findings: list[Finding]):
        self.part_spec, self.ctx, self.session = part_spec, ctx, session
        self._findings = startup_findings  # the latest of each check
        self._has_concluded = False
        self._evidence: object = None
        self._logged = ""
        self._disagree_since = 0.0
        self._unconfirmed: list[int] = []

    async def enforce(self, examine: Callable[[], None]) -> None:
        """Runs `compare` or `conclude`. Raises its FatalError only if the error recurs with reports that came directly
        from each part's own address: without GANG_SECRET, reports that other parts pass on can be forged.
        """
        try:
            await asyncio.to_thread(examine)
        except FatalError as error:
            unconfirmed = await self.session.confirm(self.ctx.peers)
            if not unconfirmed:
                await asyncio.to_thread(examine)
            elif unconfirmed != self._unconfirmed:
                parts = ", ".join(f"part{part}" for part in unconfirmed)
                text = "%s sent a report but does not confirm it at its address, so this part goes on: %s"
                log.warning(text, parts, error)
            self._unconfirmed = unconfirmed

    def compare(self) -> None:
        """Compares the reports received so far, if they have changed. They need not be final or contain measurements of
        links: once they all are final, runs the checks of links again as well.

        Raises GangError if RTP_DOCTOR=enforce and the parts disagree for DISAGREE_SECONDS, unless gang.json (the status
        of the gang) contains ranks: then they have met at the coordinator, which ends parts that disagree.
        """
        evidence = self._read_evidence()
        if evidence != self._evidence:
            is_first, self._evidence = self._evidence is None, evidence
            is_final = all(report.probing_done for report in self.session.known_reports().values())
            all_again = self._has_concluded and is_final
            report = self._run(GANG_CHECKS if all_again else [REGISTRY[id] for id in COMPARISONS])
            if not is_first or report.problems():
                self._log(report)
        assert self.ctx.gang
        differences = {k: v for prefix in SHARED_FACTS for k, v in self.ctx.gang.differences(prefix).items()}
        if not differences or files.read_state(self.part_spec.gang_status_path).get("ranks"):
            self._disagree_since = 0.0
            return
        self._disagree_since = self._disagree_since or time.monotonic()
        is_enforced = self.part_spec.config.rtp_doctor == "enforce"
        if is_enforced and time.monotonic() - self._disagree_since > DISAGREE_SECONDS:
            raise GangError(
                f"the parts of the gang disagree: {format_differences(differences)}; fix:\n{alignment(differences)}"
            )

    def conclude(self) -> None:
        """Runs all gang checks on the final reports. Raises DoctorError if one finds an error that would make the ranks
        hang, and RTP_DOCTOR=enforce.
        """
        report = self._run(GANG_CHECKS)
        self._has_concluded = True
        problems = self._log(report)
        if not problems:
            log.info("the parts reach each other and agree (%d gang checks)", sum(f.tier == 2 for f in report.checks))
        errors = [f.id for f in problems if f.status == Status.ERROR and f.id not in CHECKED_AT_RENDEZVOUS]
        if errors and self.part_spec.config.rtp_doctor == "enforce":
            ids = ", ".join(errors)
            raise DoctorError(
                f"the gang would hang, because gang checks failed: {ids}; RTP_DOCTOR=warn starts it anyway"
            )

    def _read_evidence(self) -> object:
        """Returns the data that `compare` uses, to detect whether it has changed."""
        return [
            (
                part,
                report.run_id,
                report.probing_done,
                report.problems,
                n,
                link.protocol_error,
                link.wrong_part,
                link.foreign_address,
            )
            for part, report in sorted(self.session.known_reports().items())
            for n, link in [(part, LinkResult()), *report.links.items()]
        ]

    def _run(self, gang_checks: list[Check]) -> Report:
        """Runs the checks and saves the report, which /doctor and /health show. Other checks keep their findings."""
        started = time.time()
        self.ctx.gang = GangView(self.session.known_reports(), self.part_spec.plan)
        kept = [f for f in self._findings if f.id not in {c.id for c in gang_checks}]
        self._findings = [*kept, *run_checks(gang_checks, self.ctx, kept)]
        report = make_report(self.ctx, self._findings, started=started)
        report.save(self.part_spec.doctor_report_path)
        return report

    def _log(self, report: Report) -> list[Finding]:
        """Logs the problems between the parts with their fixes, unless they were logged before. Returns them."""
        problems = [f for f in report.problems() if uses_all_reports(f)]
        text = problem_lines(report.model_copy(update={"checks": problems}), Style.for_stream(sys.stdout)).rstrip()
        if problems and text != self._logged:
            log.warning("problems between the parts:\n%s", text)
        elif self._logged and not problems:
            log.info("the parts no longer disagree")
        self._logged = text if problems else ""
        return problems


def _startup_findings(path: Path) -> list[Finding]:
    """Returns the findings of the doctor run before this start, from its report; empty if there is none."""
    return Report.model_validate_json(path.read_text()).checks if path.exists() else []


def main(run_dir: Path) -> None:
    part_spec = PartSpec.load(run_dir)
    logs.setup(f"{part_spec.label} doctor", part_spec.config.log_level, style=part_spec.config.log_format)
    ctx = CheckContext(Host(environ=effective_environment(part_spec.config)), running=True)
    asyncio.run(serve(part_spec, ctx))
