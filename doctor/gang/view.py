"""All rows together: what every part can work out in the same way, so that all print the same verdict."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from doctor.gang.part_report import LinkResult, PartReport
from rtp_llm.parallel.plan import Plan

FILTERED = ("timeout", "unreachable")


@dataclass(frozen=True)
class GangView:
    """`rows` by part. Nothing here depends on which part looks at it."""

    part_reports: Mapping[int, PartReport]
    plan: Plan

    @property
    def comparable(self) -> list[PartReport]:
        """The parts that have a plan and look for the others where they are (N-04); of another nothing can be compared
        but its problems."""
        return [
            part_report
            for _, part_report in sorted(self.part_reports.items())
            if part_report.has_valid_plan and "N-04" not in part_report.problems
        ]

    @property
    def absent(self) -> list[int]:
        """Parts of which nothing was heard; where somebody answers, though in words we cannot accept, it is another
        check's matter."""
        met = {
            part
            for part_report in self.part_reports.values()
            for part, link in part_report.links.items()
            if link.refusal or link.foreign_address or link.wrong_part or link.reply_timed_out
        }
        return [part for part in range(self.plan.num_parts) if part not in self.part_reports and part not in met]

    def _links_to_missing(self) -> Iterable[tuple[PartReport, int, LinkResult]]:
        """(from, part, link) of the ways to parts whose rows never came."""
        for _, part_report in sorted(self.part_reports.items()):
            for part, link in sorted(part_report.links.items()):
                if part not in self.part_reports:
                    yield part_report, part, link

    def refusals(self) -> list[str]:
        """Who would not talk to whom, and why."""
        return [
            f"part{part_report.part} -> part{part}: {link.refusal}"
            for part_report, part, link in self._links_to_missing()
            if link.refusal
        ]

    def foreign_listeners(self) -> list[tuple[int, int, str]]:
        """(from, to, address) where something answers that is no doctor, and nothing was heard of the part."""
        return [
            (part_report.part, part, link.foreign_address)
            for part_report, part, link in self._links_to_missing()
            if link.foreign_address
        ]

    def wrong_part_links(self) -> list[str]:
        """Ways that lead to another part than was meant."""
        return [
            f"part{part_report.part} -> part{part}: {link.wrong_part}"
            for part_report in self.comparable
            for part, link in sorted(part_report.links.items())
            if link.wrong_part
        ]

    def stalled(self) -> list[str]:
        """Ways on which short messages pass and long ones do not."""
        return [
            f"part{part_report.part} -> part{part}: {link.transfer_error or 'it greets, and sends no answer'}"
            for part_report in self.comparable
            for part, link in sorted(part_report.links.items())
            if link.transfer_error or (link.reply_timed_out and not link.answered)
        ]

    def unprobed(self) -> list[tuple[PartReport, PartReport]]:
        """Ways that a part had not tried when the time was up."""
        return [
            (one, other)
            for one in self.comparable
            for other in self.comparable
            if one is not other and not one.probing_done and not one.links.get(other.part, LinkResult()).ports
        ]

    def links_without_transfer(self) -> list[tuple[PartReport, PartReport]]:
        """Ways on which no large transfer came to an end. Where another program has the responder's port, that part
        has said so (N-08)."""
        found = [
            (one, other)
            for one, other, link in self.links()
            if not (link.sent_speed and link.received_speed) and "N-08" not in other.problems
        ]
        return found + [way for way in self.unprobed() if way not in found]

    @property
    def present_names(self) -> list[str]:
        return [
            f"part{part_report.part} {part_report.name} {part_report.address}"
            for _, part_report in sorted(self.part_reports.items())
        ]

    def links(self) -> Iterable[tuple[PartReport, PartReport, LinkResult]]:
        """(from, to, link) for every direction between parts that are here and have a plan."""
        for part_report in self.comparable:
            for other, link in sorted(part_report.links.items()):
                if self.part_reports.get(other) in self.comparable and not link.wrong_part:
                    yield part_report, self.part_reports[other], link

    def unreachable_ports(self, part_report: PartReport, other: PartReport) -> dict[int, str]:
        """Ports of `other` that `row` cannot reach. A refusal only counts where something was listening."""
        link = part_report.links.get(other.part)
        if link is None:
            return {}
        bad = {p: o for p, o in link.ports.items() if o != "open"}
        if "N-08" in other.problems:  # it has said itself who has its ports
            bad = {p: o for p, o in bad.items() if o != "foreign"}
        if not other.listening:  # the real listeners may come later: a refusal shows that the way is open
            bad = {p: o for p, o in bad.items() if o not in ("refused", "foreign") or p in other.ephemeral_ports}
        return bad

    def differences(self, prefix: str) -> dict[str, dict[str, str]]:
        """Facts of this prefix that are not the same on all parts, by part."""
        keys = sorted({k for part_report in self.comparable for k in part_report.facts if k.startswith(prefix)})
        found = {}
        for key in keys:
            values = {
                f"part{part_report.part}": part_report.facts.get(key, "(unset)") for part_report in self.comparable
            }
            if len(set(values.values())) > 1:
                found[key] = values
        return found

    def drift(self) -> dict[str, dict[str, str]]:
        return self.differences("")

    # GPUs over parts

    def gpu_kinds(self) -> dict[str, tuple[str, int, tuple[int, int] | None]]:
        kinds = {}
        for part_report in self.comparable:
            for gpu in part_report.identity.get("gpus", []):
                capability = tuple(gpu["capability"]) if gpu["capability"] else None
                kinds[gpu["uuid"]] = (gpu["name"], gpu["total"], capability)
        return kinds

    def shared_gpus(self) -> dict[str, list[str]]:
        """Parts by GPU, for GPUs that more than one part wants to use."""
        users: dict[str, list[str]] = {}
        for part_report in self.comparable:
            for gpu in part_report.identity.get("gpus", []):
                users.setdefault(gpu["uuid"], []).append(f"part{part_report.part}")
        return {uuid: parts for uuid, parts in users.items() if len(parts) > 1}

    # Machines over parts

    def hosts_sharing_nccl_id(self) -> list[tuple[str, str]]:
        """Pairs of parts that NCCL would take for one machine, and that share no memory."""
        return self._pairs(lambda a, b: _host_id(a) == _host_id(b) and _memory(a) != _memory(b))

    def separated_hosts(self) -> list[tuple[str, str]]:
        """Pairs of parts on one machine that NCCL would take for two."""
        return self._pairs(lambda a, b: a.get("boot_id") == b.get("boot_id") != "" and _host_id(a) != _host_id(b))

    def _pairs(self, judge: Any) -> list[tuple[str, str]]:
        return [
            (f"part{one.part}", f"part{other.part}")
            for n, one in enumerate(self.comparable)
            for other in self.comparable[n + 1 :]
            if judge(one.identity, other.identity)
        ]


def _host_id(identity: Mapping[str, Any]) -> tuple[str, str]:
    """As NCCL makes it: NCCL_HOSTID, or host name and boot id (src/misc/utils.cc)."""
    chosen = str(identity.get("nccl_hostid", ""))
    return (chosen, "") if chosen else (str(identity.get("hostname")), str(identity.get("boot_id")))


def _memory(identity: Mapping[str, Any]) -> tuple[str, str]:
    return str(identity.get("ipc")), str(identity.get("shm_device"))
