"""One examination: which checks, in which order, with the meeting and the collective between them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from doctor.attach import is_running
from doctor.check import REGISTRY, Check, Status
from doctor.collective import measure
from doctor.gang.confession import confess
from doctor.gang.run import meet
from doctor.host import Host
from doctor.node import Node
from doctor.report import Finding, Report, make_report
from doctor.runner import run_checks
from rtp_llm.errors import FatalError

# Asked again once the other parts have spoken.
GANG_AWARE = ("C-01", "C-02", "G-10", "G-11")


@dataclass(frozen=True)
class Examination:
    """What was asked for. `wait`: seconds for other parts to come; `starting`: a part that runs is in its way."""

    tier: int = 0
    gang: bool = False
    only: list[Check] | None = None
    ignore: tuple[str, ...] = ()
    strict: bool = False
    wait: float = 30.0
    starting: bool = False


def examine(host: Host, argv: Sequence[str], wanted: Examination, say: Callable[[str], None]) -> Report:
    """Runs it all. `say` takes progress for people."""
    started = time.time()
    node = Node(host, argv, 1 if wanted.tier in (1, 3) else 0)
    node.ignored = frozenset(wanted.ignore)
    node.give_up_what_hangs()
    node.starting = wanted.starting
    node.running = not wanted.starting and is_running(node)
    checks = [c for c in (wanted.only or REGISTRY.values()) if c.tier <= wanted.tier and (c.tier != 2 or wanted.gang)]
    alone = run_checks([c for c in checks if c.tier < 2], node)
    findings = alone
    if wanted.gang and _can_meet(node):
        findings = _together(node, checks, alone, wanted, say)
    elif wanted.gang:
        _apart(node, alone, wanted, say)
    if wanted.tier >= 3:
        findings = _collectively(node, checks, findings)
    rest = [c for c in checks if c.id not in {f.id for f in findings}]
    findings += run_checks(rest, node, findings)
    order = [c.id for c in checks]
    findings.sort(key=lambda f: order.index(f.id))
    return make_report(node, findings, started=started, ignored=wanted.ignore, strict=wanted.strict)


def _can_meet(node: Node) -> bool:
    """Whether the plan is what the operator meant, and names other parts: a guess would talk to the wrong ones."""
    return bool(node.plan and node.plan.spans_parts and not node.planned.fault and not node.settings.faults)


def errors(findings: Sequence[Finding]) -> dict[str, str]:
    return {f.id: f.actual for f in findings if f.status == Status.ERROR}


def _together(
    node: Node, checks: Sequence[Check], alone: list[Finding], wanted: Examination, say: Callable[[str], None]
) -> list[Finding]:
    assert node.plan
    try:
        node.gang = meet(node, node.plan, errors(alone), wanted.wait, say)
    except (OSError, FatalError) as error:
        node.gang_failure = str(error)
    again = [c for c in checks if c.tier == 2 or c.id in GANG_AWARE]
    kept = [f for f in alone if f.id not in GANG_AWARE]
    return [*kept, *run_checks(again, node, kept)]


def _apart(node: Node, alone: list[Finding], wanted: Examination, say: Callable[[str], None]) -> None:
    """What stands for the meeting where this part has no plan: the others hear why, and here nothing is called well."""
    single = node.plan and not node.plan.spans_parts and not node.planned.fault and not node.settings.faults
    wrong = errors(alone)
    if single:
        return
    if not wrong.keys() - node.ignored:
        node.gang_failure = "this part has no plan of its own"
    if wrong and not node.running:
        try:
            confess(node, wrong, wanted.wait, say)
        except (OSError, FatalError) as error:
            say(f"the other parts could not be told: {error}")


def _collectively(node: Node, checks: Sequence[Check], findings: list[Finding]) -> list[Finding]:
    """Forms the group, unless something is wrong already: then it would only wait for its time-out."""
    plan = node.plan
    bad = (Status.ERROR, Status.CRASH)
    wrong = [f.id for f in findings if f.status in bad and f.id not in node.ignored]
    if wrong:
        node.collective = {"skipped": f"because {wrong[0]}"}
    elif plan is None:
        node.collective = {"unasked": "there is no plan"}
    elif plan.world_size == 1:
        node.collective = {"skipped": "a single rank"}
    elif plan.spans_parts and (node.gang is None or len(node.gang.fit) < plan.num_parts):
        node.collective = {"unasked": "the parts form one group: `rtp-llm-doctor gang --tier 3` on every part"}
    else:
        address = node.gang.rows[plan.part].address if node.gang else "127.0.0.1"
        node.collective = measure(node, plan, address)
    return [*findings, *run_checks([c for c in checks if c.tier == 3], node, findings)]
