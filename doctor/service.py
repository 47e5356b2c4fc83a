"""`python -m doctor.service RUN_DIR`: the doctor of a running part of several, on its planned port.

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
from doctor.examine import GANG_AWARE, errors
from doctor.gang.meeting import Meeting
from doctor.gang.run import meeting_sockets, mesh, open_meeting
from doctor.gang.view import GangView
from doctor.gang.ways import listeners
from doctor.host import Host
from doctor.node import Node
from doctor.render import Style, short
from doctor.report import Finding, Report, make_report
from doctor.runner import run_checks
from rtp_llm import log as logs
from rtp_llm.config import Config
from rtp_llm.errors import DoctorError
from rtp_llm.parallel.handover import Handover
from rtp_llm.parallel.lifeline import live_below_supervisord, run_to_exit
from rtp_llm.parallel.plan import RESPONDER
from rtp_llm.parallel.wire import listen

log = logging.getLogger("doctor.service")

# The roll call compares these as well, and its own word on them has a code of its own (69).
LEFT_TO_THE_ROLL_CALL = {"C-01", "C-02", "C-05", "C-07", "C-09", "C-11"}


def environment(config: Config) -> dict[str, str]:
    """The environment, with what flags had said laid over it."""
    given = {
        name.upper(): str(value) for name, value in config if name in config.model_fields_set and value is not None
    }
    given.pop("GANG_SECRET", None)
    return {**os.environ, **given}


async def attend(handover: Handover, node: Node) -> None:
    """Meets the other parts, judges, and answers for ever. Raises DoctorError where the part must not go on."""
    plan = handover.plan
    before = _earlier(handover.doctor_report)
    meeting = open_meeting(node, plan, errors(before), listening=False)
    responder = listen("0.0.0.0", plan.start_port + RESPONDER)
    async with listeners(plan.part, meeting.serve, responder, meeting_sockets(meeting)):
        deadline = time.monotonic() + handover.config.gang_timeout_min * 60
        await meeting.attend(mesh(node, plan), deadline, log.debug)  # the roll call says who is missing
        await asyncio.to_thread(_judge, handover, node, meeting, before)
        await asyncio.Event().wait()


def _judge(handover: Handover, node: Node, meeting: Meeting, before: list[Finding]) -> None:
    started = time.time()
    node.gang = GangView(dict(meeting.rows), handover.plan)
    again = [c for c in REGISTRY.values() if c.tier == 2 or c.id in GANG_AWARE]
    kept = [f for f in before if f.id not in {c.id for c in again}]
    report = make_report(node, [*kept, *run_checks(again, node, kept)], started=started)
    save(report, handover.doctor_report)
    _act(handover.config, report)


def _act(config: Config, report: Report) -> None:
    found = [f for f in report.checks if f.tier == 2 and f.status not in (Status.OK, Status.SKIP)]
    if not found:
        log.info("the parts reach each other and agree: %d checks", sum(f.tier == 2 for f in report.checks))
        return
    text = short(report.model_copy(update={"checks": found}), Style.of(sys.stdout)).rstrip()
    log.warning("what the doctors of all parts found:\n%s", text)
    decisive = [f.id for f in found if f.status == Status.ERROR and f.id not in LEFT_TO_THE_ROLL_CALL]
    if decisive and config.rtp_doctor == "enforce":
        raise DoctorError(f"{', '.join(decisive)}: the gang would hang; RTP_DOCTOR=warn starts it all the same")


def _earlier(path: Path) -> list[Finding]:
    """What the gate found before the part was started."""
    return Report.model_validate_json(path.read_text()).checks if path.exists() else []


def main(run_dir: Path) -> None:
    handover = Handover.load(run_dir)
    logs.setup(f"{handover.who} doctor", handover.config.log_level, style=handover.config.log_format)
    node = Node(Host(environ=environment(handover.config)), running=True)
    asyncio.run(attend(handover, node))


if __name__ == "__main__":
    live_below_supervisord(Path(sys.argv[1]))
    run_to_exit(partial(main, Path(sys.argv[1])))
