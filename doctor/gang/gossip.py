"""Gossip between the doctors of the parts: each part serves requests, probes its links to the others (ports,
throughput, clock) and forwards every report that it has.

No part is the coordinator. A request carries the sender's reports and the reply those of the receiver, so two parts can
exchange reports if either of them can connect to the other. Each part repeats this until all parts have all final
reports, or until its deadline.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from doctor.gang.connections import (
    DIAL_SECONDS,
    classify_error,
    close,
    connect,
    dial,
    is_address_of,
    receive_bytes,
    send_bytes,
)
from doctor.gang.messages import Greeting, NotADoctorError, ProtocolError, new_nonce, pack_signed, read_signed
from doctor.gang.part_report import LinkResult, PartReport
from rtp_llm.parallel.members import Member
from rtp_llm.parallel.plan import DOCTOR_PORT_OFFSET, Plan

log = logging.getLogger("doctor.gang")

TRANSFER_BYTES = 8 << 20
TRANSFER_SECONDS = 8.0
MIN_TRANSFERS, MAX_TRANSFERS = 3, 20  # the fastest one counts: others may be slow because the machine is busy
MIN_MEASURE_SECONDS = 2.0  # a link below SLOW_BYTES is measured for at least this time
SLOW_BYTES = 125_000_000  # bytes per second: 1 Gbit/s
STALL_SECONDS = 4.0  # a transfer without progress for this time has failed
REPLY_SECONDS = 2.0  # a doctor replies at once; after this timeout, requests use small TCP segments
SMALL_MSS_REPLY_SECONDS = 5.0
RETRY_INTERVAL_SECONDS = 0.2
PROGRESS_INTERVAL_SECONDS = 3.0
ABSENT_GRACE_SECONDS = 6.0  # before the deadline: stop waiting for absent parts, exchange the reports of the others
FINAL_GOSSIP_SECONDS = 1.0  # at the end: send the final reports to parts that do not have them yet
CLOCK_ROUNDS = 5


class ReplyTimeoutError(TimeoutError):
    """The doctor of another part sent a greeting (the first message on a connection), but no reply to a request in
    time.
    """


class WrongPartError(ProtocolError):
    """The doctor of a different part answers at the address that the member list gives for a part."""


class GossipSession:
    """This part's side of the exchange of reports between the doctors of all parts. `part_report`: this part's report.
    `secret`: the key that signs all messages (GANG_SECRET).

    `observe_only`: receives reports and sends none, because this part's server runs, and its doctor sends them.
    `persistent`: does not stop waiting for a part that gives up, has another secret or is the wrong one, because the
    user may correct that part and start it again.
    """

    def __init__(
        self,
        plan: Plan,
        part_report: PartReport,
        secret: bytes,
        *,
        observe_only: bool = False,
        persistent: bool = False,
    ):
        self.plan, self.part_report, self.secret = plan, part_report, secret
        self.observe_only, self.persistent = observe_only, persistent
        self.farewells: dict[int, PartReport] = {}  # reasons of the parts that gave up, until they start again
        self.part_reports: dict[int, PartReport] = {plan.part: part_report}
        self._direct_reports: dict[int, PartReport] = {}  # that came from the configured address of their part
        self.small_mss_members: set[int] = set()  # numbers of parts to which large packets seem to be lost

    # Server side

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves the requests of one connection until the other side closes it."""
        nonce = new_nonce()
        try:
            writer.write(Greeting(self.plan.part, nonce).pack())
            while True:
                request = await read_signed(reader, nonce, self.secret)
                await self._reply(request, reader, writer)
                await self._note_direct_reports(writer.get_extra_info("peername")[0], request)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # any program may connect
            log.debug("doctor's port: %s", error)
        finally:
            await close(writer)

    async def _reply(self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        operation, nonce = request["operation"], str(request["nonce"])
        if operation == "reports":
            self.merge_reports(request["reports"])
            reply: dict[str, Any] = {"reports": self._all_reports()}
        elif operation == "clock":
            reply = {"time": time.time()}
        elif operation == "upload":
            reply = {"bytes": await receive_bytes(reader, min(int(request["bytes"]), TRANSFER_BYTES))}
        elif operation == "download":
            await send_bytes(writer, min(int(request["bytes"]), TRANSFER_BYTES))
            reply = {}
        else:
            raise ProtocolError(
                f"another part requests the unknown operation {operation!r}; do all parts run the same release?"
            )
        writer.write(pack_signed(reply, nonce, self.secret))
        await writer.drain()

    async def _note_direct_reports(self, address: str, request: dict[str, Any]) -> None:
        """Keeps the report in a request of the part at whose configured address the request comes from."""
        if request["operation"] == "reports" and not self.secret:
            for member in self.plan.members:
                if await is_address_of(member.ip, address):
                    self._keep_direct_report(member, request)

    def _keep_direct_report(self, member: Member, message: dict[str, Any]) -> None:
        own = [PartReport.from_json(data) for data in message["reports"] if data["part"] == member.index]
        self._direct_reports |= {report.part: report for report in own if report.part != self.plan.part}

    def merge_reports(self, reports: list[dict[str, Any]]) -> None:
        """Stores reports of other parts, decoded from JSON. Skips a report if a newer one from the same run of that
        part's doctor is stored.
        """
        for data in reports:
            received = PartReport.from_json(data)
            if received.part == self.plan.part or not 0 <= received.part < self.plan.num_parts:
                continue
            if self.persistent and not received.has_valid_plan:
                self.farewells[received.part] = received
                continue
            stored = self.part_reports.get(received.part)
            if stored is None or stored.run_id != received.run_id:
                self.farewells.pop(received.part, None)
            if stored is None or stored.run_id != received.run_id or stored.progress < received.progress:
                self.part_reports[received.part] = received
        self.part_report.received_from = sorted(part for part, r in self.part_reports.items() if r.probing_done)

    def _all_reports(self) -> list[dict[str, Any]]:
        return [] if self.observe_only else [part_report.to_json() for part_report in self.part_reports.values()]

    # Client side

    async def _request(self, member: Member, operation: str, **fields: Any) -> dict[str, Any]:
        """Sends one request on a new connection and returns the reply.

        Raises ReplyTimeoutError if a doctor sends a greeting but no reply, NotADoctorError, WrongPartError or
        ProtocolError if a wrong peer answers, and OSError if the connection fails.
        """
        small_mss = member.index in self.small_mss_members
        reader, writer = await connect(member.ip, member.port + DOCTOR_PORT_OFFSET, small_mss=small_mss)
        try:
            greeting = await _read_greeting(reader, member)
            async with asyncio.timeout(SMALL_MSS_REPLY_SECONDS if small_mss else REPLY_SECONDS):
                nonce = new_nonce()
                request = {"operation": operation, "nonce": nonce, **fields}
                writer.write(pack_signed(request, greeting.nonce, self.secret))
                return await read_signed(reader, nonce, self.secret)
        except TimeoutError:
            raise ReplyTimeoutError from None
        except ConnectionResetError:
            raise ProtocolError("the peer closed the connection: is GANG_SECRET the same on both parts?") from None
        finally:
            await close(writer)

    async def probe_member(self, member: Member, deadline: float) -> None:
        """Requests the report of the part `member` until it arrives, directly or through another part. Then connects to
        all ports of that part, measures throughput and clock offset, and stores the results in `part_report.links`.

        `deadline`: time.monotonic() at which it stops requesting the report.
        """
        link = self.part_report.links.setdefault(member.index, LinkResult())
        result = await self._exchange_reports(member, link)
        while not self._no_retry_needed(member, result) and time.monotonic() < deadline:
            await asyncio.sleep(RETRY_INTERVAL_SECONDS)
            result = await self._exchange_reports(member, link)
        part_report = self.part_reports.get(member.index)
        if part_report is None:
            port = member.port + DOCTOR_PORT_OFFSET
            link.ports = {port: result}
        elif part_report.has_valid_plan and not link.wrong_part:
            await self._probe_links(member, part_report, link)

    async def _exchange_reports(self, member: Member, link: LinkResult) -> str:
        """Sends all reports that this part has to another part once and stores the reports in the reply.

        Returns replied, reply_timeout, not_doctor, wrong_part, protocol_error, or a result of `classify_error`.
        """
        try:
            reply = await self._request(member, "reports", reports=self._all_reports())
            self.merge_reports(reply["reports"])
            self._keep_direct_report(member, reply)
        except ReplyTimeoutError:
            link.reply_timed_out = True
            self.small_mss_members.add(member.index)
            return "reply_timeout"
        except NotADoctorError:
            link.foreign_address = f"{member.ip}:{member.port + DOCTOR_PORT_OFFSET}"
            return "not_doctor"
        except WrongPartError as error:
            link.wrong_part = str(error)
            return "wrong_part"
        except ProtocolError as error:
            link.protocol_error = str(error)
            return "protocol_error"
        except OSError as error:
            return classify_error(error)
        link.replied, link.reply_timed_out = True, False
        link.protocol_error = link.wrong_part = link.foreign_address = ""
        return "replied"

    def _no_retry_needed(self, member: Member, result: str) -> bool:
        if result == "reply_timeout":  # the next request uses small segments
            return False
        if member.index in self.part_reports:
            return True
        return result in ("wrong_part", "protocol_error") and not self.persistent

    async def _probe_unlisted_part(self, part: int, deadline: float) -> None:
        """Waits for the report of a part whose address is not configured (LEADER_ADDRESS only), then probes it."""
        while part not in self.part_reports and time.monotonic() < deadline:
            await asyncio.sleep(RETRY_INTERVAL_SECONDS)
        report = self.part_reports.get(part)
        if report:
            await self.probe_member(Member(part, report.name, report.address, report.start_port), deadline)

    async def _probe_links(self, member: Member, part_report: PartReport, link: LinkResult) -> None:
        """Connects to every port of another part. If its doctor replies, also measures the throughput to and from that
        part and the offset of its clock."""
        ephemeral = part_report.ephemeral_ports
        ports = [*part_report.planned_ports, *ephemeral]
        # On the planned ports of a running part the server listens, which sends no greeting.
        results = await asyncio.gather(
            *(dial(member.ip, port, expect_greeting=part_report.listening or port in ephemeral) for port in ports)
        )
        link.ports = dict(zip(ports, results, strict=True))
        if link.replied:
            await self._measure_transfers(member, link)
            await self._compare_clocks(member, link)

    async def _measure_transfers(self, member: Member, link: LinkResult) -> None:
        """Measures the throughput of the link to another part in both directions, and stores it in `link`. Detects
        links that deliver small packets and drop large ones."""
        # This error remains if the deadline of `run` cancels the transfers below.
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
        """Returns the throughput of the fastest of several test transfers to or from another part, in bytes per second.
        `direction`: sent or received."""
        best, first_started = 0.0, time.monotonic()
        for number in range(MAX_TRANSFERS):
            started = time.monotonic()
            if number >= MIN_TRANSFERS and (best > SLOW_BYTES or started > first_started + MIN_MEASURE_SECONDS):
                break
            async with asyncio.timeout(TRANSFER_SECONDS):
                await self._transfer_once(member, direction)
            best = max(best, TRANSFER_BYTES / max(time.monotonic() - started, 1e-6))
        return best

    async def _transfer_once(self, member: Member, direction: str) -> None:
        reader, writer = await connect(member.ip, member.port + DOCTOR_PORT_OFFSET)
        try:
            greeting, nonce = await _read_greeting(reader, member), new_nonce()
            operation = "upload" if direction == "sent" else "download"
            request = {"operation": operation, "nonce": nonce, "bytes": TRANSFER_BYTES}
            writer.write(pack_signed(request, greeting.nonce, self.secret))
            if direction == "sent":
                await send_bytes(writer, TRANSFER_BYTES, STALL_SECONDS)
            else:
                await receive_bytes(reader, TRANSFER_BYTES, STALL_SECONDS)
            await read_signed(reader, nonce, self.secret)
        finally:
            await close(writer)

    async def _compare_clocks(self, member: Member, link: LinkResult) -> None:
        """Measures the clock offset of another part as NTP does (RFC 5905, section 8), in the fastest round."""
        samples: list[tuple[float, float]] = []
        for _ in range(CLOCK_ROUNDS):
            sent = time.time()
            try:
                remote_time = float((await self._request(member, "clock"))["time"])
            except OSError:
                continue
            received = time.time()
            samples.append((received - sent, remote_time - (sent + received) / 2))
        if samples:
            rtt, offset = min(samples)
            link.rtt, link.clock_offset, link.clock_error = round(rtt, 6), round(offset, 6), round(rtt / 2, 6)

    # Convergence

    def converged(self, ignore_absent: bool) -> bool:
        """Returns whether the exchange is complete: every part has probed its links and has the final reports of all
        parts.

        A part is absent while no report of it has arrived. With `ignore_absent` absent parts do not count; without it,
        an absent part makes the result False.
        """
        present = set(self.part_reports)
        if len(present) < self.plan.num_parts and not ignore_absent:
            return False
        return all(r.probing_done and present <= set(r.received_from) for r in self.part_reports.values())

    async def run(self, members: list[Member], deadline: float, on_progress: Callable[[str], None]) -> None:
        """Probes the links to the parts in `members`, then exchanges reports until every part has the reports of all
        parts (`converged`), at most until `deadline` (time.monotonic()). `on_progress`: called with messages for the
        user.

        If this part has not probed all links by `deadline`, `probing_done` of its report remains False.
        """
        total = max(0.0, deadline - time.monotonic())
        final = min(FINAL_GOSSIP_SECONDS, total / 10)
        progress = asyncio.create_task(self._report_absent(members, on_progress))
        try:
            async with asyncio.timeout(total - final):
                await self._run_session(members, deadline - min(ABSENT_GRACE_SECONDS, total / 2))
        except TimeoutError:
            log.debug("the exchange of reports with the other parts timed out")
        finally:
            progress.cancel()
        if not self.observe_only:
            await self._linger(members, final)

    async def _run_session(self, members: list[Member], absent_deadline: float) -> None:
        """Probes the other parts, then exchanges reports. Waits for absent ones until `absent_deadline` (monotonic)."""
        unlisted = set(range(self.plan.num_parts)) - {m.index for m in self.plan.members} - {self.plan.part}
        await asyncio.gather(
            *(self.probe_member(member, absent_deadline) for member in members),
            *(self._probe_unlisted_part(part, absent_deadline) for part in sorted(unlisted)),
        )
        self._set_probing_done()
        while not self.observe_only and not self.converged(ignore_absent=time.monotonic() > absent_deadline):
            await self._gossip(members)
            await asyncio.sleep(RETRY_INTERVAL_SECONDS)

    def _set_probing_done(self) -> None:
        self.part_report.probing_done = True
        self.merge_reports([])  # adds this part to received_from

    async def report_errors(self, members: list[Member], deadline: float) -> None:
        """Sends this part's report, which contains only errors because this part has no valid plan, to the other parts.
        Does not probe links.

        Ends when all parts have the report, or at `deadline` (time.monotonic()).
        """
        self._set_probing_done()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                while not self.converged(ignore_absent=False):
                    await self._gossip(members, include_unresponsive=True)
                    await asyncio.sleep(RETRY_INTERVAL_SECONDS)
                await self._linger(members, FINAL_GOSSIP_SECONDS)
        except TimeoutError:
            log.debug("the exchange of reports with the other parts timed out")

    async def say_farewell(self, members: list[Member], deadline: float) -> None:
        """Sends this part's report, which contains the reason why the part does not start, to each of `members` until
        all have replied or until `deadline` (time.monotonic()).
        """
        self._set_probing_done()
        links = self.part_report.links
        pending = members
        while pending and time.monotonic() < deadline:
            requests = (self._exchange_reports(m, links.setdefault(m.index, LinkResult())) for m in pending)
            results = await asyncio.gather(*requests)
            pending = [member for member, result in zip(pending, results, strict=True) if result != "replied"]
            await asyncio.sleep(RETRY_INTERVAL_SECONDS if pending else 0)

    async def confirm(self, members: list[Member]) -> list[int]:
        """Requests from each of `members` its own report, which replaces the one that other parts have passed on.

        Returns the numbers of the parts whose stored report did not come from the address of that part in the member
        list: without GANG_SECRET anybody can send reports, so these may be forged. Empty if GANG_SECRET is set.
        """
        if self.secret:
            return []
        await asyncio.gather(*(self._exchange_reports(member, LinkResult()) for member in members))
        self.part_reports |= {part: report for part, report in self._direct_reports.items() if report.has_valid_plan}
        return sorted(self.part_reports.keys() - self._direct_reports.keys() - {self.plan.part})

    def known_reports(self) -> dict[int, PartReport]:
        """Returns the last report of each part, by part number. If a part gave up, its report contains the reason."""
        return self.part_reports | self.farewells

    async def _linger(self, members: list[Member], seconds: float) -> None:
        """Sends the final reports to the other parts once: some of them may be unable to connect to this part.

        Then waits until `seconds` have passed in all, so that this part can still reply to requests.
        """
        end = time.monotonic() + seconds
        try:
            async with asyncio.timeout(seconds):
                await self._gossip(members)
        except TimeoutError:
            log.debug("a part did not receive the final reports in time")
        await asyncio.sleep(max(0.0, end - time.monotonic()))

    async def _gossip(self, members: list[Member], include_unresponsive: bool = False) -> None:
        """Exchanges reports once with each part that has replied before, or with `include_unresponsive` with all."""
        links = self.part_report.links
        targets = [m for m in members if include_unresponsive or (m.index in links and links[m.index].replied)]
        await asyncio.gather(
            *(self._exchange_reports(member, links.setdefault(member.index, LinkResult())) for member in targets)
        )

    async def _report_absent(self, members: list[Member], on_progress: Callable[[str], None]) -> None:
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL_SECONDS)
            absent = [f"{m.name} ({m.ip}:{m.port})" for m in members if m.index not in self.part_reports]
            if absent:
                on_progress("waiting for the doctor of " + ", ".join(absent))


async def _read_greeting(reader: asyncio.StreamReader, member: Member) -> Greeting:
    """Reads the greeting of the doctor of the part `member`.

    Raises NotADoctorError if no greeting arrives, and WrongPartError if it comes from a different part.
    """
    address = f"{member.ip}:{member.port + DOCTOR_PORT_OFFSET}"
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            greeting = await Greeting.read(reader)
    except (TimeoutError, ConnectionResetError) as error:
        raise NotADoctorError(f"the program at {address} is not rtp-llm-doctor: it sends no greeting") from error
    if greeting.part != member.index:
        raise WrongPartError(f"part{greeting.part} instead of part{member.index} answers at {address}")
    return greeting
