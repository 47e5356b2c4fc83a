"""Holds the meeting for this part: sockets, the wait, and the view that comes of it."""

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Callable, Iterator

from doctor.gang.facts import own_row
from doctor.gang.meeting import Meeting
from doctor.gang.view import GangView
from doctor.gang.ways import bind_random, listeners
from doctor.node import Node
from rtp_llm.config import secret
from rtp_llm.parallel.members import Member
from rtp_llm.parallel.plan import RESPONDER, Plan
from rtp_llm.parallel.wire import listen

MESH_PARTS = 8  # beyond that each part tries its neighbours and part 0 only


def meet(node: Node, plan: Plan, problems: dict[str, str], wait: float, report: Callable[[str], None]) -> GangView:
    """Returns when every part knows all, or after `wait` seconds. `problems`: errors this part found by itself.
    Raises ConfigError, OSError.
    """
    return asyncio.run(_meet(node, plan, problems, wait, report))


async def _meet(
    node: Node, plan: Plan, problems: dict[str, str], wait: float, report: Callable[[str], None]
) -> GangView:
    if node.running:  # its own doctor answers for it
        meeting = open_meeting(node, plan, problems, listening=False)
        meeting.observing = True
        await meeting.attend(mesh(node, plan), time.monotonic() + wait, report)
        return GangView(dict(meeting.rows), plan)
    with _sockets(plan) as (responder, stand_ins):
        meeting = open_meeting(node, plan, problems, listening=True)
        async with listeners(plan.part, meeting.serve, responder, [*stand_ins, *meeting_sockets(meeting)]):
            await meeting.attend(mesh(node, plan), time.monotonic() + wait, report)
    return GangView(dict(meeting.rows), plan)


def open_meeting(node: Node, plan: Plan, problems: dict[str, str], *, listening: bool) -> Meeting:
    """`listening`: whether this part's planned ports have stand-ins that answer."""
    return Meeting(plan, own_row(node, plan, problems, listening), secret(node.config))


def meeting_sockets(meeting: Meeting) -> list[socket.socket]:
    """Random ports on the address that the collectives would use, entered into the row."""
    found = bind_random(meeting.row.address)
    meeting.row.random_ports = [sock.getsockname()[1] for sock in found]
    return found


def mesh(node: Node, plan: Plan) -> list[Member]:
    """Whom this part visits: everybody up to eight parts, beyond that part 0 and its neighbours."""
    if plan.num_parts <= MESH_PARTS:
        return node.peers
    near = {0, (plan.part + 1) % plan.num_parts, (plan.part - 1) % plan.num_parts}
    return [member for member in node.peers if member.index in near]


@contextlib.contextmanager
def _sockets(plan: Plan) -> Iterator[tuple[socket.socket | None, list[socket.socket]]]:
    """Listening sockets on this part's planned ports. Where the running part itself has them, its own responder
    answers in our place."""
    responder: socket.socket | None = None
    stand_ins: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        for planned in plan.own_ports():
            try:
                sock = stack.enter_context(listen("0.0.0.0", planned.port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue  # N-08 names who has it
            if planned.port == plan.start_port + RESPONDER:
                responder = sock
            else:
                stand_ins.append(sock)
        yield responder, stand_ins
