"""Holds the meeting for this part: sockets, the wait, and the view that comes of it."""

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Callable, Iterator

from doctor.context import CheckContext
from doctor.gang.connections import bind_ephemeral, serve_ports
from doctor.gang.facts import local_part_report
from doctor.gang.gossip import GossipSession
from doctor.gang.view import GangView
from rtp_llm.config import secret
from rtp_llm.parallel.members import Member
from rtp_llm.parallel.plan import DOCTOR_PORT_OFFSET, Plan
from rtp_llm.parallel.wire import listen

MESH_PARTS = 8  # beyond that each part tries its neighbours and part 0 only


def exchange_reports(
    ctx: CheckContext, plan: Plan, problems: dict[str, str], wait: float, report: Callable[[str], None]
) -> GangView:
    """Returns when every part knows all, or after `wait` seconds. `problems`: errors this part found by itself.
    Raises ConfigError, OSError.
    """
    return asyncio.run(_exchange_reports(ctx, plan, problems, wait, report))


async def _exchange_reports(
    ctx: CheckContext, plan: Plan, problems: dict[str, str], wait: float, report: Callable[[str], None]
) -> GangView:
    if ctx.running:  # its own doctor answers for it
        session = open_session(ctx, plan, problems, listening=False)
        session.observe_only = True
        await session.run(probed_members(ctx, plan), time.monotonic() + wait, report)
        return GangView(dict(session.part_reports), plan)
    with _sockets(plan) as (responder, stand_ins):
        session = open_session(ctx, plan, problems, listening=True)
        async with serve_ports(plan.part, session.serve, responder, [*stand_ins, *greeting_sockets(session)]):
            await session.run(probed_members(ctx, plan), time.monotonic() + wait, report)
    return GangView(dict(session.part_reports), plan)


def open_session(ctx: CheckContext, plan: Plan, problems: dict[str, str], *, listening: bool) -> GossipSession:
    """`listening`: whether this part's planned ports have stand-ins that answer."""
    return GossipSession(plan, local_part_report(ctx, plan, problems, listening), secret(ctx.config))


def greeting_sockets(session: GossipSession) -> list[socket.socket]:
    """Random ports on the address that the collectives would use, entered into the row."""
    found = bind_ephemeral(session.part_report.address)
    session.part_report.ephemeral_ports = [sock.getsockname()[1] for sock in found]
    return found


def probed_members(ctx: CheckContext, plan: Plan) -> list[Member]:
    """Whom this part visits: everybody up to eight parts, beyond that part 0 and its neighbours."""
    if plan.num_parts <= MESH_PARTS:
        return ctx.peers
    near = {0, (plan.part + 1) % plan.num_parts, (plan.part - 1) % plan.num_parts}
    return [member for member in ctx.peers if member.index in near]


@contextlib.contextmanager
def _sockets(plan: Plan) -> Iterator[tuple[socket.socket | None, list[socket.socket]]]:
    """Listening sockets on this part's planned ports. Where the running part itself has them, its own responder
    answers in our place."""
    responder: socket.socket | None = None
    stand_ins: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        for planned in plan.local_ports():
            try:
                sock = stack.enter_context(listen("0.0.0.0", planned.port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue  # N-08 names who has it
            if planned.port == plan.start_port + DOCTOR_PORT_OFFSET:
                responder = sock
            else:
                stand_ins.append(sock)
        yield responder, stand_ins
