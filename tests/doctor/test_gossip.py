"""Two sides of a meeting in one process: what a lab of namespaces cannot hold still."""

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

FOR_ALL = 8.0


def side(members: tuple[Member, ...], part: int) -> GossipSession:
    """A part whose responder alone is to be reached."""
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


def bound() -> socket.socket:
    """Takes a port, and does not listen there."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


def test_a_part_that_cannot_be_asked_is_told_that_all_is_known() -> None:
    """Part 0 dials part 1 in vain, and hears all that it knows from part 1's own questions, the last one as well."""

    async def both(one: GossipSession, other: GossipSession, responder: socket.socket) -> None:
        deadline = time.monotonic() + FOR_ALL
        async with serve_ports(0, one.serve, responder, []):
            await asyncio.gather(
                *(m.run([o.plan.members[o.plan.part]], deadline, print) for m, o in ((one, other), (other, one)))
            )

    with bound() as open_port, bound() as closed_port:
        ports = [sock.getsockname()[1] - DOCTOR_PORT_OFFSET for sock in (open_port, closed_port)]
        members = tuple(Member(n, f"x_part{n}", "127.0.0.1", port) for n, port in enumerate(ports))
        one, other = (side(members, part) for part in range(2))
        asyncio.run(both(one, other, open_port))
    assert one.part_report.links[1].ports == {ports[1] + DOCTOR_PORT_OFFSET: "refused"}
    assert [m.converged(late=False) for m in (one, other)] == [True, True]


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x02\x00\x00\x00[]"])
def test_a_responder_ends_with_a_connection_open(said: bytes) -> None:
    """Nothing is left for asyncio to complain about."""
    complaints: list[dict[str, Any]] = []

    async def once(session: GossipSession, responder: socket.socket) -> bytes:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with serve_ports(0, session.serve, responder, []):
            reader, writer = await asyncio.open_connection(*responder.getsockname())
            writer.write(said)
            greeting = await reader.read(1 << 16)
        with contextlib.suppress(ConnectionResetError):  # cut off, or left with what it had said unread
            await reader.read()
        writer.close()
        return greeting

    with bound() as responder:
        members = (Member(0, "x_part0", "127.0.0.1", 1), Member(1, "x_part1", "127.0.0.1", 2))
        greeting = asyncio.run(once(side(members, 0), responder))
    assert b"rtp-llm-doctor" in greeting
    assert complaints == []
