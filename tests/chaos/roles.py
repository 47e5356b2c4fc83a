"""Finds the processes of a part by what they do: pids change with every fault, programs' names with the product."""

import json
import re
from contextlib import suppress

from tests.parallel.parts import Part

HELPERS = {
    "supervisord": re.compile(r" -m supervisor\.supervisord "),
    "guard": re.compile(r" -m rtp_llm\.supervise\.guard "),
    "api": re.compile(r" -m rtp_llm\.api\.main "),
    "coordinator": re.compile(r" -m \S*coordinator\S* "),
    "doctor": re.compile(r" -m doctor\.gang_service "),
}
ENGINE = re.compile(r" -m rtp_llm\.engine\.main ")


def rank_pids(part: Part, phase: str = "") -> dict[int, int]:
    """Returns the pids of this part's ranks by rank, from gang.json; without the dead ones, and those of another phase
    than `phase`, if that is given."""
    try:
        ranks = json.loads((part.run_dir / "gang.json").read_text())["ranks"]
    except (OSError, ValueError, AssertionError):  # not written yet
        return {}
    running = part.processes()
    alive = {rank: status for rank, status in ranks.items() if int(status["pid"]) in running}
    return {int(rank): int(status["pid"]) for rank, status in alive.items() if phase in ("", status["phase"])}


def spare_pids(part: Part) -> list[int]:
    """Returns the pids of engine processes that hold no rank."""
    holders = set(rank_pids(part).values())
    return sorted(pid for pid, command in part.processes().items() if ENGINE.search(command) and pid not in holders)


def helper_pid(part: Part, name: str) -> int | None:
    """Returns the pid of `supervisord`, `guard`, `api`, `coordinator` or `doctor`; None if it does not run."""
    with suppress(StopIteration):
        return next(pid for pid, command in part.processes().items() if HELPERS[name].search(command))
    return None
