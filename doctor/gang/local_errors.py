"""Sends the errors of this part to the other parts if this part does not start or has no valid plan (rank layout).

Otherwise the other parts would wait for this part until a timeout, and report only that it is absent.
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
    ctx: CheckContext, errors: dict[str, str], wait_seconds: float, on_progress: Callable[[str], None]
) -> None:
    """Sends the errors of this part (text by check id) to the other parts until all have received them, at most for
    `wait_seconds`. `on_progress`: called with messages for the user.

    Does nothing if the member list does not show which part this is, by its address or START_PORT. Raises ConfigError
    if GANG_SECRET_FILE cannot be read, and OSError if there is no route to another part or the doctor's port is in use.
    """
    plan = _plan_of_local_member(ctx)
    if plan is None:
        return
    for id, text in errors.items():
        on_progress(f"{id} {text}")
    on_progress(f"sending these errors to the other parts, for {wait_seconds:g} s at most")
    asyncio.run(_send_errors(ctx, plan, errors, wait_seconds))


def say_farewell(ctx: CheckContext, errors: dict[str, str], wait_seconds: float) -> None:
    """Tells the other parts why this part does not start, so that they need not wait for it. `errors`: text by check
    id. Tries for at most `wait_seconds`.

    Does nothing if the addresses of the other parts are unknown. Raises ConfigError if GANG_SECRET_FILE cannot be read,
    and OSError if there is no route to another part.
    """
    is_guess = ctx.plan is None or ctx.plan_result.config_error
    plan = (_plan_of_local_member(ctx) if is_guess else None) or ctx.plan
    peers = [m for m in plan.members if m.index != plan.part] if plan else []
    if plan is None or not peers:
        return
    asyncio.run(_session(ctx, plan, errors).say_farewell(peers, time.monotonic() + wait_seconds))


async def _send_errors(ctx: CheckContext, plan: Plan, errors: dict[str, str], wait_seconds: float) -> None:
    session = _session(ctx, plan, errors)
    with listen("0.0.0.0", plan.start_port + DOCTOR_PORT_OFFSET) as responder:
        async with serve_ports(plan.part, session.serve, responder, []):
            peers = [member for member in plan.members if member.index != plan.part]
            await session.report_errors(peers, time.monotonic() + wait_seconds)


def _session(ctx: CheckContext, plan: Plan, errors: dict[str, str]) -> GossipSession:
    part_report = local_part_report(ctx, plan, errors, listening=False)
    part_report.has_valid_plan = False
    return GossipSession(plan, part_report, secret(ctx.config))


def _plan_of_local_member(ctx: CheckContext) -> Plan | None:
    """Returns a plan for the part in the member list that has an address of this machine; if there is not exactly
    one, for the one with this START_PORT.

    Its sizes are placeholders: only its part number, member list and ports are used.
    """
    try:
        members = read_members(ctx.config)
    except ConfigError:
        return None
    local = [member for member in members if _is_local(ctx, member)]
    if len(local) != 1:
        local = [member for member in local or members if member.port == ctx.config.start_port]
    if len(local) != 1 or len(members) < 2:
        return None
    [member], count = local, len(members)
    return Plan(members, member.index, count, count, 1, member.port, ctx.config.worker_info_port_num, "cpu")


def _is_local(ctx: CheckContext, member: Member) -> bool:
    try:
        return bool(set(ctx.host.resolve(member.ip)) & ctx.host.addresses)
    except OSError:
        return False
