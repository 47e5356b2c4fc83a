"""The report: findings, a verdict, an exit code. Its JSON form is an interface, versioned, with a published schema."""

import time
from collections import Counter
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from doctor.check import Check, CheckResult, Repair, Runtime, Status
from doctor.context import CheckContext
from doctor.host import format_bytes
from rtp_llm import __version__

SCHEMA: Literal["rtp-llm-doctor/1"] = "rtp-llm-doctor/1"
# What is always written is required in the published schema.
MODEL = ConfigDict(frozen=True, extra="forbid", json_schema_serialization_defaults_required=True)


class DoctorExitCode(IntEnum):
    """What `rtp-llm-doctor` ends with."""

    READY = 0
    ERRORS = 1
    CANNOT_RUN = 2
    INCOMPLETE = 3


class FixModel(BaseModel):
    """The same remedy in the language of each runtime."""

    model_config = MODEL

    docker: str = ""
    compose: str = ""
    kubernetes: str = ""
    host: str = ""

    def text(self, runtime: Runtime) -> str:
        return str(getattr(self, runtime.value)) or self.host


class Finding(BaseModel):
    """What one check said."""

    model_config = MODEL

    id: str = Field(description="stable; the failure catalogue's own")
    name: str
    category: str
    tier: int
    severity: Literal["warn", "error"] = Field(description="the worst this check can find")
    status: Status
    actual: str = Field(description="what was seen; for skip, unknown and crash: why")
    expected: str = ""
    symptom: list[str] = Field(default=[], description="text of logs that this would cause; … stands for anything")
    fix: FixModel = FixModel()
    repair: Repair = Repair.NONE
    evidence: dict[str, Any] = Field(default={})
    duration_ms: float = 0.0


class NodeInfo(BaseModel):
    """Who was examined."""

    model_config = MODEL

    part: int | None
    parts: int | None
    name: str
    ranks: list[int]
    device: str
    runtime: Runtime
    facts: dict[str, str]


class Drift(BaseModel):
    """A value in which the parts differ, by part."""

    model_config = MODEL

    key: str
    values: dict[str, str]


class Report(BaseModel):
    """All that one run of the doctor has to say."""

    model_config = MODEL

    schema_: Literal["rtp-llm-doctor/1"] = Field(
        default=SCHEMA, validation_alias="schema", serialization_alias="schema"
    )
    tool_version: str = __version__
    started: float = Field(description="seconds since the epoch")
    duration_s: float
    node: NodeInfo
    verdict: Literal["ok", "warn", "error", "incomplete"]
    exit_code: int
    checks: list[Finding]
    members: list[str] = Field(default=[], description="parts that answered (gang tier)")
    drift: list[Drift] = []

    def counts(self) -> Counter[Status]:
        return Counter(finding.status for finding in self.checks)

    def problems(self) -> list[Finding]:
        """Everything but what is well and what there was nothing to look at."""
        return [f for f in self.checks if f.status not in (Status.OK, Status.SKIP)]

    def to_json(self) -> str:
        return self.model_dump_json(indent=1, by_alias=True)


def escape_unprintable(text: str) -> str:
    """What a terminal, XML or UTF-8 cannot take (a path may hold any byte) is written as an escape."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def make_finding(check: Check, outcome: CheckResult, seconds: float) -> Finding:
    bad = outcome.status in (Status.WARN, Status.ERROR)
    return Finding(
        id=check.id,
        name=check.title,
        category=check.category,
        tier=check.tier,
        severity="error" if check.severity == Status.ERROR else "warn",
        status=outcome.status,
        actual=escape_unprintable(outcome.actual),
        expected=escape_unprintable(outcome.expected),
        symptom=[s.text for s in check.symptoms],
        fix=FixModel(**{name: escape_unprintable(text) for name, text in vars(outcome.fix).items()}),
        repair=check.repair if bad else Repair.NONE,
        evidence=outcome.evidence,
        duration_ms=round(seconds * 1000, 1),
    )


def make_report(
    ctx: CheckContext, findings: Sequence[Finding], *, started: float, ignored: Sequence[str] = (), strict: bool = False
) -> Report:
    """`ignored`: ids whose errors count as warnings; `strict`: warnings count as errors in the exit code."""
    checks = [_as_warning(f) if f.id in ignored and f.status == Status.ERROR else f for f in findings]
    statuses = {f.status for f in checks}
    verdict, code = _verdict(statuses, any(f.id == "C-09" and f.status == Status.ERROR for f in checks), strict)
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


def _as_warning(finding: Finding) -> Finding:
    return finding.model_copy(update={"status": Status.WARN})


Verdict = Literal["ok", "warn", "error", "incomplete"]


def _verdict(statuses: set[Status], absent: bool, strict: bool) -> tuple[Verdict, DoctorExitCode]:
    """An absent part is an error by its finding and an incomplete run by its exit code: nothing else was proved."""
    if absent:
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
    member = next((m for m in plan.members if m.index == plan.part), None) if plan else None
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
