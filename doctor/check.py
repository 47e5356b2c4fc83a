"""What a check is: one function that looks at a node and returns an outcome, registered under the catalogue's id.

The function's docstring is what `explain` prints: the cause, in words for the operator.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from doctor.context import CheckContext
from doctor.runtime import Runtime


class Status(StrEnum):
    """`unknown`: could not be read, so nobody may call it green. `crash`: the check itself failed."""

    OK = "ok"
    WARN = "warn"
    ERROR = "error"
    UNKNOWN = "unknown"
    CRASH = "crash"
    SKIP = "skip"


class Repair(StrEnum):
    """What kind of act mends it, for machines that read the report."""

    NONE = "none"
    CONFIG = "config"
    RESTART = "restart_container"
    RESET_GPU = "reset_gpu"
    REBOOT = "reboot"
    REPLACE = "replace"
    OPEN_PORT = "open_port"
    DOWNLOAD = "download"


@dataclass(frozen=True)
class Fix:
    """What to type, per runtime. An empty one falls back to `host`'s, which says it without a runtime's syntax."""

    host: str = ""
    docker: str = ""
    compose: str = ""
    kubernetes: str = ""

    def text(self, runtime: Runtime) -> str:
        return str(getattr(self, runtime.value)) or self.host


@dataclass(frozen=True)
class CheckResult:
    """What one check found. `actual` is a clause that stands alone, `expected` what it should have been."""

    status: Status
    actual: str
    expected: str = ""
    fix: Fix = field(default_factory=Fix)
    evidence: dict[str, Any] = field(default_factory=dict)


def ok(actual: str, **evidence: Any) -> CheckResult:
    return CheckResult(Status.OK, actual, evidence=evidence)


def warn(actual: str, expected: str, fix: Fix | str, **evidence: Any) -> CheckResult:
    return CheckResult(Status.WARN, actual, expected, _fix(fix), evidence)


def error(actual: str, expected: str, fix: Fix | str, **evidence: Any) -> CheckResult:
    return CheckResult(Status.ERROR, actual, expected, _fix(fix), evidence)


def unknown(why: str, fix: Fix | str = "") -> CheckResult:
    return CheckResult(Status.UNKNOWN, why, fix=_fix(fix))


def skip(why: str) -> CheckResult:
    """There is nothing to check here: no GPU, a single part, …"""
    return CheckResult(Status.SKIP, why)


def _fix(fix: Fix | str) -> Fix:
    return Fix(host=fix) if isinstance(fix, str) else fix


@dataclass(frozen=True)
class Symptom:
    """Text that a user has seen in a log; "…" stands for anything within the line."""

    text: str

    @property
    def pattern(self) -> re.Pattern[str]:
        """Whole words, with the capitals that were printed: "Killed" is neither in "killed" nor in "OOMKilled"."""
        words = [re.escape(piece).replace(r"\ ", r"[^\S\n]+") for piece in self.text.split("…")]
        before, after = r"(?<!\w)" * self.text[:1].isalnum(), r"(?!\w)" * self.text[-1:].isalnum()
        return re.compile(before + r"[^\n]{0,200}?".join(words) + after)


@dataclass(frozen=True)
class Check:
    """`severity`: the worst it can find. `needs`: ids that, where they found an error, make this one pointless.

    `timeout`: seconds after which its process is killed.
    """

    id: str
    category: str
    title: str
    run: Callable[[CheckContext], CheckResult]
    tier: int
    severity: Status
    symptoms: tuple[Symptom, ...]
    needs: tuple[str, ...]
    repair: Repair
    timeout: float

    @property
    def explanation(self) -> str:
        return re.sub(r"\s*\n\s*", " ", (self.run.__doc__ or "").strip().replace("\n\n", "\0")).replace("\0", "\n\n")


REGISTRY: dict[str, Check] = {}
TIER_SECONDS = {0: 2.0, 1: 15.0, 2: 5.0, 3: 60.0}
Function = Callable[[CheckContext], CheckResult]


def check(
    id: str,
    category: str,
    title: str,
    *,
    tier: int = 0,
    severity: Status = Status.ERROR,
    symptoms: tuple[str, ...] = (),
    needs: tuple[str, ...] = (),
    repair: Repair = Repair.CONFIG,
    timeout: float = 0,
) -> Callable[[Function], Function]:
    """Registers a function as the check `id`. Ids are an interface: scripts ignore and select by them."""

    def register(run: Function) -> Function:
        assert id not in REGISTRY, f"{id} stands twice"
        found = tuple(map(Symptom, symptoms))
        seconds = timeout or TIER_SECONDS[tier]
        REGISTRY[id] = Check(id, category, title, run, tier, severity, found, needs, repair, seconds)
        return run

    return register
