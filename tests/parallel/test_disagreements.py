"""Parts that cannot agree: both name the disagreement with its entry, both values and the fix, long before the timeout.

All gangs start together, because they spend most of the time waiting.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from rtp_llm.parallel.plan import DOCTOR_PORT_OFFSET
from tests.parallel.parts import Part
from tests.ports import busy_ports, free_start_port

pytestmark = pytest.mark.slow


def members(*ports: int) -> str:
    return json.dumps({f"x_part{n}": {"ip": "127.0.0.1", "port": port} for n, port in enumerate(ports)})


class Pair:
    """Two parts with one rank each, which never agree. Their processes are killed at the end."""

    def __init__(
        self, settings: dict[str, str], *, wrong_leader_port: bool = False, one_by_one: bool = False, **of_part_1: str
    ):
        """`one_by_one`: part 1 starts when the doctor of part 0 listens: what ends at once waits 5 s for it."""
        self.ports = [free_start_port(), free_start_port()]
        self.wrong_port = free_start_port()
        common = {**settings, "TP_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "JSON_GANG_PARTS": members(*self.ports)}
        if wrong_leader_port:
            of_part_1["JSON_GANG_PARTS"] = members(self.wrong_port, self.ports[1])
        own: list[dict[str, str]] = [{}, of_part_1]
        self.parts: list[Part] = []
        for n, port in enumerate(self.ports):
            self.parts.append(Part({**common, "START_PORT": str(port), "WORLD_RANK": str(n), **own[n]}, port=port))
            if one_by_one and n == 0:
                self.parts[0].until(self._doctor_listens, "the doctor listens")

    def _doctor_listens(self) -> bool:
        return bool(busy_ports([self.ports[0] + DOCTOR_PORT_OFFSET]))


@pytest.fixture(scope="module")
def pairs(settings: dict[str, str]) -> Iterator[dict[str, Pair]]:
    found = {
        "port": Pair(settings, wrong_leader_port=True),
        "refused": Pair(settings, one_by_one=True, WORLD_RANK="5"),
        "secret": Pair(settings, GANG_SECRET="only-here", GANG_TIMEOUT_MIN="5"),
    }
    with ExitStack() as stack:
        for pair in found.values():
            for part in pair.parts:
                stack.callback(part.destroy)
        yield found


def test_port_that_differs_is_named_on_both_parts_and_ends_them(pairs: dict[str, Pair]) -> None:
    """Part 1 looks for part 0 at another port, so they never meet at the rendezvous; only their doctors meet."""
    pair = pairs["port"]
    right, wrong = (f"x_part0 127.0.0.1:{port}" for port in (pair.ports[0], pair.wrong_port))
    assert [part.wait_end() for part in pair.parts] == [69, 69]
    for part in pair.parts:
        assert f"members.part0: part0={right} part1={wrong}" in part.log
        entry = json.dumps({"name": "x_part0", "ip": "127.0.0.1", "port": pair.ports[0]})
        assert f'on part1: "x_part0": {entry} in the member list   as on part0' in part.log
        assert "reach each other and agree" not in part.log


def test_part_that_gives_up_tells_the_other_why(pairs: dict[str, Pair]) -> None:
    waiting, refused = pairs["refused"].parts
    assert refused.wait_end() == 64
    waiting.wait_log("C-11 part1: C-01 WORLD_RANK=5")
    status, text = waiting.fetch("/health")
    assert (status, "part1: C-01 WORLD_RANK=5" in text) == (503, True), text
    assert "reach each other and agree" not in waiting.log


def test_secret_that_only_one_part_has_is_named_on_both(pairs: dict[str, Pair]) -> None:
    for n, part in enumerate(pairs["secret"].parts):
        part.wait_log(f"C-10 part{n} -> part{1 - n}: ")
        assert "GANG_SECRET" in part.log
        assert "only-here" not in part.log
        assert "reach each other and agree" not in part.log
