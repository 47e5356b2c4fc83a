"""The exchange of reports (gossip) between the doctors of two parts in one process, for cases that network namespaces
cannot reproduce reliably."""

import asyncio
import contextlib
import logging
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from doctor.check import CheckResult, Status
from doctor.context import CheckContext
from doctor.gang.connections import serve_ports
from doctor.gang.gossip import GossipSession
from doctor.gang.part_report import LinkResult, PartReport
from doctor.gang_service import _Examiner
from doctor.report import Report, make_finding
from rtp_llm.errors import GangError
from rtp_llm.parallel.members import Member
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.plan import DOCTOR_PORT_OFFSET, Plan
from tests.doctor.fixtures import FakeHost

SESSION_SECONDS = 8.0


def make_session(
    members: tuple[Member, ...], part: int, secret: bytes = b"", facts: dict[str, str] | None = None
) -> GossipSession:
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
        facts=facts or {},
        identity={},
        planned_ports={port + DOCTOR_PORT_OFFSET: "doctor"},
        ephemeral_ports=[],
        port_range="",
        problems={},
        listening=True,
    )
    return GossipSession(Plan(members, part, 2, 2, 1, port, 9, "cpu"), part_report, secret)


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


def test_findings_of_links_stay_until_the_links_are_probed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Part 1 restarts: its report is first without links, and then says that they are well."""
    caplog.set_level(logging.INFO)
    statuses: dict[str, Status] = {}
    monkeypatch.setattr(
        "doctor.gang_service.run_checks",
        lambda checks, ctx, kept: [
            make_finding(c, CheckResult(statuses.get(c.id, Status.OK), ""), 0.0) for c in checks
        ],
    )
    members = (Member(0, "x_part0", "127.0.0.1", 1), Member(1, "x_part1", "127.0.0.1", 2))
    session = make_session(members, 0)
    config = SimpleNamespace(rtp_doctor="warn")
    spec = SimpleNamespace(
        plan=session.plan, config=config, doctor_report_path=tmp_path / "doctor", gang_status_path=tmp_path / "gang"
    )
    examiner = _Examiner(cast(PartSpec, spec), CheckContext(FakeHost(tmp_path)), session, [])

    def report_of_part1(run_id: str, probing_done: bool) -> list[str]:
        report = make_session(members, 1).part_report
        report.run_id, report.probing_done = run_id, probing_done
        session.merge_reports([report.to_json()])
        examiner.compare()
        return [f.id for f in Report.model_validate_json(spec.doctor_report_path.read_text()).problems()]

    session.part_report.probing_done = True
    assert report_of_part1("first", True) == []
    statuses["N-02"] = Status.ERROR
    examiner.conclude()
    assert report_of_part1("second", False) == ["N-02"]
    assert "no longer disagree" not in caplog.text
    statuses.clear()
    assert report_of_part1("second", True) == []
    assert "no longer disagree" in caplog.text


# Forged reports


def examine_forged(
    secret: bytes, facts: dict[str, str], *, is_reachable: bool, forge: bool = True
) -> tuple[GossipSession, BaseException | None]:
    """Lets part 0 examine the reports, which says that the parts disagree if the facts of part 1 are other ones.

    `facts`: of part 1 itself. `forge`: a stranger has sent other ones in its name. Returns the session of part 0 and
    the error that ends this part.
    """

    async def enforce(session: GossipSession, peer: GossipSession, responder: socket.socket) -> BaseException | None:
        ctx = cast(CheckContext, SimpleNamespace(peers=[session.plan.members[1]]))
        examiner = _Examiner(cast(PartSpec, None), ctx, session, [])

        def examine() -> None:
            if session.part_reports[1].facts:
                raise GangError("the parts of the gang disagree")

        async with serve_ports(1, peer.serve, responder if is_reachable else None, []):
            if not forge:
                await session.confirm(ctx.peers)
            try:
                await examiner.enforce(examine)
                await examiner.enforce(examine)
            except GangError as error:
                return error
        return None

    with bound_socket() as port0, bound_socket() as port1:
        ports = [sock.getsockname()[1] - DOCTOR_PORT_OFFSET for sock in (port0, port1)]
        members = tuple(Member(n, f"x_part{n}", "127.0.0.1", port) for n, port in enumerate(ports))
        session, peer = make_session(members, 0, secret), make_session(members, 1, secret, facts)
        if forge:
            forged = make_session(members, 1, facts={"config.TP_SIZE": "3"}).part_report
            forged.run_id = "forged"
            session.merge_reports([forged.to_json()])
        return session, asyncio.run(enforce(session, peer, port1))


def test_a_forged_report_ends_no_part() -> None:
    session, error = examine_forged(b"", {}, is_reachable=True)
    assert error is None
    assert session.part_reports[1].run_id == "1"


def test_a_report_that_its_part_cannot_confirm_ends_no_part(caplog: pytest.LogCaptureFixture) -> None:
    _, error = examine_forged(b"", {}, is_reachable=False)
    assert error is None
    assert [record.getMessage()[:30] for record in caplog.records] == ["part1 sent a report but does n"]


@pytest.mark.parametrize("forge", [True, False])
def test_a_disagreement_that_the_part_confirms_ends_this_one(forge: bool) -> None:
    _, error = examine_forged(b"", {"config.TP_SIZE": "4"}, is_reachable=True, forge=forge)
    assert isinstance(error, GangError)


def test_signed_reports_need_no_confirmation() -> None:
    _, error = examine_forged(b"secret", {}, is_reachable=False)
    assert isinstance(error, GangError)


@pytest.mark.parametrize(("address", "unconfirmed"), [("127.0.0.1", []), ("localhost", []), ("192.0.2.1", [1])])
def test_a_report_from_the_address_of_its_part_is_confirmed(address: str, unconfirmed: list[int]) -> None:
    """Part 0 cannot connect to part 1, whose request comes from 127.0.0.1."""

    async def send_and_confirm(session: GossipSession, peer: GossipSession, responder: socket.socket) -> list[int]:
        async with serve_ports(0, session.serve, responder, []):
            assert await peer._exchange_reports(peer.plan.members[0], LinkResult()) == "replied"
            for _ in range(1000):
                if session._direct_reports or unconfirmed:
                    break
                await asyncio.sleep(0.01)
            return await session.confirm([])

    with bound_socket() as responder:
        port = responder.getsockname()[1] - DOCTOR_PORT_OFFSET
        members = (Member(0, "x_part0", "127.0.0.1", port), Member(1, "x_part1", address, port))
        session, peer = make_session(members, 0), make_session(members, 1)
        assert asyncio.run(send_and_confirm(session, peer, responder)) == unconfirmed
