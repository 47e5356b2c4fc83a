"""Runs the exchange of reports for this part: opens sockets, exchanges reports and returns the reports of all parts."""

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

MAX_FULL_MESH_PARTS = 8  # in larger gangs a part probes only part 0, the previous and the next part


def exchange_reports(
    ctx: CheckContext, plan: Plan, problems: dict[str, str], wait_seconds: float, on_progress: Callable[[str], None]
) -> GangView:
    """Exchanges reports with the doctors of the other parts until every part has the reports of all, at most for
    `wait_seconds`. Returns the reports that have arrived.

    `problems`: text of the errors of this part's own checks, by check id. `on_progress`: called with messages for the
    user. Raises ConfigError if GANG_SECRET_FILE cannot be read, and OSError if there is no route to another
    part or a port cannot be opened.
    """
    return asyncio.run(_run_session(ctx, plan, problems, wait_seconds, on_progress))


async def _run_session(
    ctx: CheckContext, plan: Plan, problems: dict[str, str], wait_seconds: float, on_progress: Callable[[str], None]
) -> GangView:
    # If the server of this part runs, its doctor already listens and sends this part's report.
    session = open_session(ctx, plan, problems, listening=not ctx.running, observe_only=ctx.running)
    async with contextlib.AsyncExitStack() as stack:
        if not ctx.running:
            responder, placeholders = stack.enter_context(_planned_sockets(plan))
            sockets = [*placeholders, *greeting_sockets(session)]
            await stack.enter_async_context(serve_ports(plan.part, session.serve, responder, sockets))
        await session.run(probed_members(ctx, plan), time.monotonic() + wait_seconds, on_progress)
    return GangView(dict(session.part_reports), plan)


def open_session(
    ctx: CheckContext,
    plan: Plan,
    problems: dict[str, str],
    *,
    listening: bool,
    observe_only: bool = False,
    persistent: bool = False,
) -> GossipSession:
    """Returns a GossipSession, which exchanges reports between the parts once its `run` is called.

    `problems`: text of the errors that this part's own checks found, by check id. `listening`: whether the doctor
    listens on the ports that this part's server will use. `observe_only`: receives reports and sends none.
    `persistent`: keeps waiting for parts that gave up.
    """
    part_report = local_part_report(ctx, plan, problems, listening)
    return GossipSession(plan, part_report, secret(ctx.config), observe_only=observe_only, persistent=persistent)


def greeting_sockets(session: GossipSession) -> list[socket.socket]:
    """Returns sockets on ephemeral ports of the address that NCCL and gloo use, and writes their port numbers into this
    part's report. Other parts connect to them to test whether a firewall blocks such ports.
    """
    sockets = bind_ephemeral(session.part_report.address)
    session.part_report.ephemeral_ports = [sock.getsockname()[1] for sock in sockets]
    return sockets


def probed_members(ctx: CheckContext, plan: Plan) -> list[Member]:
    """Returns the parts to which this part tests its connections: all others or, in a gang of more than
    MAX_FULL_MESH_PARTS parts, part 0 and the parts with the previous and the next number.
    """
    if plan.num_parts <= MAX_FULL_MESH_PARTS:
        return ctx.peers
    parts = {0, (plan.part + 1) % plan.num_parts, (plan.part - 1) % plan.num_parts}
    return [member for member in ctx.peers if member.index in parts]


@contextlib.contextmanager
def _planned_sockets(plan: Plan) -> Iterator[tuple[socket.socket | None, list[socket.socket]]]:
    """Listens on the free ones of this part's planned ports. Yields (socket of the doctor's port, other sockets)."""
    responder: socket.socket | None = None
    placeholders: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        for planned in plan.local_ports():
            try:
                sock = stack.enter_context(listen("0.0.0.0", planned.port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue  # N-08 reports the process that holds the port
            if planned.port == plan.start_port + DOCTOR_PORT_OFFSET:
                responder = sock
            else:
                placeholders.append(sock)
        yield responder, placeholders
