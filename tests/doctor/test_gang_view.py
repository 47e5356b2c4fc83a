"""What rows of several parts say together, for what no lab of two processes on one machine can make."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from doctor.check import REGISTRY
from doctor.gang.facts import own_row
from doctor.gang.row import Link, Row
from doctor.gang.view import GangView
from doctor.node import Node
from doctor.report import Finding
from doctor.runner import run_checks
from tests.doctor.lab import PlayedHost, by_id, problems
from tests.doctor.test_gpu_faults import Box, box  # noqa: F401  # a fixture

MEMBERS = {f"x_part{n}": {"name": f"x_part{n}", "ip": f"10.0.0.{5 + n}", "port": 10000} for n in range(3)}
GANG = ("C-01", "C-02", "G-10", "G-11")


class Meeting:
    """Three parts that have met, all well, as part 0 sees it."""

    def __init__(self, root: Path):
        env = {"JSON_GANG_PARTS": json.dumps(MEMBERS), "TP_SIZE": "3", "LOCAL_WORLD_SIZE": "1", "WORLD_RANK": "0"}
        self.node = Node(PlayedHost(root, env))
        plan = self.node.plan
        assert plan
        self.rows = {n: Row.from_json(own_row(self.node, plan, {}, True).to_json()) for n in range(3)}
        for part, row in self.rows.items():
            row.part, row.name, row.address = part, f"x_part{part}", f"10.0.0.{5 + part}"
            row.random_ports, row.done, row.seen = [40001, 40002, 40003], True, [0, 1, 2]
            row.identity = row.identity | {"hostname": f"box{part}", "boot_id": f"boot{part}"}
            row.links = {n: self.link() for n in range(3) if n != part}

    def link(self) -> Link:
        ports = dict.fromkeys((10000, 10003, 40001, 40002, 40003), "open")
        speed = 2e9
        return Link(ports, True, sent_speed=speed, received_speed=speed, rtt=2e-4, clock_offset=0.001, clock_error=1e-4)

    def find(self) -> list[Finding]:
        plan = self.node.plan
        assert plan
        # As they come over the wire.
        rows = {part: Row.from_json(json.loads(json.dumps(row.to_json()))) for part, row in self.rows.items()}
        self.node.gang = GangView(rows, plan)
        return run_checks([c for c in REGISTRY.values() if c.tier == 2 or c.id in GANG], self.node)


@pytest.fixture
def meeting(tmp_path: Path) -> Meeting:
    return Meeting(tmp_path)


def close(meeting: Meeting, one: int, other: int, how: str, *ports: int) -> None:
    for port in ports:
        meeting.rows[one].links[other].ports[port] = how


def differ(meeting: Meeting, key: str, value: str) -> None:
    meeting.rows[2].facts[key] = value


def absent(meeting: Meeting) -> None:
    del meeting.rows[2]
    for row in meeting.rows.values():
        row.links[2] = Link({10003: "timeout"})


def each(*steps: Callable[[Meeting], object]) -> Callable[[Meeting], None]:
    """One fault of several steps."""

    def make(it: Meeting) -> None:
        for step in steps:
            step(it)

    return make


FAULTS: dict[str, tuple[str, Callable[[Meeting], Any], str, str]] = {
    "NCCL's version": ("C-03", lambda m: differ(m, "gpu.nccl", "2.27.5"), "error", "gpu.nccl: part0=(unset)"),
    "torch's version": ("C-04", lambda m: differ(m, "version.torch", "2.11"), "error", "part2=2.11"),
    "a driver": ("C-04", lambda m: differ(m, "gpu.driver", "550"), "warn", "part2=550"),
    "a plan": ("C-01", lambda m: differ(m, "plan.tp_size", "6"), "error", "plan.tp_size: part0=3 part1=3 part2=6"),
    "a list": ("C-02", lambda m: differ(m, "members", "[]"), "error", "part2=[]"),
    "a check set": ("C-10", lambda m: differ(m, "doctor.checks", "7"), "error", "part2=7"),
    "a clock": ("C-08", lambda m: setattr(m.rows[1].links[2], "clock_offset", 31.5), "warn", "part2 is +31.500 s"),
    "a slow link": ("N-13", lambda m: setattr(m.rows[2].links[0], "sent_speed", 1e7), "warn", "9.5 MiB/s"),
    "a stalled transfer": (
        "N-10",
        lambda m: setattr(m.rows[0].links[1], "blob", "8 MiB sent: stalled"),
        "error",
        "part0 -> part1: 8 MiB sent: stalled",
    ),
    "long answers are lost": (
        "N-10",
        each(
            lambda m: m.rows[0].links.update({1: Link(dict.fromkeys((10000, 10003), "open"), stuck=True)}),
            lambda m: setattr(m.rows[1].links[0], "blob", "8 MiB received: stalled"),
        ),
        "error",
        "part0 -> part1: it greets, and sends no answer; part1 -> part0: 8 MiB received: stalled; MTU",
    ),
    "no transfer was made": (
        "N-10",
        lambda m: m.rows[0].links.update({1: Link(dict.fromkeys((10000, 10003, 40001), "open"))}),
        "unknown",
        "no transfer of 8 MiB came to an end: part0 -> part1",
    ),
    "the time was up": (
        "N-01",
        each(lambda m: setattr(m.rows[1], "done", False), lambda m: m.rows[1].links.update({2: Link()})),
        "unknown",
        "the time was up before all ways were tried: part1 -> part2",
    ),
    "another part answers": (
        "C-01",
        lambda m: setattr(m.rows[0].links[1], "misled", "part2 answers at 10.0.0.6:10003"),
        "error",
        "part0 -> part1: part2 answers at 10.0.0.6:10003",
    ),
    "nobody listens": (
        "N-01",
        lambda m: close(m, 0, 1, "refused", 10003),
        "error",
        "part0 -> part1 (10.0.0.6): 10003 (doctor (START_PORT + 3)) refused; nothing listens there",
    ),
    "both ways closed": (
        "N-01",
        each(lambda m: close(m, 0, 1, "timeout", 10003), lambda m: close(m, 1, 0, "timeout", 10003)),
        "error",
        "part1 does not reach part0 either",
    ),
    "somebody else listens": ("N-01", lambda m: close(m, 2, 1, "foreign", 10000), "error", "part2 -> part1"),
    "NCCL's ports": (
        "N-02",
        lambda m: close(m, 1, 2, "timeout", 40001, 40002, 40003),
        "error",
        "part2 reaches part1, so incoming connections are filtered at part2",
    ),
    "one is absent": (
        "C-09",
        absent,
        "error",
        "no word from part2 (10.0.0.7:10000, rank 2) (port 10003 does not answer",
    ),
    "a problem elsewhere": (
        "C-11",
        lambda m: m.rows[1].problems.update({"S-01": "small"}),
        "error",
        "part1: S-01 small",
    ),
}


def test_a_gang_that_is_well(meeting: Meeting) -> None:
    assert problems(meeting.find()) == {}


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_found_and_nothing_beside_it(name: str, meeting: Meeting) -> None:
    id, make, status, text = FAULTS[name]
    make(meeting)
    found = meeting.find()
    assert problems(found) == {id: status}
    assert text in by_id(found, id).actual


def test_the_same_verdict_on_every_part(meeting: Meeting) -> None:
    close(meeting, 0, 1, "timeout", 10003)
    first = meeting.find()
    meeting.node = Node(PlayedHost(meeting.node.host.root, {**meeting.node.host.environ, "WORLD_RANK": "1"}))
    meeting.node.host.__dict__["interfaces"] = meeting.node.host.interfaces
    meeting.node.__dict__["planned"] = Meeting(meeting.node.host.root).node.planned
    assert [(f.id, f.actual) for f in meeting.find()] == [(f.id, f.actual) for f in first]


def on_gpus(meeting: Meeting, box: Box) -> Meeting:  # noqa: F811
    """The same parts, each with a GPU."""
    meeting.node.__dict__["gpus"] = box.node().gpus
    meeting.node.__dict__.pop("planned", None)
    for part, row in meeting.rows.items():
        gpu = {"uuid": f"GPU-{part}", "name": "NVIDIA H100 80GB HBM3", "total": 80 << 30, "capability": [9, 0]}
        row.identity = row.identity | {"gpus": [gpu], "ipc": f"ipc:[{part}]", "shm_device": str(part)}
    return meeting


@pytest.mark.fault("S-05")
def test_parts_that_look_like_one_machine_and_are_none(meeting: Meeting, box: Box) -> None:  # noqa: F811
    on_gpus(meeting, box)
    assert problems(meeting.find()) == {}
    for part in (1, 2):
        meeting.rows[part].identity |= {"hostname": "node", "boot_id": "same"}
    found = meeting.find()
    assert problems(found) == {"S-05": "error"}
    assert by_id(found, "S-05").actual == "part1 and part2 look like one machine, and share no memory"
    meeting.rows[2].identity |= {"hostname": "other"}
    assert problems(meeting.find()) == {"S-05": "warn"}


def test_parts_that_use_one_gpu_or_unlike_ones(meeting: Meeting, box: Box) -> None:  # noqa: F811
    on_gpus(meeting, box)
    meeting.rows[2].identity["gpus"][0] |= {"total": 40 << 30}
    assert problems(meeting.find()) == {"G-11": "error"}
    meeting.rows[2].identity["gpus"] = meeting.rows[1].identity["gpus"]
    found = meeting.find()
    assert problems(found) == {"G-10": "error"}
    assert by_id(found, "G-10").actual == "GPU-1 is used by part1 and part2"


def test_a_running_part_is_not_blamed_for_ports_that_are_not_open_yet(meeting: Meeting) -> None:
    for row in meeting.rows.values():
        row.listening = False
    close(meeting, 0, 1, "refused", 10000)
    assert problems(meeting.find()) == {}
    close(meeting, 0, 1, "timeout", 10000)
    assert problems(meeting.find()) == {"N-01": "error"}


COLLECTIVES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "right": ({"sizes": {8: {"wrong": 0, "seconds": 1e-5}, 65536: {"wrong": 0, "seconds": 1e-4}}}, {}),
    "wrong": ({"sizes": {8: {"wrong": 2, "seconds": 1e-5}}}, {"X-01": "error"}),
    "failed": ({"failure": "rank 1: no end within 55 s; the process was killed"}, {"X-01": "error"}),
    "slow": ({"sizes": {8: {"wrong": 0, "seconds": 0.2}, 65536: {"wrong": 0, "seconds": 0.3}}}, {"X-02": "warn"}),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_what_the_collective_says(name: str, meeting: Meeting) -> None:
    measured, expected = COLLECTIVES[name]
    meeting.node.collective = {"backend": "TorchGroup", **measured}
    found = run_checks([REGISTRY["X-01"], REGISTRY["X-02"]], meeting.node)
    assert problems(found) == expected
