"""The exchange of reports (gossip) between the doctors of two parts in one process, for cases that network namespaces
cannot reproduce reliably."""

import asyncio
import contextlib
import socket
import time
from typing import Any

import pytest

from doctor.gang.connections import serve_ports
from doctor.gang.gossip import GossipSession
from doctor.gang.part_report import PartReport
from rtp_llm.parallel.members import Member
from rtp_llm.parallel.plan import DOCTOR_PORT_OFFSET, Plan

SESSION_SECONDS = 8.0


def make_session(members: tuple[Member, ...], part: int) -> GossipSession:
    """The exchange of reports, for a part that listens only on the doctor's port, not on its other planned ports."""
    port = members[part].port
    part_report = PartReport(
        part=part,
        name=f"x_part{part}",
        run_id=str(part),
        address="127.0.0.1",
        start_port=port,
        interface="lo",
        mtu=65536,
        facts={},
        identity={},
        planned_ports={port + DOCTOR_PORT_OFFSET: "doctor"},
        ephemeral_ports=[],
        port_range="",
        problems={},
        listening=True,
    )
    return GossipSession(Plan(members, part, 2, 2, 1, port, 9, "cpu"), part_report, b"")


def bound_socket() -> socket.socket:
    """A socket that is bound to a free port and does not listen."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


def test_session_converges_if_only_one_part_can_connect() -> None:
    """Part 0 cannot connect to part 1, so it receives all reports, the final ones too, in requests of part 1."""

    async def run_both(a: GossipSession, b: GossipSession, responder: socket.socket) -> None:
        deadline = time.monotonic() + SESSION_SECONDS
        async with serve_ports(0, a.serve, responder, []):
            await asyncio.gather(
                *(
                    session.run([peer.plan.members[peer.plan.part]], deadline, print)
                    for session, peer in ((a, b), (b, a))
                )
            )

    with bound_socket() as open_port, bound_socket() as closed_port:
        ports = [sock.getsockname()[1] - DOCTOR_PORT_OFFSET for sock in (open_port, closed_port)]
        members = tuple(Member(n, f"x_part{n}", "127.0.0.1", port) for n, port in enumerate(ports))
        a, b = (make_session(members, part) for part in range(2))
        asyncio.run(run_both(a, b, open_port))
    assert a.part_report.links[1].ports == {ports[1] + DOCTOR_PORT_OFFSET: "refused"}
    assert [session.converged(ignore_absent=False) for session in (a, b)] == [True, True]


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x02\x00\x00\x00[]"])
def test_serve_ports_with_open_connection_exits_without_asyncio_errors(data: bytes) -> None:
    errors: list[dict[str, Any]] = []

    async def connect_once(session: GossipSession, responder: socket.socket) -> bytes:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        async with serve_ports(0, session.serve, responder, []):
            reader, writer = await asyncio.open_connection(*responder.getsockname())
            writer.write(data)
            greeting = await reader.read(1 << 16)
        with contextlib.suppress(ConnectionResetError):  # aborted, perhaps with unread data
            await reader.read()
        writer.close()
        return greeting

    with bound_socket() as responder:
        members = (Member(0, "x_part0", "127.0.0.1", 1), Member(1, "x_part1", "127.0.0.1", 2))
        greeting = asyncio.run(connect_once(make_session(members, 0), responder))
    assert b"rtp-llm-doctor" in greeting
    assert errors == []
