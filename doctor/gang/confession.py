"""A part that has no plan it can believe in, and still tells the others what is wrong with it.

It would otherwise be gone at once, and they would wait for it and call it absent.
"""

import asyncio
import time
from collections.abc import Callable

from doctor.gang.facts import own_row
from doctor.gang.meeting import Meeting
from doctor.gang.ways import listeners
from doctor.node import Node
from rtp_llm.config import secret
from rtp_llm.errors import ConfigError
from rtp_llm.parallel.members import Member, read_members
from rtp_llm.parallel.plan import RESPONDER, Plan
from rtp_llm.parallel.wire import listen


def confess(node: Node, problems: dict[str, str], wait: float, report: Callable[[str], None]) -> None:
    """Until the others have heard, or for `wait` seconds; at once where no member of the list is this machine.
    Raises ConfigError, OSError."""
    plan = _place(node)
    if plan is None:
        return
    for id, text in problems.items():
        report(f"{id} {text}")
    report(f"telling the other parts, for {wait:g} s at most")
    asyncio.run(_confess(node, plan, problems, wait))


async def _confess(node: Node, plan: Plan, problems: dict[str, str], wait: float) -> None:
    row = own_row(node, plan, problems, listening=False)
    row.fit = False
    meeting = Meeting(plan, row, secret(node.config))
    with listen("0.0.0.0", plan.start_port + RESPONDER) as responder:
        async with listeners(plan.part, meeting.serve, responder, []):
            others = [member for member in plan.members if member.index != plan.part]
            await meeting.confess(others, time.monotonic() + wait)


def _place(node: Node) -> Plan | None:
    """The member that this machine most likely is, by its addresses, and by START_PORT where several share one."""
    try:
        members = read_members(node.config)
    except ConfigError:
        return None
    own = [member for member in members if _is_here(node, member)]
    if len(own) > 1:
        own = [member for member in own if member.port == node.config.start_port]
    if len(own) != 1 or len(members) < 2:
        return None
    [member], count = own, len(members)
    return Plan(members, member.index, count, count, 1, member.port, node.config.worker_info_port_num, "cpu")


def _is_here(node: Node, member: Member) -> bool:
    try:
        return bool(set(node.host.resolve(member.ip)) & node.host.addresses)
    except OSError:
        return False
