"""The meeting: each part listens, dials every other, tries ports, large transfers and clocks, and passes on what it
knows until everybody knows everything.

Nobody leads. A question carries the asker's rows and the answer the other's, so one open direction between two parts
is enough for both to hear of each other; each keeps asking until all rows are complete, or the time is up.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from doctor.gang.messages import Greeting, ProtocolError, new_nonce, pack_signed, read_signed
from doctor.gang.row import Link, Row
from rtp_llm.parallel.members import Member
from rtp_llm.parallel.plan import RESPONDER, Plan

log = logging.getLogger("doctor.gang")

DIAL_SECONDS = 3.0
BLOB_BYTES = 8 << 20
BLOB_SECONDS = 8.0
BLOB_ROUNDS = 3
QUESTION_SECONDS = 5.0
PAUSE_SECONDS = 0.2
LINGER_SECONDS = 6.0
PARTING_SECONDS = 1.0  # for those that ask once more to hear that all is known
RANDOM_PORTS = 3
CLOCK_ROUNDS = 5
REFUSALS = {
    errno.ECONNREFUSED: "refused",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    errno.ECONNRESET: "reset",
    errno.ETIMEDOUT: "timeout",
}


class Meeting:
    """One part's side. `secret` signs everything that is said. `observing`: a running part's own doctor has spoken for
    it already, so this one looks and says nothing."""

    def __init__(self, plan: Plan, row: Row, secret: bytes, *, observing: bool = False):
        self.plan, self.row, self.secret, self.observing = plan, row, secret, observing
        self.rows: dict[int, Row] = {plan.part: row}
        self.changed = asyncio.Event()

    # Listening

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection to the responder: questions until the other closes."""
        nonce = new_nonce()
        try:
            writer.write(Greeting(self.plan.part, nonce).pack())
            while True:
                question = await read_signed(reader, nonce, self.secret)
                await self._answer(question, reader, writer)
        except (OSError, ProtocolError, ValueError, KeyError, TypeError) as error:
            log.debug("doctor's port: %s", error)
        finally:
            await _close(writer)

    async def _answer(
        self, question: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        what, nonce = question["what"], str(question["nonce"])
        if what == "rows":
            self.learn(question["rows"])
            answer: dict[str, Any] = {"rows": self._all_rows()}
        elif what == "clock":
            answer = {"time": time.time()}
        elif what == "take":
            answer = {"bytes": await _drain(reader, min(int(question["bytes"]), BLOB_BYTES))}
        elif what == "give":
            await _pour(writer, min(int(question["bytes"]), BLOB_BYTES))
            answer = {}
        else:
            raise ProtocolError(f"no such question: {what}")
        writer.write(pack_signed(answer, nonce, self.secret))
        await writer.drain()

    def learn(self, rows: list[dict[str, Any]]) -> None:
        """Takes over rows of other parts; a row that is done is never replaced by one of the same run that is not."""
        for data in rows:
            row = Row.from_json(data)
            known = self.rows.get(row.part)
            if row.part == self.plan.part or not 0 <= row.part < self.plan.num_parts:
                continue
            if known and known.run == row.run and (known.done, len(known.seen)) >= (row.done, len(row.seen)):
                continue
            self.rows[row.part] = row
            self.changed.set()
        self.row.seen = sorted(part for part, row in self.rows.items() if row.done)

    def _all_rows(self) -> list[dict[str, Any]]:
        return [] if self.observing else [row.to_json() for row in self.rows.values()]

    # Asking

    async def ask(self, host: str, port: int, what: str, **more: Any) -> dict[str, Any]:
        """One question on a connection of its own. Raises OSError, or ProtocolError where the other is no doctor."""
        async with asyncio.timeout(QUESTION_SECONDS):
            reader, writer = await _connect(host, port)
            try:
                greeting = await Greeting.read(reader)
                nonce = new_nonce()
                writer.write(pack_signed({"what": what, "nonce": nonce, **more}, greeting.nonce, self.secret))
                return await read_signed(reader, nonce, self.secret)
            except ConnectionResetError:
                raise ProtocolError("it closes the connection: is GANG_SECRET the same?") from None
            finally:
                await _close(writer)

    async def visit(self, member: Member, deadline: float) -> None:
        """Knocks until the member's responder answers or its row came another way, then tries every way to it."""
        link = self.row.links.setdefault(member.index, Link())
        port = member.port + RESPONDER
        while time.monotonic() < deadline:
            try:
                self.learn((await self.ask(member.ip, port, "rows", rows=self._all_rows()))["rows"])
                link.answered = True
            except ProtocolError as error:
                link.refusal = str(error)
            except (OSError, TimeoutError):
                pass
            if member.index in self.rows or (link.refusal and not link.answered):
                break
            await asyncio.sleep(PAUSE_SECONDS)
        row = self.rows.get(member.index)
        if row:
            await self._examine(member, row, link)
        else:
            link.ports = {port: await dial(member.ip, port)}

    async def _visit_unlisted(self, part: int, deadline: float) -> None:
        """Where only the leader's address was given, the others are known once they have spoken."""
        while part not in self.rows and time.monotonic() < deadline:
            await asyncio.sleep(PAUSE_SECONDS)
        row = self.rows.get(part)
        if row:
            await self.visit(Member(part, row.name, row.address, row.start_port), deadline)

    async def _examine(self, member: Member, row: Row, link: Link) -> None:
        """Every port of theirs, then transfers and the clock, which need the responder."""
        ports = [*row.planned_ports, *row.random_ports]
        # A running part's own servers would wait for what a stranger has to say: there a connection is proof enough.
        outcomes = await asyncio.gather(
            *(dial(member.ip, port, greeted=row.listening or port in row.random_ports) for port in ports)
        )
        link.ports = dict(zip(ports, outcomes, strict=True))
        if link.answered:
            await self._transfer(member, link)
            await self._compare_clocks(member, link)

    async def _transfer(self, member: Member, link: Link) -> None:
        """8 MiB each way: what is lost for its size gets stuck here, after all the small messages went through."""
        for direction in ("sent", "received"):
            fastest = 0.0
            for _ in range(BLOB_ROUNDS):  # a machine that starts a server at the same time is not always at its best
                started = time.monotonic()
                try:
                    async with asyncio.timeout(BLOB_SECONDS):
                        await self._blob(member, direction)
                except (OSError, TimeoutError, ProtocolError) as error:
                    reason = "stalled" if isinstance(error, TimeoutError) else str(error)
                    link.blob = f"{BLOB_BYTES >> 20} MiB {direction}: {reason}"
                    return
                fastest = max(fastest, BLOB_BYTES / max(time.monotonic() - started, 1e-6))
            setattr(link, f"{direction}_speed", round(fastest))

    async def _blob(self, member: Member, direction: str) -> None:
        reader, writer = await _connect(member.ip, member.port + RESPONDER)
        try:
            greeting, nonce = await Greeting.read(reader), new_nonce()
            what = "take" if direction == "sent" else "give"
            question = {"what": what, "nonce": nonce, "bytes": BLOB_BYTES}
            writer.write(pack_signed(question, greeting.nonce, self.secret))
            if direction == "sent":
                await _pour(writer, BLOB_BYTES)
            else:
                await _drain(reader, BLOB_BYTES)
            await read_signed(reader, nonce, self.secret)
        finally:
            await _close(writer)

    async def _compare_clocks(self, member: Member, link: Link) -> None:
        """The round with the shortest way says most: offset as in NTP (RFC 5905, section 8), half the way its error."""
        best: tuple[float, float] | None = None
        for _ in range(CLOCK_ROUNDS):
            sent = time.time()
            try:
                theirs = float((await self.ask(member.ip, member.port + RESPONDER, "clock"))["time"])
            except (OSError, TimeoutError):
                continue
            received = time.time()
            best = min(best or (9e9, 0.0), (received - sent, theirs - (sent + received) / 2))
        if best:
            link.rtt, link.clock_offset = round(best[0], 6), round(best[1], 6)
            link.clock_error = round(best[0] / 2, 6)

    # Until all know all

    def settled(self, late: bool) -> bool:
        """Whether every part that is here has tried every way and holds the rows of all that are. Until it is `late`,
        those that are not here yet are waited for."""
        here = set(self.rows)
        if len(here) < self.plan.num_parts and not late:
            return False
        return all(row.done and here <= set(row.seen) for row in self.rows.values())

    async def attend(self, members: list[Member], deadline: float, report: Callable[[str], None]) -> None:
        """The whole meeting: visits all members, then passes rows on until everybody knows all, or until `deadline`
        (monotonic)."""
        say = asyncio.create_task(self._report_absent(members, report))
        try:
            unlisted = set(range(self.plan.num_parts)) - {m.index for m in self.plan.members} - {self.plan.part}
            await asyncio.gather(
                *(self.visit(member, deadline) for member in members),
                *(self._visit_unlisted(part, deadline) for part in sorted(unlisted)),
            )
            # Done with those that came; one that never did leaves this row done as well.
            self.row.done = True
            self.learn([])
            reached = [m for m in members if self.row.links[m.index].answered]
            end = deadline + LINGER_SECONDS  # after a part that never came, the others still need each other's rows
            while not self.observing and not self.settled(time.monotonic() > deadline) and time.monotonic() < end:
                await asyncio.gather(*(self._gossip(member) for member in reached))
                await asyncio.sleep(PAUSE_SECONDS)
            if not self.observing:
                await asyncio.sleep(PARTING_SECONDS)
        finally:
            say.cancel()

    async def _gossip(self, member: Member) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            answer = await self.ask(member.ip, member.port + RESPONDER, "rows", rows=self._all_rows())
            self.learn(answer["rows"])

    async def _report_absent(self, members: list[Member], report: Callable[[str], None]) -> None:
        while True:
            await asyncio.sleep(3)
            missing = [f"{m.name} ({m.ip}:{m.port})" for m in members if m.index not in self.rows]
            if missing:
                report("waiting for the doctor of " + ", ".join(missing))


async def dial(host: str, port: int, *, greeted: bool = True) -> str:
    """What becomes of a connection: open, refused, timeout, unreachable, reset; foreign where a doctor was to greet and
    somebody else listens."""
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            reader, writer = await _connect(host, port)
    except TimeoutError:
        return "timeout"
    except OSError as error:
        return REFUSALS.get(error.errno or 0, "unreachable")
    if not greeted:
        await _close(writer)
        return "open"
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            await Greeting.read(reader)
        return "open"
    except (OSError, TimeoutError):
        return "foreign"
    finally:
        await _close(writer)


@asynccontextmanager
async def listeners(
    meeting: Meeting, responder: socket.socket | None, greeters: list[socket.socket]
) -> AsyncIterator[None]:
    """Serves the responder's port in full; the others greet and hang up."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(Greeting(meeting.plan.part, new_nonce()).pack())
            await writer.drain()
        await _close(writer)

    async with AsyncExitStack() as stack:
        if responder:
            stack.push_async_callback(_stop, await asyncio.start_server(meeting.serve, sock=responder))
        for sock in greeters:
            stack.push_async_callback(_stop, await asyncio.start_server(greet, sock=sock))
        yield


async def _stop(server: asyncio.Server) -> None:
    server.close()


def bind_random(address: str) -> list[socket.socket]:
    """Ports as NCCL takes them: whatever the kernel gives, on the address that it would use."""
    found = []
    for _ in range(RANDOM_PORTS):
        sock = socket.socket()
        sock.bind((address, 0))
        found.append(sock)
    return found


async def _connect(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(host, port, family=socket.AF_INET)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def _pour(writer: asyncio.StreamWriter, count: int) -> None:
    piece = os.urandom(1 << 16)  # what a link compresses would look faster than it is
    for _ in range(count // len(piece)):
        writer.write(piece)
        await writer.drain()


async def _drain(reader: asyncio.StreamReader, count: int) -> int:
    left = count
    while left:
        data = await reader.read(min(left, 1 << 16))
        if not data:
            raise ConnectionResetError("the connection was closed")
        left -= len(data)
    return count
