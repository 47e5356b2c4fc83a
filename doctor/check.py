"""Checks and their results.

A check is one function with an id: it gets a CheckContext and returns a CheckResult, or a Reading with its bounds. Its
docstring is what `explain` prints and what docs/doctor.md publishes.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import wraps
from typing import Any, TypeVar

from doctor.context import CheckContext
from doctor.fixes import Fix


class Status(StrEnum):
    """Result of a check.

    `unknown`: a value could not be read, so the check does not pass. `crash`: the check itself failed.
    """

    OK = "ok"
    WARN = "warn"
    ERROR = "error"
    UNKNOWN = "unknown"
    CRASH = "crash"
    SKIP = "skip"


class Repair(StrEnum):
    """The kind of action that fixes a problem, for programs that read the report."""

    NONE = "none"
    CONFIG = "config"
    RESTART = "restart_container"
    RESET_GPU = "reset_gpu"
    REBOOT = "reboot"
    REPLACE = "replace"
    OPEN_PORT = "open_port"
    DOWNLOAD = "download"


@dataclass(frozen=True)
class CheckResult:
    """`actual` and `expected` are clauses of the same form."""

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


def unknown(reason: str, fix: Fix | str = "") -> CheckResult:
    return CheckResult(Status.UNKNOWN, reason, fix=_fix(fix))


def skip(reason: str, **evidence: Any) -> CheckResult:
    """Returns the result if there is nothing to check: no GPU, a single part, …"""
    return CheckResult(Status.SKIP, reason, evidence=evidence)


def _fix(fix: Fix | str) -> Fix:
    return Fix(host=fix) if isinstance(fix, str) else fix


@dataclass(frozen=True)
class Reading:
    """A value with its bounds, in one unit: an error below `minimum`, a warning below `recommended` or above `maximum`.

    `actual` is the value as a clause.
    """

    value: float
    actual: str
    expected: str
    fix: Fix | str
    minimum: float = -math.inf
    recommended: float = -math.inf
    maximum: float = math.inf
    evidence: dict[str, Any] = field(default_factory=dict)

    def result(self) -> CheckResult:
        if self.value < self.minimum:
            return error(self.actual, self.expected, self.fix, **self.evidence)
        if self.value < self.recommended or self.value > self.maximum:
            return warn(self.actual, self.expected, self.fix, **self.evidence)
        return ok(self.actual, **self.evidence)


@dataclass(frozen=True)
class Symptom:
    """Text of a log line that the problem causes; "…" matches any text within the line."""

    text: str

    @property
    def pattern(self) -> re.Pattern[str]:
        """Returns a case-sensitive pattern of whole words: "Killed" matches neither "killed" nor "OOMKilled"."""
        phrases = [re.escape(phrase).replace(r"\ ", r"[^\S\n]+") for phrase in self.text.split("…")]
        before, after = r"(?<!\w)" * self.text[:1].isalnum(), r"(?!\w)" * self.text[-1:].isalnum()
        return re.compile(before + r"[^\n]{0,200}?".join(phrases) + after)


F = TypeVar("F", bound=Callable[..., Any])
CheckFunction = Callable[[CheckContext], CheckResult | Reading]
# Returns the result to report instead of running the check, or None if the precondition is met.
Precondition = Callable[[CheckContext], CheckResult | None]


@dataclass(frozen=True)
class Check:
    """`severity` is the worst status it can report. The check is skipped if one of `needs`, which are ids, fails.

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


def check(
    id: str,
    title: str,
    *,
    category: str,
    tier: int = 0,
    severity: Status = Status.ERROR,
    needs: tuple[str, ...] = (),
    requires: tuple[Precondition, ...] = (),
    repair: Repair = Repair.CONFIG,
    timeout: float = 0,
) -> Callable[[CheckFunction], CheckFunction]:
    """Registers a function as the check `id`. Ids are an interface: scripts select and ignore checks by them.

    The check is skipped if one of `needs` fails, and returns the result of the first of `requires` that is not met.
    """

    def register(function: CheckFunction) -> CheckFunction:
        @wraps(function)
        def run(ctx: CheckContext) -> CheckResult:
            result = next(filter(None, (require(ctx) for require in requires)), None) or function(ctx)
            return result.result() if isinstance(result, Reading) else result

        assert id not in REGISTRY, f"{id} is registered twice"
        texts = function.__dict__.get("symptoms", ())
        seconds = timeout or TIER_SECONDS[tier]
        REGISTRY[id] = Check(id, category, title, run, tier, severity, texts, needs, repair, seconds)
        return function

    return register


def symptoms(*texts: str) -> Callable[[F], F]:
    """Sets the log lines that the problem causes. Stands below the decorator that registers the check."""

    def set_symptoms(function: F) -> F:
        function.__dict__["symptoms"] = tuple(map(Symptom, texts))
        return function

    return set_symptoms
