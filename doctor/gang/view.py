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
    def absent(self) -> list[int]:
        """Parts that never answered; one that answered in words we cannot accept is there all the same."""
        refused = {part for row in self.rows.values() for part, link in row.links.items() if link.refusal}
        return [part for part in range(self.plan.num_parts) if part not in self.rows and part not in refused]

    def refusals(self) -> list[str]:
        """Who would not talk to whom, and why."""
        return [
            f"part{row.part} -> part{part}: {link.refusal}"
            for _, row in sorted(self.rows.items())
            for part, link in sorted(row.links.items())
            if link.refusal and part not in self.rows
        ]

    @property
    def present_names(self) -> list[str]:
        return [f"part{row.part} {row.name} {row.address}" for _, row in sorted(self.rows.items())]

    def links(self) -> Iterable[tuple[Row, Row, Link]]:
        """(from, to, link) for every direction between parts that are here."""
        for _, row in sorted(self.rows.items()):
            for other, link in sorted(row.links.items()):
                if other in self.rows:
                    yield row, self.rows[other], link

    def closed(self, row: Row, other: Row) -> dict[int, str]:
        """Ports of `other` that `row` cannot reach. A refusal only counts where something was listening."""
        link = row.links.get(other.part)
        if link is None:
            return {}
        bad = {p: o for p, o in link.ports.items() if o != "open"}
        if not other.listening:  # the real listeners may come later: a refusal shows that the way is open
            bad = {p: o for p, o in bad.items() if o not in ("refused", "foreign") or p in other.random_ports}
        return bad

    def differing(self, prefix: str) -> dict[str, dict[str, str]]:
        """Facts of this prefix that are not the same on all parts, by part."""
        keys = sorted({k for row in self.rows.values() for k in row.facts if k.startswith(prefix)})
        found = {}
        for key in keys:
            values = {f"part{p}": row.facts.get(key, "(unset)") for p, row in sorted(self.rows.items())}
            if len(set(values.values())) > 1:
                found[key] = values
        return found

    def drift(self) -> dict[str, dict[str, str]]:
        return self.differing("")

    # GPUs over parts

    def gpu_kinds(self) -> dict[str, tuple[str, int, tuple[int, int] | None]]:
        kinds = {}
        for row in self.rows.values():
            for gpu in row.identity.get("gpus", []):
                capability = tuple(gpu["capability"]) if gpu["capability"] else None
                kinds[gpu["uuid"]] = (gpu["name"], gpu["total"], capability)
        return kinds

    def shared_gpus(self) -> dict[str, list[str]]:
        """Parts by GPU, for GPUs that more than one part wants to use."""
        users: dict[str, list[str]] = {}
        for _, row in sorted(self.rows.items()):
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
        rows = [row for _, row in sorted(self.rows.items())]
        return [
            (f"part{one.part}", f"part{other.part}")
            for n, one in enumerate(rows)
            for other in rows[n + 1 :]
            if judge(one.identity, other.identity)
        ]


def _host_id(identity: Mapping[str, Any]) -> tuple[str, str]:
    """As NCCL makes it: NCCL_HOSTID, or host name and boot id (src/misc/utils.cc)."""
    chosen = str(identity.get("nccl_hostid", ""))
    return (chosen, "") if chosen else (str(identity.get("hostname")), str(identity.get("boot_id")))


def _memory(identity: Mapping[str, Any]) -> tuple[str, str]:
    return str(identity.get("ipc")), str(identity.get("shm_device"))
