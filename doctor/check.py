"""Checks, their results and the decorator that registers them.

A check is a function with an id. It gets a CheckContext and returns a CheckResult, or a Reading: a number with its
bounds. The function's docstring is for users: `rtp-llm-doctor explain ID` prints it, and docs/doctor.md contains it.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import wraps
from inspect import unwrap
from typing import Any, TypeVar

from doctor.context import CheckContext
from doctor.fixes import Fix


class Status(StrEnum):
    """Status of a check's result.

    UNKNOWN: a value could not be read in time, or at all, so the check does not pass. CRASH: the check raised an
    exception, or its process died.
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
    """The result of a check.

    `actual`: what the check found, such as "8 GiB free". `expected`: what it should have found, such as "16 GiB".
    `fix`: the command or setting that solves the problem. `evidence`: values for programs that read the JSON report.
    """

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
    """Returns the result of a check that does not apply to this machine, for example because there is no GPU."""
    return CheckResult(Status.SKIP, reason, evidence=evidence)


def _fix(fix: Fix | str) -> Fix:
    return Fix(host=fix) if isinstance(fix, str) else fix


@dataclass(frozen=True)
class Reading:
    """A measured number with its bounds, all in one unit: an alternative to CheckResult as the result of a check.

    `actual`: the number as text for the report. `expected`: the bounds as text. The check's status is error below
    `minimum`, warn below `recommended` or above `maximum`, and ok otherwise.
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
    """Text that a log contains if the problem that a check detects exists. "…" in it matches up to 200 characters of
    one line. `rtp-llm-doctor explain-log` searches logs for symptoms.
    """

    text: str

    @property
    def pattern(self) -> re.Pattern[str]:
        """Returns a regular expression that finds the text in a log, case-sensitively and as whole words: "Killed"
        matches neither "killed" nor "OOMKilled"."""
        phrases = [re.escape(phrase).replace(r"\ ", r"[^\S\n]+") for phrase in self.text.split("…")]
        before, after = r"(?<!\w)" * self.text[:1].isalnum(), r"(?!\w)" * self.text[-1:].isalnum()
        return re.compile(before + r"[^\n]{0,200}?".join(phrases) + after)


F = TypeVar("F", bound=Callable[..., Any])
CheckFunction = Callable[[CheckContext], CheckResult | Reading]
# Returns the result to report instead of running the check, or None if the precondition is met.
Precondition = Callable[[CheckContext], CheckResult | None]


@dataclass(frozen=True)
class Check:
    """A registered check. The check is skipped if a check whose id is in `needs` fails.

    `tier`: 0 reads settings and files, 1 uses GPUs and disk, 2 compares the parts of the gang, 3 runs an all-reduce.
    `severity`: the worst status that the check can report. `repair`: the kind of action that fixes the problem.
    `timeout`: seconds after which the process that runs the check is killed.
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
    preconditions: tuple[Precondition, ...] = (),
    repair: Repair = Repair.CONFIG,
    timeout: float = 0,
) -> Callable[[CheckFunction], CheckFunction]:
    """Returns a decorator that registers a function as the check `id`, such as "S-01". Do not change the id of an
    existing check: scripts use ids in --only and --ignore.

    `title`: the condition that the check verifies, as a sentence for the report. `timeout`: seconds; 0 takes the
    default of the tier. `needs`: ids of other checks; if one of them fails, this check is skipped without running.
    `preconditions`: functions that run before this one; the first that returns a result (there is no GPU, a file cannot
    be read) replaces this check's result.
    """

    def register(function: CheckFunction) -> CheckFunction:
        @wraps(function)
        def run(ctx: CheckContext) -> CheckResult:
            result = next(filter(None, (precondition(ctx) for precondition in preconditions)), None) or function(ctx)
            return result.result() if isinstance(result, Reading) else result

        assert id not in REGISTRY, f"{id} is registered twice"
        texts = function.__dict__.get("symptoms", ())
        seconds = timeout or TIER_SECONDS[tier]
        REGISTRY[id] = Check(id, category, title, run, tier, severity, texts, needs, repair, seconds)
        return function

    return register


def symptoms(*texts: str) -> Callable[[F], F]:
    """Returns a decorator that attaches `texts` to a check: texts that appear in a log if the problem exists. Apply it
    below the decorator that registers the check.
    """

    def set_symptoms(function: F) -> F:
        registered = any(unwrap(check.run) is function for check in REGISTRY.values())
        assert not registered, f"{function.__name__}: @symptoms must stand below the decorator that registers the check"
        function.__dict__["symptoms"] = tuple(map(Symptom, texts))
        return function

    return set_symptoms
