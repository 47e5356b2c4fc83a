"""The report: findings, verdict and exit code. Its JSON form is versioned; docs/doctor-schema.json is its schema."""

import time
from collections import Counter
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from doctor.check import Check, CheckResult, Repair, Status
from doctor.context import CheckContext
from doctor.host import format_bytes
from doctor.runtime import Runtime
from rtp_llm import __version__, files

SCHEMA: Literal["rtp-llm-doctor/1"] = "rtp-llm-doctor/1"
# The schema lists fields with defaults as required, because the JSON always contains them.
MODEL = ConfigDict(frozen=True, extra="forbid", json_schema_serialization_defaults_required=True)


class DoctorExitCode(IntEnum):
    """Exit codes of `rtp-llm-doctor`. READY: no check found an error. ERRORS: a check found an error, or with --strict
    a warning. CANNOT_RUN: the doctor itself failed, or its command line is invalid. INCOMPLETE: a part is absent, or a
    value could not be read.
    """

    READY = 0
    ERRORS = 1
    CANNOT_RUN = 2
    INCOMPLETE = 3


class FixModel(BaseModel):
    """The fix of a finding: commands or settings for each container runtime. An empty text falls back to `host`."""

    model_config = MODEL

    docker: str = ""
    compose: str = ""
    kubernetes: str = ""
    host: str = ""

    def text(self, runtime: Runtime) -> str:
        return str(getattr(self, runtime.value)) or self.host


class Finding(BaseModel):
    """The result of one check in the report."""

    model_config = MODEL

    id: str = Field(description="stable id of the check")
    name: str
    category: str
    tier: int
    severity: Literal["warn", "error"] = Field(description="the worst status that this check can have")
    status: Status
    actual: str = Field(description="the observed state; for skip, unknown and crash the reason")
    expected: str = ""
    symptom: list[str] = Field(
        default=[], description="text that appears in logs if the problem exists; … stands for any text"
    )
    fix: FixModel = FixModel()
    repair: Repair = Repair.NONE
    evidence: dict[str, Any] = Field(default={})
    duration_ms: float = 0.0


class NodeInfo(BaseModel):
    """The part and the machine on which the doctor ran. Part, ranks and device are null or empty without a plan."""

    model_config = MODEL

    part: int | None
    parts: int | None
    name: str
    ranks: list[int]
    device: str
    runtime: Runtime
    facts: dict[str, str]


class Drift(BaseModel):
    """A fact (setting, version …) that differs between the parts, with its value on each part."""

    model_config = MODEL

    key: str
    values: dict[str, str]


class Report(BaseModel):
    """The result of one run of the doctor."""

    model_config = MODEL

    schema_: Literal["rtp-llm-doctor/1"] = Field(
        default=SCHEMA, validation_alias="schema", serialization_alias="schema"
    )
    tool_version: str = __version__
    started: float = Field(description="Unix time in seconds")
    duration_s: float
    node: NodeInfo
    verdict: Literal["ok", "warn", "error", "incomplete"]
    exit_code: int
    checks: list[Finding]
    members: list[str] = Field(default=[], description="parts that responded; empty if the parts exchanged no reports")
    drift: list[Drift] = []

    def counts(self) -> Counter[Status]:
        return Counter(finding.status for finding in self.checks)

    def problems(self) -> list[Finding]:
        """Returns the findings that are neither ok nor skipped."""
        return [f for f in self.checks if f.status not in (Status.OK, Status.SKIP)]

    def to_json(self) -> str:
        return self.model_dump_json(indent=1, by_alias=True)

    def save(self, path: Path) -> None:
        files.replace(path, self.to_json())


def escape_unprintable(text: str) -> str:
    """Returns `text` with unprintable characters other than newlines as escapes such as \\x1b: file names may contain
    bytes that terminals, XML or UTF-8 cannot represent.
    """
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def make_finding(check: Check, result: CheckResult, seconds: float) -> Finding:
    needs_repair = result.status in (Status.WARN, Status.ERROR)
    return Finding(
        id=check.id,
        name=check.title,
        category=check.category,
        tier=check.tier,
        severity="error" if check.severity == Status.ERROR else "warn",
        status=result.status,
        actual=escape_unprintable(result.actual),
        expected=escape_unprintable(result.expected),
        symptom=[s.text for s in check.symptoms],
        fix=FixModel(**{name: escape_unprintable(text) for name, text in vars(result.fix).items()}),
        repair=check.repair if needs_repair else Repair.NONE,
        evidence=result.evidence,
        duration_ms=round(seconds * 1000, 1),
    )


def make_report(
    ctx: CheckContext, findings: Sequence[Finding], *, started: float, ignored: Sequence[str] = (), strict: bool = False
) -> Report:
    """Returns the report of a run of the doctor, with verdict and exit code. `findings`: results of the checks.
    `started`: Unix time in seconds at which the run began. `ignored`: ids of checks whose errors count as warnings.
    `strict`: warnings set exit code 1.
    """
    warning = {"status": Status.WARN}
    checks = [f.model_copy(update=warning) if f.id in ignored and f.status == Status.ERROR else f for f in findings]
    part_is_absent = any(f.id == "C-09" and f.status == Status.ERROR for f in checks)
    verdict, code = _verdict({f.status for f in checks}, part_is_absent, strict)
    view = ctx.gang
    return Report(
        started=round(started, 3),
        duration_s=round(time.time() - started, 3),
        node=make_node_info(ctx),
        verdict=verdict,
        exit_code=code,
        checks=checks,
        members=view.present_names if view else [],
        drift=[Drift(key=key, values=values) for key, values in (view.differences("") if view else {}).items()],
    )


Verdict = Literal["ok", "warn", "error", "incomplete"]


def _verdict(statuses: set[Status], part_is_absent: bool, strict: bool) -> tuple[Verdict, DoctorExitCode]:
    """Returns (verdict, exit code). `strict`: a warning gives exit code 1. An absent part makes the run incomplete,
    although the status of its check is error."""
    if part_is_absent:
        return "incomplete", DoctorExitCode.INCOMPLETE
    if Status.ERROR in statuses:
        return "error", DoctorExitCode.ERRORS
    if statuses & {Status.UNKNOWN, Status.CRASH}:
        return "incomplete", DoctorExitCode.INCOMPLETE
    if Status.WARN in statuses:
        return "warn", DoctorExitCode.ERRORS if strict else DoctorExitCode.READY
    return "ok", DoctorExitCode.READY


def make_node_info(ctx: CheckContext) -> NodeInfo:
    plan, host = ctx.plan, ctx.host
    member = plan.member(plan.part) if plan else None
    cgroup = host.cgroup
    facts = {
        "cores": str(host.cores),
        "memory": format_bytes(host.memory_available()),
        "cgroup": f"v{cgroup.version}" if cgroup.version else "none",
        "driver": ctx.gpus.driver,
        "gpus": ", ".join(f"{n} x {name}" for name, n in Counter(g.name for g in ctx.gpus.visible).items()),
        "nccl": ".".join(map(str, ctx.nccl.version)) if ctx.on_gpu else "",
    }
    return NodeInfo(
        part=plan.part if plan else None,
        parts=plan.num_parts if plan else None,
        name=f"{member.name} {member.ip}:{member.port}" if member else "",
        ranks=list(plan.ranks) if plan else [],
        device=plan.device if plan else "",
        runtime=host.runtime,
        facts={name: value for name, value in facts.items() if value},
    )
