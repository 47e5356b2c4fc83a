"""All rows together: what every part can work out in the same way, so that all print the same verdict."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from doctor.gang.row import Link, Row
from rtp_llm.parallel.plan import Plan

FILTERED = ("timeout", "unreachable")


@dataclass(frozen=True)
class GangView:
    """`rows` by part. Nothing here depends on which part looks at it."""

    rows: Mapping[int, Row]
    plan: Plan

    @property
    def fit(self) -> list[Row]:
        """The parts that have a plan and look for the others where they are (N-04); of another nothing can be compared
        but its problems."""
        return [row for _, row in sorted(self.rows.items()) if row.fit and "N-04" not in row.problems]

    @property
    def absent(self) -> list[int]:
        """Parts of which nothing was heard; where somebody answers, though in words we cannot accept, it is another
        check's matter."""
        met = {
            part
            for row in self.rows.values()
            for part, link in row.links.items()
            if link.refusal or link.foreign or link.misled or link.stuck
        }
        return [part for part in range(self.plan.num_parts) if part not in self.rows and part not in met]

    def _unheard(self) -> Iterable[tuple[Row, int, Link]]:
        """(from, part, link) of the ways to parts whose rows never came."""
        for _, row in sorted(self.rows.items()):
            for part, link in sorted(row.links.items()):
                if part not in self.rows:
                    yield row, part, link

    def refusals(self) -> list[str]:
        """Who would not talk to whom, and why."""
        return [f"part{row.part} -> part{part}: {link.refusal}" for row, part, link in self._unheard() if link.refusal]

    def strangers(self) -> list[tuple[int, int, str]]:
        """(from, to, address) where something answers that is no doctor, and nothing was heard of the part."""
        return [(row.part, part, link.foreign) for row, part, link in self._unheard() if link.foreign]

    def misled(self) -> list[str]:
        """Ways that lead to another part than was meant."""
        return [
            f"part{row.part} -> part{part}: {link.misled}"
            for row in self.fit
            for part, link in sorted(row.links.items())
            if link.misled
        ]

    def stalled(self) -> list[str]:
        """Ways on which short messages pass and long ones do not."""
        return [
            f"part{row.part} -> part{part}: {link.blob or 'it greets, and sends no answer'}"
            for row in self.fit
            for part, link in sorted(row.links.items())
            if link.blob or (link.stuck and not link.answered)
        ]

    def untried(self) -> list[tuple[Row, Row]]:
        """Ways that a part had not tried when the time was up."""
        return [
            (one, other)
            for one in self.fit
            for other in self.fit
            if one is not other and not one.done and not one.links.get(other.part, Link()).ports
        ]

    def untransferred(self) -> list[tuple[Row, Row]]:
        """Ways on which no large transfer came to an end. Where another program has the responder's port, that part
        has said so (N-08)."""
        found = [
            (one, other)
            for one, other, link in self.links()
            if not (link.sent_speed and link.received_speed) and "N-08" not in other.problems
        ]
        return found + [way for way in self.untried() if way not in found]

    @property
    def present_names(self) -> list[str]:
        return [f"part{row.part} {row.name} {row.address}" for _, row in sorted(self.rows.items())]

    def links(self) -> Iterable[tuple[Row, Row, Link]]:
        """(from, to, link) for every direction between parts that are here and have a plan."""
        for row in self.fit:
            for other, link in sorted(row.links.items()):
                if self.rows.get(other) in self.fit and not link.misled:
                    yield row, self.rows[other], link

    def closed(self, row: Row, other: Row) -> dict[int, str]:
        """Ports of `other` that `row` cannot reach. A refusal only counts where something was listening."""
        link = row.links.get(other.part)
        if link is None:
            return {}
        bad = {p: o for p, o in link.ports.items() if o != "open"}
        if "N-08" in other.problems:  # it has said itself who has its ports
            bad = {p: o for p, o in bad.items() if o != "foreign"}
        if not other.listening:  # the real listeners may come later: a refusal shows that the way is open
            bad = {p: o for p, o in bad.items() if o not in ("refused", "foreign") or p in other.random_ports}
        return bad

    def differing(self, prefix: str) -> dict[str, dict[str, str]]:
        """Facts of this prefix that are not the same on all parts, by part."""
        keys = sorted({k for row in self.fit for k in row.facts if k.startswith(prefix)})
        found = {}
        for key in keys:
            values = {f"part{row.part}": row.facts.get(key, "(unset)") for row in self.fit}
            if len(set(values.values())) > 1:
                found[key] = values
        return found

    def drift(self) -> dict[str, dict[str, str]]:
        return self.differing("")

    # GPUs over parts

    def gpu_kinds(self) -> dict[str, tuple[str, int, tuple[int, int] | None]]:
        kinds = {}
        for row in self.fit:
            for gpu in row.identity.get("gpus", []):
                capability = tuple(gpu["capability"]) if gpu["capability"] else None
                kinds[gpu["uuid"]] = (gpu["name"], gpu["total"], capability)
        return kinds

    def shared_gpus(self) -> dict[str, list[str]]:
        """Parts by GPU, for GPUs that more than one part wants to use."""
        users: dict[str, list[str]] = {}
        for row in self.fit:
            for gpu in row.identity.get("gpus", []):
                users.setdefault(gpu["uuid"], []).append(f"part{row.part}")
        return {uuid: parts for uuid, parts in users.items() if len(parts) > 1}

    # Machines over parts

    def confused_hosts(self) -> list[tuple[str, str]]:
        """Pairs of parts that NCCL would take for one machine, and that share no memory."""
        return self._pairs(lambda a, b: _host_id(a) == _host_id(b) and _memory(a) != _memory(b))

    def separated_hosts(self) -> list[tuple[str, str]]:
        """Pairs of parts on one machine that NCCL would take for two."""
        return self._pairs(lambda a, b: a.get("boot_id") == b.get("boot_id") != "" and _host_id(a) != _host_id(b))

    def _pairs(self, judge: Any) -> list[tuple[str, str]]:
        return [
            (f"part{one.part}", f"part{other.part}")
            for n, one in enumerate(self.fit)
            for other in self.fit[n + 1 :]
            if judge(one.identity, other.identity)
        ]


def _host_id(identity: Mapping[str, Any]) -> tuple[str, str]:
    """As NCCL makes it: NCCL_HOSTID, or host name and boot id (src/misc/utils.cc)."""
    chosen = str(identity.get("nccl_hostid", ""))
    return (chosen, "") if chosen else (str(identity.get("hostname")), str(identity.get("boot_id")))


def _memory(identity: Mapping[str, Any]) -> tuple[str, str]:
    return str(identity.get("ipc")), str(identity.get("shm_device"))
