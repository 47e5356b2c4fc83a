"""Findings from the reports of several parts, for faults that two processes on one machine cannot produce."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from doctor.check import REGISTRY
from doctor.checks.alignment import alignment
from doctor.context import CheckContext
from doctor.executor import run_checks
from doctor.gang.facts import local_part_report
from doctor.gang.part_report import LinkResult, PartReport
from doctor.gang.view import GangView
from doctor.report import Finding
from tests.doctor.fixtures import FakeHost, by_id, problems
from tests.doctor.test_gpu_faults import FakeGpuPart, gpu_part  # noqa: F401  # a fixture

MEMBERS = {f"x_part{n}": {"name": f"x_part{n}", "ip": f"10.0.0.{5 + n}", "port": 10000} for n in range(3)}
GANG = ("C-01", "C-02", "G-10", "G-11")


class FakeGang:
    """The reports of three healthy parts, as part 0 has them when their doctors have exchanged reports."""

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
            part_report.ephemeral_ports = [40001, 40002, 40003]
            part_report.probing_done, part_report.received_from = True, [0, 1, 2]
            part_report.identity = part_report.identity | {"hostname": f"box{part}", "boot_id": f"boot{part}"}
            part_report.links = {n: self.link() for n in range(3) if n != part}

    def link(self) -> LinkResult:
        ports = dict.fromkeys((10000, 10003, 40001, 40002, 40003), "open")
        return LinkResult(
            ports, replied=True, sent_speed=2e9, received_speed=2e9, rtt=2e-4, clock_offset=0.001, clock_error=1e-4
        )

    def run_gang_checks(self) -> list[Finding]:
        plan = self.ctx.plan
        assert plan
        # Encoded as on the wire.
        part_reports = {
            part: PartReport.from_json(json.loads(json.dumps(part_report.to_json())))
            for part, part_report in self.part_reports.items()
        }
        self.ctx.gang = GangView(part_reports, plan)
        return run_checks([c for c in REGISTRY.values() if c.tier == 2 or c.id in GANG], self.ctx)


@pytest.fixture
def gang(tmp_path: Path) -> FakeGang:
    return FakeGang(tmp_path)


def set_ports(gang: FakeGang, source: int, target: int, result: str, *ports: int) -> None:
    gang.part_reports[source].links[target].ports |= dict.fromkeys(ports, result)


def set_fact(gang: FakeGang, key: str, value: str) -> None:
    gang.part_reports[2].facts[key] = value


def remove_part(gang: FakeGang) -> None:
    del gang.part_reports[2]
    for part_report in gang.part_reports.values():
        part_report.links[2] = LinkResult({10003: "timeout"})


def combine(*steps: Callable[[FakeGang], object]) -> Callable[[FakeGang], None]:
    """Returns a function that causes several faults, one after another."""

    def inject(gang: FakeGang) -> None:
        for step in steps:
            step(gang)

    return inject


FAULTS: dict[str, tuple[str, Callable[[FakeGang], Any], str, str]] = {
    "NCCL's version": ("C-03", lambda gang: set_fact(gang, "gpu.nccl", "2.27.5"), "error", "gpu.nccl: part0=(unset)"),
    "torch's version": ("C-04", lambda gang: set_fact(gang, "version.torch", "2.11"), "error", "part2=2.11"),
    "a driver": ("C-04", lambda gang: set_fact(gang, "gpu.driver", "550"), "warn", "part2=550"),
    "a plan": (
        "C-01",
        lambda gang: set_fact(gang, "plan.tp_size", "6"),
        "error",
        "plan.tp_size: part0=3 part1=3 part2=6",
    ),
    "an entry of the list": (
        "C-02",
        lambda gang: set_fact(gang, "members.part1", "x_part1 :20000"),
        "error",
        "members.part1: part0=x_part1 :10000 part1=x_part1 :10000 part2=x_part1 :20000",
    ),
    "a set of checks": ("C-10", lambda gang: set_fact(gang, "doctor.checks", "7"), "error", "part2=7"),
    "a clock": (
        "C-08",
        lambda gang: setattr(gang.part_reports[1].links[2], "clock_offset", 31.5),
        "warn",
        "the clock of part2 differs from part1's by +31.500 s",
    ),
    "a slow link": (
        "N-13",
        lambda gang: setattr(gang.part_reports[2].links[0], "sent_speed", 1e7),
        "warn",
        "9.5 MiB/s",
    ),
    "a stalled transfer": (
        "N-10",
        lambda gang: setattr(gang.part_reports[0].links[1], "transfer_error", "8 MiB sent: stalled"),
        "error",
        "part0 -> part1: 8 MiB sent: stalled",
    ),
    "long replies are lost": (
        "N-10",
        combine(
            lambda gang: gang.part_reports[0].links.update(
                {1: LinkResult(dict.fromkeys((10000, 10003), "open"), reply_timed_out=True)}
            ),
            lambda gang: setattr(gang.part_reports[1].links[0], "transfer_error", "8 MiB received: stalled"),
        ),
        "error",
        "part0 -> part1: the doctor sends a greeting but no reply; part1 -> part0: 8 MiB received: stalled; MTU",
    ),
    "no transfer was made": (
        "N-10",
        lambda gang: gang.part_reports[0].links.update({1: LinkResult(dict.fromkeys((10000, 10003, 40001), "open"))}),
        "unknown",
        "no transfer of 8 MiB finished in time: part0 -> part1",
    ),
    "the time was up": (
        "N-01",
        combine(
            lambda gang: setattr(gang.part_reports[1], "probing_done", False),
            lambda gang: gang.part_reports[1].links.update({2: LinkResult()}),
        ),
        "unknown",
        "not all links were tested in time: part1 -> part2",
    ),
    "another part answers": (
        "C-01",
        lambda gang: setattr(
            gang.part_reports[0].links[1], "wrong_part", "part2 instead of part1 answers at 10.0.0.6:10003"
        ),
        "error",
        "part0 -> part1: part2 instead of part1 answers at 10.0.0.6:10003",
    ),
    "no listener": (
        "N-01",
        lambda gang: set_ports(gang, 0, 1, "refused", 10003),
        "error",
        "part0 -> part1 (10.0.0.6): 10003 (doctor (START_PORT + 3)) refused; no process listens there",
    ),
    "closed in both directions": (
        "N-01",
        combine(
            lambda gang: set_ports(gang, 0, 1, "timeout", 10003), lambda gang: set_ports(gang, 1, 0, "timeout", 10003)
        ),
        "error",
        "part1 does not reach part0 either",
    ),
    "another program listens": (
        "N-01",
        lambda gang: set_ports(gang, 2, 1, "not_doctor", 10000),
        "error",
        "part2 -> part1",
    ),
    "NCCL's ports": (
        "N-02",
        lambda gang: set_ports(gang, 1, 2, "timeout", 40001, 40002, 40003),
        "error",
        "part2 reaches part1, so incoming connections are filtered at part2",
    ),
    "an absent part": (
        "C-09",
        remove_part,
        "error",
        "no response from part2 (10.0.0.7:10000, rank 2) (port 10003 does not respond",
    ),
    "a problem elsewhere": (
        "C-11",
        lambda gang: gang.part_reports[1].problems.update({"S-01": "small"}),
        "error",
        "part1: S-01 small",
    ),
}


def test_healthy_gang_has_no_problems(gang: FakeGang) -> None:
    assert problems(gang.run_gang_checks()) == {}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_the_only_problem(name: str, gang: FakeGang) -> None:
    id, inject, status, text = FAULTS[name]
    inject(gang)
    findings = gang.run_gang_checks()
    assert problems(findings) == {id: status}
    assert text in by_id(findings, id).actual


def test_findings_are_the_same_on_every_part(gang: FakeGang) -> None:
    set_ports(gang, 0, 1, "timeout", 10003)
    first = gang.run_gang_checks()
    gang.ctx = CheckContext(FakeHost(gang.ctx.host.root, {**gang.ctx.host.environ, "WORLD_RANK": "1"}))
    gang.ctx.host.__dict__["interfaces"] = gang.ctx.host.interfaces
    gang.ctx.__dict__["plan_result"] = FakeGang(gang.ctx.host.root).ctx.plan_result
    assert [(f.id, f.actual) for f in gang.run_gang_checks()] == [(f.id, f.actual) for f in first]


def on_gpus(gang: FakeGang, gpu_part: FakeGpuPart) -> FakeGang:  # noqa: F811
    """Gives each part of the gang a GPU."""
    gang.ctx.__dict__["gpus"] = gpu_part.ctx().gpus
    gang.ctx.__dict__.pop("plan_result", None)
    for part, part_report in gang.part_reports.items():
        gpu = {"uuid": f"GPU-{part}", "name": "NVIDIA H100 80GB HBM3", "total": 80 << 30, "capability": [9, 0]}
        part_report.identity = part_report.identity | {"gpus": [gpu], "ipc": f"ipc:[{part}]", "shm_device": str(part)}
    return gang


@pytest.mark.fault("S-05")
def test_parts_with_one_nccl_host_id_and_separate_memory_are_an_error(gang: FakeGang, gpu_part: FakeGpuPart) -> None:  # noqa: F811
    on_gpus(gang, gpu_part)
    assert problems(gang.run_gang_checks()) == {}
    for part in (1, 2):
        gang.part_reports[part].identity |= {"hostname": "node", "boot_id": "same"}
    findings = gang.run_gang_checks()
    assert problems(findings) == {"S-05": "error"}
    assert (
        by_id(findings, "S-05").actual == "NCCL considers part1 and part2 one machine, but they do not share /dev/shm"
    )
    gang.part_reports[2].identity |= {"hostname": "other"}
    assert problems(gang.run_gang_checks()) == {"S-05": "warn"}


def test_shared_or_different_gpus_are_an_error(gang: FakeGang, gpu_part: FakeGpuPart) -> None:  # noqa: F811
    on_gpus(gang, gpu_part)
    gang.part_reports[2].identity["gpus"][0] |= {"total": 40 << 30}
    assert problems(gang.run_gang_checks()) == {"G-11": "error"}
    gang.part_reports[2].identity["gpus"] = gang.part_reports[1].identity["gpus"]
    findings = gang.run_gang_checks()
    assert problems(findings) == {"G-10": "error"}
    assert by_id(findings, "G-10").actual == "GPU-1 is used by part1 and part2"


def test_refused_ports_of_a_running_part_are_no_problem(gang: FakeGang) -> None:
    for part_report in gang.part_reports.values():
        part_report.listening = False
    set_ports(gang, 0, 1, "refused", 10000)
    assert problems(gang.run_gang_checks()) == {}
    set_ports(gang, 0, 1, "timeout", 10000)
    assert problems(gang.run_gang_checks()) == {"N-01": "error"}


COLLECTIVES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "right": ({"sizes": {8: {"wrong": 0, "seconds": 1e-5}, 65536: {"wrong": 0, "seconds": 1e-4}}}, {}),
    "wrong": ({"sizes": {8: {"wrong": 2, "seconds": 1e-5}}}, {"X-01": "error"}),
    "failed": ({"failure": "rank 1: no end within 55 s; the process was killed"}, {"X-01": "error"}),
    "slow": ({"sizes": {8: {"wrong": 0, "seconds": 0.2}, 65536: {"wrong": 0, "seconds": 0.3}}}, {"X-02": "warn"}),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_collective_results(name: str, gang: FakeGang) -> None:
    measured, expected = COLLECTIVES[name]
    gang.ctx.collective = {"backend": "TorchGroup", **measured}
    findings = run_checks([REGISTRY["X-01"], REGISTRY["X-02"]], gang.ctx)
    assert problems(findings) == expected


def test_fix_of_an_entry_names_what_is_compared() -> None:
    differences = {"members.part1": {"part0": "x_part1 :10000", "part1": "x_part1 :20000"}}
    assert alignment(differences) == (
        'on part0: "x_part1": {"name": "x_part1", "port": 20000} in the member list   as on part1'
    )
