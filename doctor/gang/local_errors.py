"""A part that has no plan it can believe in, and still tells the others what is wrong with it.

It would otherwise be gone at once, and they would wait for it and call it absent.
"""

import asyncio
import time
from collections.abc import Callable

from doctor.context import CheckContext
from doctor.gang.connections import serve_ports
from doctor.gang.facts import local_part_report
from doctor.gang.gossip import GossipSession
from rtp_llm.config import secret
from rtp_llm.errors import ConfigError
from rtp_llm.parallel.members import Member, read_members
from rtp_llm.parallel.plan import DOCTOR_PORT_OFFSET, Plan
from rtp_llm.parallel.wire import listen


def report_local_errors(
    ctx: CheckContext, problems: dict[str, str], wait: float, report: Callable[[str], None]
) -> None:
    """Until the others have heard, or for `wait` seconds; at once where no member of the list is this machine.
    Raises ConfigError, OSError."""
    plan = _likely_plan_member(ctx)
    if plan is None:
        return
    for id, text in problems.items():
        report(f"{id} {text}")
    report(f"telling the other parts, for {wait:g} s at most")
    asyncio.run(_send_errors(ctx, plan, problems, wait))


async def _send_errors(ctx: CheckContext, plan: Plan, problems: dict[str, str], wait: float) -> None:
    part_report = local_part_report(ctx, plan, problems, listening=False)
    part_report.has_valid_plan = False
    session = GossipSession(plan, part_report, secret(ctx.config))
    with listen("0.0.0.0", plan.start_port + DOCTOR_PORT_OFFSET) as responder:
        async with serve_ports(plan.part, session.serve, responder, []):
            others = [member for member in plan.members if member.index != plan.part]
            await session.report_errors(others, time.monotonic() + wait)


def _likely_plan_member(ctx: CheckContext) -> Plan | None:
    """The member that this machine most likely is, by its addresses, and by START_PORT where several share one."""
    try:
        members = read_members(ctx.config)
    except ConfigError:
        return None
    own = [member for member in members if _is_here(ctx, member)]
    if len(own) > 1:
        own = [member for member in own if member.port == ctx.config.start_port]
    if len(own) != 1 or len(members) < 2:
        return None
    [member], count = own, len(members)
    return Plan(members, member.index, count, count, 1, member.port, ctx.config.worker_info_port_num, "cpu")


def _is_here(ctx: CheckContext, member: Member) -> bool:
    try:
        return bool(set(ctx.host.resolve(member.ip)) & ctx.host.addresses)
    except OSError:
        return False
