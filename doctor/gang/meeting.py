"""The meeting: each part listens, dials every other, tries ports, large transfers and clocks, and passes on what it
knows until everybody knows everything.

Nobody leads. A question carries the asker's rows and the answer the other's, so one open direction between two parts
is enough for both to hear of each other; each keeps asking until all rows are complete, or the time is up.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from doctor.gang.messages import Greeting, ProtocolError, Stranger, new_nonce, pack_signed, read_signed
from doctor.gang.row import Link, Row
from doctor.gang.ways import DIAL_SECONDS, close, connect, dial, drain, outcome, pour
from rtp_llm.parallel.members import Member
from rtp_llm.parallel.plan import RESPONDER, Plan

log = logging.getLogger("doctor.gang")

BLOB_BYTES = 8 << 20
BLOB_SECONDS = 8.0
BLOB_ROUNDS = range(3, 20)  # a machine that starts a server at the same time is not always at its best
TRYING_SECONDS = 2.0  # to see whether a link that looks slow is
SLOW_BYTES = 125_000_000  # per second: 1 Gbit/s
STALL_SECONDS = 4.0  # without a byte's progress
ANSWER_SECONDS = 2.0  # a doctor answers at once: after that, shorter segments are tried
PATIENT_SECONDS = 5.0
PAUSE_SECONDS = 0.2
LINGER_SECONDS = 6.0  # of the whole time, for those that are here when another never comes
PARTING_SECONDS = 1.0  # of the whole time, for those that ask once more to hear that all is known
CLOCK_ROUNDS = 5


class Stuck(TimeoutError):
    """It greeted, and the answer did not come."""


class Misled(ProtocolError):
    """Another part answers under this one's address."""


class Meeting:
    """One part's side. `secret` signs everything that is said. `observing`: a running part's own doctor has spoken for
    it already, so this one looks and says nothing."""

    def __init__(self, plan: Plan, row: Row, secret: bytes, *, observing: bool = False):
        self.plan, self.row, self.secret, self.observing = plan, row, secret, observing
        self.rows: dict[int, Row] = {plan.part: row}
        self.narrow: set[int] = set()  # members whom only small segments reach

    # Listening

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection to the responder: questions until the other closes."""
        nonce = new_nonce()
        try:
            writer.write(Greeting(self.plan.part, nonce).pack())
            while True:
                question = await read_signed(reader, nonce, self.secret)
                await self._answer(question, reader, writer)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # whatever a stranger may send
            log.debug("doctor's port: %s", error)
        finally:
            await close(writer)

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
            answer = {"bytes": await drain(reader, min(int(question["bytes"]), BLOB_BYTES))}
        elif what == "give":
            await pour(writer, min(int(question["bytes"]), BLOB_BYTES))
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
        self.row.seen = sorted(part for part, row in self.rows.items() if row.done)

    def _all_rows(self) -> list[dict[str, Any]]:
        return [] if self.observing else [row.to_json() for row in self.rows.values()]

    # Asking

    async def ask(self, member: Member, what: str, **more: Any) -> dict[str, Any]:
        """One question on a connection of its own. Raises OSError where nobody takes it, Stranger, Misled or
        ProtocolError where the wrong one does, Stuck where a doctor greets and its answer is lost."""
        small = member.index in self.narrow
        reader, writer = await connect(member.ip, member.port + RESPONDER, small=small)
        try:
            greeting = await _greeting(reader, member)
            async with asyncio.timeout(PATIENT_SECONDS if small else ANSWER_SECONDS):
                nonce = new_nonce()
                writer.write(pack_signed({"what": what, "nonce": nonce, **more}, greeting.nonce, self.secret))
                return await read_signed(reader, nonce, self.secret)
        except TimeoutError:
            raise Stuck from None
        except ConnectionResetError:
            raise ProtocolError("it closes the connection: is GANG_SECRET the same?") from None
        finally:
            await close(writer)

    async def visit(self, member: Member, deadline: float) -> None:
        """Knocks until the member's responder answers or its row came another way, then tries every way to it."""
        link = self.row.links.setdefault(member.index, Link())
        how = await self._knock(member, link)
        while not self._heard(member, link, how) and time.monotonic() < deadline:
            await asyncio.sleep(PAUSE_SECONDS)
            how = await self._knock(member, link)
        row = self.rows.get(member.index)
        if row is None:
            link.ports = {member.port + RESPONDER: how}
            link.foreign = f"{member.ip}:{member.port + RESPONDER}" if how == "foreign" else ""
        elif row.fit and not link.misled:
            await self._examine(member, row, link)

    async def _knock(self, member: Member, link: Link) -> str:
        """One try to hear what the member knows. What became of it, in the words of a dialled port, or answered, stuck,
        misled, odd."""
        try:
            answer = await self.ask(member, "rows", rows=self._all_rows())
            self.learn(answer["rows"])
        except Stuck:
            link.stuck = True
            self.narrow.add(member.index)
            return "stuck"
        except Stranger:
            return "foreign"
        except Misled as error:
            link.misled = str(error)
            return "misled"
        except ProtocolError as error:
            link.refusal = str(error)
            return "odd"
        except OSError as error:
            return outcome(error)
        link.answered, link.refusal, link.stuck = True, "", False
        return "answered"

    def _heard(self, member: Member, link: Link, how: str) -> bool:
        """Whether another try would bring nothing new."""
        if how == "stuck":
            return False
        return member.index in self.rows or how in ("misled", "odd")

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
        # Stands where the time is up before a transfer has shown the same.
        link.blob = "long messages stalled, short ones passed" if member.index in self.narrow else ""
        for direction in ("sent", "received"):
            try:
                setattr(link, f"{direction}_speed", round(await self._fastest(member, direction)))
            except OSError as error:
                reason = "stalled" if isinstance(error, TimeoutError) else str(error)
                link.blob = f"{BLOB_BYTES >> 20} MiB {direction}: {reason}"
                return
        link.blob = ""

    async def _fastest(self, member: Member, direction: str) -> float:
        """Bytes per second, of several rounds."""
        fastest, began = 0.0, time.monotonic()
        for number in range(BLOB_ROUNDS.stop):
            started = time.monotonic()
            if number >= BLOB_ROUNDS.start and (fastest > SLOW_BYTES or started > began + TRYING_SECONDS):
                break
            async with asyncio.timeout(BLOB_SECONDS):
                await self._blob(member, direction)
            fastest = max(fastest, BLOB_BYTES / max(time.monotonic() - started, 1e-6))
        return fastest

    async def _blob(self, member: Member, direction: str) -> None:
        reader, writer = await connect(member.ip, member.port + RESPONDER)
        try:
            greeting, nonce = await _greeting(reader, member), new_nonce()
            what = "take" if direction == "sent" else "give"
            question = {"what": what, "nonce": nonce, "bytes": BLOB_BYTES}
            writer.write(pack_signed(question, greeting.nonce, self.secret))
            if direction == "sent":
                await pour(writer, BLOB_BYTES, STALL_SECONDS)
            else:
                await drain(reader, BLOB_BYTES, STALL_SECONDS)
            await read_signed(reader, nonce, self.secret)
        finally:
            await close(writer)

    async def _compare_clocks(self, member: Member, link: Link) -> None:
        """The round with the shortest way says most: offset as in NTP (RFC 5905, section 8), half the way its error."""
        best: tuple[float, float] | None = None
        for _ in range(CLOCK_ROUNDS):
            sent = time.time()
            try:
                theirs = float((await self.ask(member, "clock"))["time"])
            except OSError:
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
        """The whole meeting: visits all members, then passes rows on until everybody knows all. Ends by `deadline`
        (monotonic); what is unfinished then is not `done`."""
        whole = max(0.0, deadline - time.monotonic())
        parting = min(PARTING_SECONDS, whole / 10)
        say = asyncio.create_task(self._report_absent(members, report))
        try:
            async with asyncio.timeout(whole - parting):
                await self._meet(members, deadline - min(LINGER_SECONDS, whole / 2))
        except TimeoutError:
            log.debug("the time is up")
        finally:
            say.cancel()
        if not self.observing:
            await self._part(members, parting)

    async def _meet(self, members: list[Member], waiting: float) -> None:
        """Those that are not here yet are waited for until `waiting` (monotonic)."""
        unlisted = set(range(self.plan.num_parts)) - {m.index for m in self.plan.members} - {self.plan.part}
        await asyncio.gather(
            *(self.visit(member, waiting) for member in members),
            *(self._visit_unlisted(part, waiting) for part in sorted(unlisted)),
        )
        # Done with those that came; one that never did leaves this row done as well.
        self.row.done = True
        self.learn([])
        while not self.observing and not self.settled(time.monotonic() > waiting):
            await self._gossip(members)
            await asyncio.sleep(PAUSE_SECONDS)

    async def confess(self, members: list[Member], deadline: float) -> None:
        """A part without a plan of its own tries nothing: it tells the others what is wrong with it, until all have
        heard, or until `deadline` (monotonic)."""
        whole = max(0.0, deadline - time.monotonic())
        self.row.done = True
        self.learn([])
        try:
            async with asyncio.timeout(whole):
                while not self.settled(late=False):
                    await self._gossip(members, everybody=True)
                    await asyncio.sleep(PAUSE_SECONDS)
                await self._part(members, PARTING_SECONDS)
        except TimeoutError:
            log.debug("the time is up")

    async def _part(self, members: list[Member], seconds: float) -> None:
        """Says once more what is known, for not everybody can ask this part, and stays a moment for those that do."""
        end = time.monotonic() + seconds
        try:
            async with asyncio.timeout(seconds):
                await self._gossip(members)
        except TimeoutError:
            log.debug("somebody does not hear that all is known")
        await asyncio.sleep(max(0.0, end - time.monotonic()))

    async def _gossip(self, members: list[Member], everybody: bool = False) -> None:
        """`everybody`: also those that have not answered yet."""
        links = self.row.links
        known = [m for m in members if everybody or (m.index in links and links[m.index].answered)]
        await asyncio.gather(*(self._knock(member, links.setdefault(member.index, Link())) for member in known))

    async def _report_absent(self, members: list[Member], report: Callable[[str], None]) -> None:
        while True:
            await asyncio.sleep(3)
            missing = [f"{m.name} ({m.ip}:{m.port})" for m in members if m.index not in self.rows]
            if missing:
                report("waiting for the doctor of " + ", ".join(missing))


async def _greeting(reader: asyncio.StreamReader, member: Member) -> Greeting:
    """Raises Stranger where nobody greets, Misled where it is another part."""
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            greeting = await Greeting.read(reader)
    except (TimeoutError, ConnectionResetError) as error:
        raise Stranger("whoever listens there says nothing") from error
    if greeting.part != member.index:
        raise Misled(f"part{greeting.part} answers at {member.ip}:{member.port + RESPONDER}")
    return greeting
