"""The reports of all parts and what follows from them (absent parts, differences, failed connections).

Every part has the same reports, so every part comes to the same conclusions.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

from doctor.gang.part_report import LinkResult, PartReport
from rtp_llm.parallel.plan import Plan

Identity = Mapping[str, Any]


@dataclass(frozen=True)
class GangView:
    """The reports of all parts (containers), which gang checks compare. `part_reports`: by part number; absent parts
    have none. `plan`: the layout of ranks and addresses that follows from this part's settings."""

    part_reports: Mapping[int, PartReport]
    plan: Plan

    @cached_property
    def comparable(self) -> list[PartReport]:
        """Returns the reports that can be compared: those of parts with a valid plan and without an error of check N-04
        (the part's address in the member list is an address of its machine).

        Of other reports only `problems` is meaningful.
        """
        return [r for _, r in sorted(self.part_reports.items()) if r.has_valid_plan and "N-04" not in r.problems]

    @property
    def absent(self) -> list[int]:
        """Returns the numbers of the parts that sent no report and at whose address no program answers.

        If a program answers there (another part, an incompatible doctor, another server), the part is not in the
        result: other checks report that program.
        """
        answering = {
            part
            for part_report in self.part_reports.values()
            for part, link in part_report.links.items()
            if link.protocol_error or link.foreign_address or link.wrong_part or link.reply_timed_out
        }
        return [part for part in range(self.plan.num_parts) if part not in self.part_reports and part not in answering]

    def _links_to_missing(self) -> Iterable[tuple[PartReport, int, LinkResult]]:
        """Yields (source part's report, target part's number, result of the link) for targets that sent no report."""
        for _, source in sorted(self.part_reports.items()):
            for part, link in sorted(source.links.items()):
                if part not in self.part_reports:
                    yield source, part, link

    def _link_errors(self, error_of: Callable[[LinkResult], str]) -> list[str]:
        """Returns "part0 -> part1: error" for links from comparable parts, i.e. those with a valid plan.

        `error_of`: returns the error of a link, or an empty text.
        """
        return [
            f"{source.label} -> part{part}: {error_of(link)}"
            for source in self.comparable
            for part, link in sorted(source.links.items())
            if error_of(link)
        ]

    def protocol_errors(self) -> list[str]:
        """Returns texts "part0 -> part1: error" for parts that sent no report because their doctor has another protocol
        version or another GANG_SECRET.
        """
        return [
            f"{source.label} -> part{part}: {link.protocol_error}"
            for source, part, link in self._links_to_missing()
            if link.protocol_error
        ]

    def foreign_listeners(self) -> list[tuple[int, int, str]]:
        """Returns the programs that answer on the doctor's port of a part that sent no report: (number of the part that
        connected, number of the part that it expected, ip:port).
        """
        return [
            (source.part, part, link.foreign_address)
            for source, part, link in self._links_to_missing()
            if link.foreign_address
        ]

    def wrong_part_links(self) -> list[str]:
        """Returns texts "part0 -> part1: error" for connections that reached a different part than the member list
        says.
        """
        return self._link_errors(lambda link: link.wrong_part)

    def stalled(self) -> list[str]:
        """Returns texts "part0 -> part1: error" for connections on which short messages arrive, but large transfers or
        replies do not.
        """

        def error_of(link: LinkResult) -> str:
            no_reply = "the doctor sends a greeting but no reply" if link.reply_timed_out and not link.replied else ""
            return link.transfer_error or no_reply

        return self._link_errors(error_of)

    def unprobed(self) -> list[tuple[PartReport, PartReport]]:
        """Returns the connections that were not probed before the deadline, as (report of the part that connects,
        report of the target).
        """
        return [
            (source, target)
            for source in self.comparable
            for target in self.comparable
            if source is not target
            and not source.probing_done
            and not source.links.get(target.part, LinkResult()).ports
        ]

    def links_without_transfer(self) -> list[tuple[PartReport, PartReport]]:
        """Returns the connections on which the large test transfers did not finish in both directions, as (report of
        the part that connects, report of the target).

        Excludes targets that report that another program uses one of their ports (check N-08), but includes `unprobed`.
        """
        without_transfer = [
            (source, target)
            for source, target, link in self.links()
            if not (link.sent_speed and link.received_speed) and "N-08" not in target.problems
        ]
        return without_transfer + [link for link in self.unprobed() if link not in without_transfer]

    @property
    def present_names(self) -> list[str]:
        return [f"{r.label} {r.name} {r.address}" for _, r in sorted(self.part_reports.items())]

    def links(self) -> Iterable[tuple[PartReport, PartReport, LinkResult]]:
        """Yields (report of the part that connects, report of the target, what the first found) for every connection
        between `comparable` parts. A -> B and B -> A are two connections.
        """
        targets = {part_report.part: part_report for part_report in self.comparable}
        for source in self.comparable:
            for part, link in sorted(source.links.items()):
                if part in targets and not link.wrong_part:
                    yield source, targets[part], link

    def unreachable_ports(self, source: PartReport, target: PartReport) -> dict[int, str]:
        """Returns the ports of the part `target` to which the part `source` could not connect: {port: result of the
        attempt, such as "timeout"}. Omits failures that `target` itself reports, or that only mean that its server does
        not listen yet.
        """
        link = source.links.get(target.part)
        if link is None:
            return {}
        ports = {port: result for port, result in link.ports.items() if result != "open"}
        if "N-08" in target.problems:  # the target itself reports the program that holds its ports
            ports = {port: result for port, result in ports.items() if result != "not_doctor"}
        if not target.listening:  # the server may listen later; "refused" shows that no firewall drops the packets
            ports = {
                port: result
                for port, result in ports.items()
                if result not in ("refused", "not_doctor") or port in target.ephemeral_ports
            }
        return ports

    def differences(self, prefix: str) -> dict[str, dict[str, str]]:
        """Returns the facts (settings, versions … by dotted name) that differ between parts and whose name begins with
        `prefix`: {name: {part label, such as "part0": value}}.
        """
        names = sorted({name for r in self.comparable for name in r.facts if name.startswith(prefix)})
        values = {name: {r.label: r.facts.get(name, "(unset)") for r in self.comparable} for name in names}
        return {name: by_part for name, by_part in values.items() if len(set(by_part.values())) > 1}

    # GPUs of all parts

    def _gpus(self) -> Iterable[tuple[PartReport, Mapping[str, Any]]]:
        return ((r, gpu) for r in self.comparable for gpu in r.identity.get("gpus", []))

    def gpu_kinds(self) -> dict[str, tuple[str, int, tuple[int, int] | None]]:
        """Returns (model name, memory in bytes, compute capability) of the GPUs that the ranks of all parts use, by
        UUID.
        """
        return {
            gpu["uuid"]: (gpu["name"], gpu["total"], tuple(gpu["capability"]) if gpu["capability"] else None)
            for _, gpu in self._gpus()
        }

    def shared_gpus(self) -> dict[str, list[str]]:
        """Returns the GPUs that more than one rank uses: {GPU UUID: names of the parts of these ranks, such as
        "part0"}.
        """
        users: dict[str, list[str]] = {}
        for part_report, gpu in self._gpus():
            users.setdefault(gpu["uuid"], []).append(part_report.label)
        return {uuid: labels for uuid, labels in users.items() if len(labels) > 1}

    # Machines of all parts

    def hosts_sharing_nccl_id(self) -> list[tuple[str, str]]:
        """Returns pairs of names of parts ("part0", "part1") that NCCL takes for one machine, because their host ids
        are equal, although they do not share /dev/shm.
        """
        return self._pairs(lambda a, b: _nccl_host_id(a) == _nccl_host_id(b) and _shared_memory(a) != _shared_memory(b))

    def separated_hosts(self) -> list[tuple[str, str]]:
        """Returns pairs of names of parts ("part0", "part1") on one machine that NCCL takes for two machines, because
        their host ids differ.
        """
        return self._pairs(
            lambda a, b: a.get("boot_id") == b.get("boot_id") != "" and _nccl_host_id(a) != _nccl_host_id(b)
        )

    def _pairs(self, matches: Callable[[Identity, Identity], bool]) -> list[tuple[str, str]]:
        return [(a.label, b.label) for a, b in combinations(self.comparable, 2) if matches(a.identity, b.identity)]


def _nccl_host_id(identity: Identity) -> tuple[str, str]:
    """Returns what NCCL hashes to identify a machine: NCCL_HOSTID, or host name and boot id (src/misc/utils.cc)."""
    configured = str(identity.get("nccl_hostid", ""))
    return (configured, "") if configured else (str(identity.get("hostname")), str(identity.get("boot_id")))


def _shared_memory(identity: Identity) -> tuple[str, str]:
    return str(identity.get("ipc")), str(identity.get("shm_device"))
