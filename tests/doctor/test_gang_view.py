"""What rows of several parts say together, for what no lab of two processes on one machine can make."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from doctor.check import REGISTRY
from doctor.context import CheckContext
from doctor.executor import run_checks
from doctor.gang.facts import local_part_report
from doctor.gang.part_report import LinkResult, PartReport
from doctor.gang.view import GangView
from doctor.report import Finding
from tests.doctor.fixtures import FakeHost, by_id, problems
from tests.doctor.test_gpu_faults import FaultyGpuPart, gpu_part  # noqa: F401  # a fixture

MEMBERS = {f"x_part{n}": {"name": f"x_part{n}", "ip": f"10.0.0.{5 + n}", "port": 10000} for n in range(3)}
GANG = ("C-01", "C-02", "G-10", "G-11")


class FakeGang:
    """Three parts that have met, all well, as part 0 sees it."""

    def __init__(self, root: Path):
        env = {"JSON_GANG_PARTS": json.dumps(MEMBERS), "TP_SIZE": "3", "LOCAL_WORLD_SIZE": "1", "WORLD_RANK": "0"}
        self.ctx = CheckContext(FakeHost(root, env))
        plan = self.ctx.plan
        assert plan
        self.part_reports = {
            n: PartReport.from_json(local_part_report(self.ctx, plan, {}, True).to_json()) for n in range(3)
        }
        for part, part_report in self.part_reports.items():
            part_report.part, part_report.name, part_report.address = part, f"x_part{part}", f"10.0.0.{5 + part}"
            part_report.ephemeral_ports, part_report.probing_done, part_report.received_from = (
                [40001, 40002, 40003],
                True,
                [0, 1, 2],
            )
            part_report.identity = part_report.identity | {"hostname": f"box{part}", "boot_id": f"boot{part}"}
            part_report.links = {n: self.link() for n in range(3) if n != part}

    def link(self) -> LinkResult:
        ports = dict.fromkeys((10000, 10003, 40001, 40002, 40003), "open")
        speed = 2e9
        return LinkResult(
            ports, True, sent_speed=speed, received_speed=speed, rtt=2e-4, clock_offset=0.001, clock_error=1e-4
        )

    def find(self) -> list[Finding]:
        plan = self.ctx.plan
        assert plan
        # As they come over the wire.
        part_reports = {
            part: PartReport.from_json(json.loads(json.dumps(part_report.to_json())))
            for part, part_report in self.part_reports.items()
        }
        self.ctx.gang = GangView(part_reports, plan)
        return run_checks([c for c in REGISTRY.values() if c.tier == 2 or c.id in GANG], self.ctx)


@pytest.fixture
def gang(tmp_path: Path) -> FakeGang:
    return FakeGang(tmp_path)


def close(gang: FakeGang, one: int, other: int, how: str, *ports: int) -> None:
    for port in ports:
        gang.part_reports[one].links[other].ports[port] = how


def differ(gang: FakeGang, key: str, value: str) -> None:
    gang.part_reports[2].facts[key] = value


def absent(gang: FakeGang) -> None:
    del gang.part_reports[2]
    for part_report in gang.part_reports.values():
        part_report.links[2] = LinkResult({10003: "timeout"})


def each(*steps: Callable[[FakeGang], object]) -> Callable[[FakeGang], None]:
    """One fault of several steps."""

    def make(it: FakeGang) -> None:
        for step in steps:
            step(it)

    return make


FAULTS: dict[str, tuple[str, Callable[[FakeGang], Any], str, str]] = {
    "NCCL's version": ("C-03", lambda m: differ(m, "gpu.nccl", "2.27.5"), "error", "gpu.nccl: part0=(unset)"),
    "torch's version": ("C-04", lambda m: differ(m, "version.torch", "2.11"), "error", "part2=2.11"),
    "a driver": ("C-04", lambda m: differ(m, "gpu.driver", "550"), "warn", "part2=550"),
    "a plan": ("C-01", lambda m: differ(m, "plan.tp_size", "6"), "error", "plan.tp_size: part0=3 part1=3 part2=6"),
    "a list": ("C-02", lambda m: differ(m, "members", "[]"), "error", "part2=[]"),
    "a check set": ("C-10", lambda m: differ(m, "doctor.checks", "7"), "error", "part2=7"),
    "a clock": (
        "C-08",
        lambda m: setattr(m.part_reports[1].links[2], "clock_offset", 31.5),
        "warn",
        "part2 is +31.500 s",
    ),
    "a slow link": ("N-13", lambda m: setattr(m.part_reports[2].links[0], "sent_speed", 1e7), "warn", "9.5 MiB/s"),
    "a stalled transfer": (
        "N-10",
        lambda m: setattr(m.part_reports[0].links[1], "transfer_error", "8 MiB sent: stalled"),
        "error",
        "part0 -> part1: 8 MiB sent: stalled",
    ),
    "long answers are lost": (
        "N-10",
        each(
            lambda m: m.part_reports[0].links.update(
                {1: LinkResult(dict.fromkeys((10000, 10003), "open"), reply_timed_out=True)}
            ),
            lambda m: setattr(m.part_reports[1].links[0], "transfer_error", "8 MiB received: stalled"),
        ),
        "error",
        "part0 -> part1: it greets, and sends no answer; part1 -> part0: 8 MiB received: stalled; MTU",
    ),
    "no transfer was made": (
        "N-10",
        lambda m: m.part_reports[0].links.update({1: LinkResult(dict.fromkeys((10000, 10003, 40001), "open"))}),
        "unknown",
        "no transfer of 8 MiB was completed: part0 -> part1",
    ),
    "the time was up": (
        "N-01",
        each(
            lambda m: setattr(m.part_reports[1], "probing_done", False),
            lambda m: m.part_reports[1].links.update({2: LinkResult()}),
        ),
        "unknown",
        "not all directions were tried in time: part1 -> part2",
    ),
    "another part answers": (
        "C-01",
        lambda m: setattr(m.part_reports[0].links[1], "wrong_part", "part2 answers at 10.0.0.6:10003"),
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
        "no response from part2 (10.0.0.7:10000, rank 2) (port 10003 does not respond",
    ),
    "a problem elsewhere": (
        "C-11",
        lambda m: m.part_reports[1].problems.update({"S-01": "small"}),
        "error",
        "part1: S-01 small",
    ),
}


def test_a_gang_that_is_well(gang: FakeGang) -> None:
    assert problems(gang.find()) == {}


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_found_and_nothing_beside_it(name: str, gang: FakeGang) -> None:
    id, make, status, text = FAULTS[name]
    make(gang)
    found = gang.find()
    assert problems(found) == {id: status}
    assert text in by_id(found, id).actual


def test_the_same_verdict_on_every_part(gang: FakeGang) -> None:
    close(gang, 0, 1, "timeout", 10003)
    first = gang.find()
    gang.ctx = CheckContext(FakeHost(gang.ctx.host.root, {**gang.ctx.host.environ, "WORLD_RANK": "1"}))
    gang.ctx.host.__dict__["interfaces"] = gang.ctx.host.interfaces
    gang.ctx.__dict__["plan_result"] = FakeGang(gang.ctx.host.root).ctx.plan_result
    assert [(f.id, f.actual) for f in gang.find()] == [(f.id, f.actual) for f in first]


def on_gpus(gang: FakeGang, gpu_part: FaultyGpuPart) -> FakeGang:  # noqa: F811
    """The same parts, each with a GPU."""
    gang.ctx.__dict__["gpus"] = gpu_part.ctx().gpus
    gang.ctx.__dict__.pop("plan_result", None)
    for part, part_report in gang.part_reports.items():
        gpu = {"uuid": f"GPU-{part}", "name": "NVIDIA H100 80GB HBM3", "total": 80 << 30, "capability": [9, 0]}
        part_report.identity = part_report.identity | {"gpus": [gpu], "ipc": f"ipc:[{part}]", "shm_device": str(part)}
    return gang


@pytest.mark.fault("S-05")
def test_parts_that_look_like_one_machine_and_are_none(gang: FakeGang, gpu_part: FaultyGpuPart) -> None:  # noqa: F811
    on_gpus(gang, gpu_part)
    assert problems(gang.find()) == {}
    for part in (1, 2):
        gang.part_reports[part].identity |= {"hostname": "node", "boot_id": "same"}
    found = gang.find()
    assert problems(found) == {"S-05": "error"}
    assert by_id(found, "S-05").actual == "part1 and part2 look like one machine, and share no memory"
    gang.part_reports[2].identity |= {"hostname": "other"}
    assert problems(gang.find()) == {"S-05": "warn"}


def test_parts_that_use_one_gpu_or_unlike_ones(gang: FakeGang, gpu_part: FaultyGpuPart) -> None:  # noqa: F811
    on_gpus(gang, gpu_part)
    gang.part_reports[2].identity["gpus"][0] |= {"total": 40 << 30}
    assert problems(gang.find()) == {"G-11": "error"}
    gang.part_reports[2].identity["gpus"] = gang.part_reports[1].identity["gpus"]
    found = gang.find()
    assert problems(found) == {"G-10": "error"}
    assert by_id(found, "G-10").actual == "GPU-1 is used by part1 and part2"


def test_a_running_part_is_not_blamed_for_ports_that_are_not_open_yet(gang: FakeGang) -> None:
    for part_report in gang.part_reports.values():
        part_report.listening = False
    close(gang, 0, 1, "refused", 10000)
    assert problems(gang.find()) == {}
    close(gang, 0, 1, "timeout", 10000)
    assert problems(gang.find()) == {"N-01": "error"}


COLLECTIVES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "right": ({"sizes": {8: {"wrong": 0, "seconds": 1e-5}, 65536: {"wrong": 0, "seconds": 1e-4}}}, {}),
    "wrong": ({"sizes": {8: {"wrong": 2, "seconds": 1e-5}}}, {"X-01": "error"}),
    "failed": ({"failure": "rank 1: no end within 55 s; the process was killed"}, {"X-01": "error"}),
    "slow": ({"sizes": {8: {"wrong": 0, "seconds": 0.2}, 65536: {"wrong": 0, "seconds": 0.3}}}, {"X-02": "warn"}),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_what_the_collective_says(name: str, gang: FakeGang) -> None:
    measured, expected = COLLECTIVES[name]
    gang.ctx.collective = {"backend": "TorchGroup", **measured}
    found = run_checks([REGISTRY["X-01"], REGISTRY["X-02"]], gang.ctx)
    assert problems(found) == expected
