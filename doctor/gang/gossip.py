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

from doctor.gang.connections import DIAL_SECONDS, classify_error, close, connect, dial, receive_bytes, send_bytes
from doctor.gang.messages import Greeting, NotADoctorError, ProtocolError, new_nonce, pack_signed, read_signed
from doctor.gang.part_report import LinkResult, PartReport
from rtp_llm.parallel.members import Member
from rtp_llm.parallel.plan import DOCTOR_PORT_OFFSET, Plan

log = logging.getLogger("doctor.gang")

TRANSFER_BYTES = 8 << 20
TRANSFER_SECONDS = 8.0
TRANSFER_ROUNDS = range(3, 20)  # a machine that starts a server at the same time is not always at its best
MIN_MEASURE_SECONDS = 2.0  # to see whether a link that looks slow is
SLOW_BYTES = 125_000_000  # per second: 1 Gbit/s
STALL_SECONDS = 4.0  # without a byte's progress
REPLY_SECONDS = 2.0  # a doctor answers at once: after that, shorter segments are tried
SMALL_MSS_REPLY_SECONDS = 5.0
RETRY_INTERVAL_SECONDS = 0.2
ABSENT_GRACE_SECONDS = 6.0  # of the whole time, for those that are here when another never comes
FINAL_GOSSIP_SECONDS = 1.0  # of the whole time, for those that ask once more to hear that all is known
CLOCK_ROUNDS = 5


class ReplyTimeoutError(TimeoutError):
    """It greeted, and the answer did not come."""


class WrongPartError(ProtocolError):
    """Another part answers under this one's address."""


class GossipSession:
    """One part's side. `secret` signs everything that is said. `observing`: a running part's own doctor has spoken for
    it already, so this one looks and says nothing."""

    def __init__(self, plan: Plan, part_report: PartReport, secret: bytes, *, observing: bool = False):
        self.plan, self.part_report, self.secret, self.observe_only = plan, part_report, secret, observing
        self.part_reports: dict[int, PartReport] = {plan.part: part_report}
        self.small_mss_members: set[int] = set()  # members whom only small segments reach

    # Listening

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection to the responder: questions until the other closes."""
        nonce = new_nonce()
        try:
            writer.write(Greeting(self.plan.part, nonce).pack())
            while True:
                question = await read_signed(reader, nonce, self.secret)
                await self._reply(question, reader, writer)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # whatever a stranger may send
            log.debug("doctor's port: %s", error)
        finally:
            await close(writer)

    async def _reply(
        self, question: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        what, nonce = question["what"], str(question["nonce"])
        if what == "reports":
            self.merge_reports(question["reports"])
            answer: dict[str, Any] = {"reports": self._all_reports()}
        elif what == "clock":
            answer = {"time": time.time()}
        elif what == "upload":
            answer = {"bytes": await receive_bytes(reader, min(int(question["bytes"]), TRANSFER_BYTES))}
        elif what == "download":
            await send_bytes(writer, min(int(question["bytes"]), TRANSFER_BYTES))
            answer = {}
        else:
            raise ProtocolError(f"no such question: {what}")
        writer.write(pack_signed(answer, nonce, self.secret))
        await writer.drain()

    def merge_reports(self, part_reports: list[dict[str, Any]]) -> None:
        """Takes over rows of other parts; a row that is done is never replaced by one of the same run that is not."""
        for data in part_reports:
            part_report = PartReport.from_json(data)
            known = self.part_reports.get(part_report.part)
            if part_report.part == self.plan.part or not 0 <= part_report.part < self.plan.num_parts:
                continue
            if (
                known
                and known.run_id == part_report.run_id
                and (known.probing_done, len(known.received_from))
                >= (part_report.probing_done, len(part_report.received_from))
            ):
                continue
            self.part_reports[part_report.part] = part_report
        self.part_report.received_from = sorted(
            part for part, part_report in self.part_reports.items() if part_report.probing_done
        )

    def _all_reports(self) -> list[dict[str, Any]]:
        return [] if self.observe_only else [part_report.to_json() for part_report in self.part_reports.values()]

    # Asking

    async def ask(self, member: Member, what: str, **more: Any) -> dict[str, Any]:
        """One question on a connection of its own. Raises OSError where nobody takes it, Stranger, Misled or
        ProtocolError where the wrong one does, Stuck where a doctor greets and its answer is lost."""
        small = member.index in self.small_mss_members
        reader, writer = await connect(member.ip, member.port + DOCTOR_PORT_OFFSET, small=small)
        try:
            greeting = await _greeting(reader, member)
            async with asyncio.timeout(SMALL_MSS_REPLY_SECONDS if small else REPLY_SECONDS):
                nonce = new_nonce()
                writer.write(pack_signed({"what": what, "nonce": nonce, **more}, greeting.nonce, self.secret))
                return await read_signed(reader, nonce, self.secret)
        except TimeoutError:
            raise ReplyTimeoutError from None
        except ConnectionResetError:
            raise ProtocolError("it closes the connection: is GANG_SECRET the same?") from None
        finally:
            await close(writer)

    async def probe_member(self, member: Member, deadline: float) -> None:
        """Knocks until the member's responder answers or its row came another way, then tries every way to it."""
        link = self.part_report.links.setdefault(member.index, LinkResult())
        how = await self._exchange_reports(member, link)
        while not self._no_retry_needed(member, link, how) and time.monotonic() < deadline:
            await asyncio.sleep(RETRY_INTERVAL_SECONDS)
            how = await self._exchange_reports(member, link)
        part_report = self.part_reports.get(member.index)
        if part_report is None:
            link.ports = {member.port + DOCTOR_PORT_OFFSET: how}
            link.foreign_address = f"{member.ip}:{member.port + DOCTOR_PORT_OFFSET}" if how == "foreign" else ""
        elif part_report.has_valid_plan and not link.wrong_part:
            await self._probe_links(member, part_report, link)

    async def _exchange_reports(self, member: Member, link: LinkResult) -> str:
        """One try to hear what the member knows. What became of it, in the words of a dialled port, or answered, stuck,
        misled, odd."""
        try:
            answer = await self.ask(member, "reports", reports=self._all_reports())
            self.merge_reports(answer["reports"])
        except ReplyTimeoutError:
            link.reply_timed_out = True
            self.small_mss_members.add(member.index)
            return "stuck"
        except NotADoctorError:
            return "foreign"
        except WrongPartError as error:
            link.wrong_part = str(error)
            return "misled"
        except ProtocolError as error:
            link.refusal = str(error)
            return "odd"
        except OSError as error:
            return classify_error(error)
        link.answered, link.refusal, link.reply_timed_out = True, "", False
        return "answered"

    def _no_retry_needed(self, member: Member, link: LinkResult, how: str) -> bool:
        """Whether another try would bring nothing new."""
        if how == "stuck":
            return False
        return member.index in self.part_reports or how in ("misled", "odd")

    async def _probe_unlisted_part(self, part: int, deadline: float) -> None:
        """Where only the leader's address was given, the others are known once they have spoken."""
        while part not in self.part_reports and time.monotonic() < deadline:
            await asyncio.sleep(RETRY_INTERVAL_SECONDS)
        part_report = self.part_reports.get(part)
        if part_report:
            await self.probe_member(
                Member(part, part_report.name, part_report.address, part_report.start_port), deadline
            )

    async def _probe_links(self, member: Member, part_report: PartReport, link: LinkResult) -> None:
        """Every port of theirs, then transfers and the clock, which need the responder."""
        ports = [*part_report.planned_ports, *part_report.ephemeral_ports]
        # A running part's own servers would wait for what a stranger has to say: there a connection is proof enough.
        outcomes = await asyncio.gather(
            *(
                dial(member.ip, port, greeted=part_report.listening or port in part_report.ephemeral_ports)
                for port in ports
            )
        )
        link.ports = dict(zip(ports, outcomes, strict=True))
        if link.answered:
            await self._transfer(member, link)
            await self._compare_clocks(member, link)

    async def _transfer(self, member: Member, link: LinkResult) -> None:
        """8 MiB each way: what is lost for its size gets stuck here, after all the small messages went through."""
        # Stands where the time is up before a transfer has shown the same.
        link.transfer_error = (
            "long messages stalled, short ones passed" if member.index in self.small_mss_members else ""
        )
        for direction in ("sent", "received"):
            try:
                setattr(link, f"{direction}_speed", round(await self._best_throughput(member, direction)))
            except OSError as error:
                reason = "stalled" if isinstance(error, TimeoutError) else str(error)
                link.transfer_error = f"{TRANSFER_BYTES >> 20} MiB {direction}: {reason}"
                return
        link.transfer_error = ""

    async def _best_throughput(self, member: Member, direction: str) -> float:
        """Bytes per second, of several rounds."""
        fastest, began = 0.0, time.monotonic()
        for number in range(TRANSFER_ROUNDS.stop):
            started = time.monotonic()
            if number >= TRANSFER_ROUNDS.start and (fastest > SLOW_BYTES or started > began + MIN_MEASURE_SECONDS):
                break
            async with asyncio.timeout(TRANSFER_SECONDS):
                await self._transfer_once(member, direction)
            fastest = max(fastest, TRANSFER_BYTES / max(time.monotonic() - started, 1e-6))
        return fastest

    async def _transfer_once(self, member: Member, direction: str) -> None:
        reader, writer = await connect(member.ip, member.port + DOCTOR_PORT_OFFSET)
        try:
            greeting, nonce = await _greeting(reader, member), new_nonce()
            what = "upload" if direction == "sent" else "download"
            question = {"what": what, "nonce": nonce, "bytes": TRANSFER_BYTES}
            writer.write(pack_signed(question, greeting.nonce, self.secret))
            if direction == "sent":
                await send_bytes(writer, TRANSFER_BYTES, STALL_SECONDS)
            else:
                await receive_bytes(reader, TRANSFER_BYTES, STALL_SECONDS)
            await read_signed(reader, nonce, self.secret)
        finally:
            await close(writer)

    async def _compare_clocks(self, member: Member, link: LinkResult) -> None:
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

    def converged(self, late: bool) -> bool:
        """Whether every part that is here has tried every way and holds the rows of all that are. Until it is `late`,
        those that are not here yet are waited for."""
        here = set(self.part_reports)
        if len(here) < self.plan.num_parts and not late:
            return False
        return all(
            part_report.probing_done and here <= set(part_report.received_from)
            for part_report in self.part_reports.values()
        )

    async def run(self, members: list[Member], deadline: float, report: Callable[[str], None]) -> None:
        """The whole meeting: visits all members, then passes rows on until everybody knows all. Ends by `deadline`
        (monotonic); what is unfinished then is not `done`."""
        whole = max(0.0, deadline - time.monotonic())
        parting = min(FINAL_GOSSIP_SECONDS, whole / 10)
        say = asyncio.create_task(self._report_absent(members, report))
        try:
            async with asyncio.timeout(whole - parting):
                await self._run_session(members, deadline - min(ABSENT_GRACE_SECONDS, whole / 2))
        except TimeoutError:
            log.debug("the time is up")
        finally:
            say.cancel()
        if not self.observe_only:
            await self._linger(members, parting)

    async def _run_session(self, members: list[Member], waiting: float) -> None:
        """Those that are not here yet are waited for until `waiting` (monotonic)."""
        unlisted = set(range(self.plan.num_parts)) - {m.index for m in self.plan.members} - {self.plan.part}
        await asyncio.gather(
            *(self.probe_member(member, waiting) for member in members),
            *(self._probe_unlisted_part(part, waiting) for part in sorted(unlisted)),
        )
        # Done with those that came; one that never did leaves this row done as well.
        self.part_report.probing_done = True
        self.merge_reports([])
        while not self.observe_only and not self.converged(time.monotonic() > waiting):
            await self._gossip(members)
            await asyncio.sleep(RETRY_INTERVAL_SECONDS)

    async def report_errors(self, members: list[Member], deadline: float) -> None:
        """A part without a plan of its own tries nothing: it tells the others what is wrong with it, until all have
        heard, or until `deadline` (monotonic)."""
        whole = max(0.0, deadline - time.monotonic())
        self.part_report.probing_done = True
        self.merge_reports([])
        try:
            async with asyncio.timeout(whole):
                while not self.converged(late=False):
                    await self._gossip(members, everybody=True)
                    await asyncio.sleep(RETRY_INTERVAL_SECONDS)
                await self._linger(members, FINAL_GOSSIP_SECONDS)
        except TimeoutError:
            log.debug("the time is up")

    async def _linger(self, members: list[Member], seconds: float) -> None:
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
        links = self.part_report.links
        known = [m for m in members if everybody or (m.index in links and links[m.index].answered)]
        await asyncio.gather(
            *(self._exchange_reports(member, links.setdefault(member.index, LinkResult())) for member in known)
        )

    async def _report_absent(self, members: list[Member], report: Callable[[str], None]) -> None:
        while True:
            await asyncio.sleep(3)
            missing = [f"{m.name} ({m.ip}:{m.port})" for m in members if m.index not in self.part_reports]
            if missing:
                report("waiting for the doctor of " + ", ".join(missing))


async def _greeting(reader: asyncio.StreamReader, member: Member) -> Greeting:
    """Raises Stranger where nobody greets, Misled where it is another part."""
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            greeting = await Greeting.read(reader)
    except (TimeoutError, ConnectionResetError) as error:
        raise NotADoctorError("whoever listens there says nothing") from error
    if greeting.part != member.index:
        raise WrongPartError(f"part{greeting.part} answers at {member.ip}:{member.port + DOCTOR_PORT_OFFSET}")
    return greeting
