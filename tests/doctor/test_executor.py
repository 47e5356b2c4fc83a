"""If a check hangs, crashes or raises, the others still run and its finding says what happened."""

import ctypes
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from doctor.check import Check, CheckResult, Repair, Status, error, ok, skip, unknown, warn
from doctor.context import CheckContext
from doctor.executor import run_checks
from doctor.report import DoctorExitCode, Finding, Report, make_report
from tests.doctor.fixtures import FakeHost

Function = Callable[[CheckContext], CheckResult]


def passing(ctx: CheckContext) -> CheckResult:
    return ok("passed")


def failing(ctx: CheckContext) -> CheckResult:
    return error("failed", "passed", "fix it")


def hanging(ctx: CheckContext) -> CheckResult:
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
    threading.Event().wait()
    raise AssertionError


def raising(ctx: CheckContext) -> CheckResult:
    raise ValueError("no such thing")


def dying(number: signal.Signals) -> Function:
    def run(ctx: CheckContext) -> CheckResult:
        faulthandler.disable()  # pytest's handler would print tracebacks
        os.kill(os.getpid(), number)
        raise AssertionError

    return run


def segfaulting(ctx: CheckContext) -> CheckResult:
    faulthandler.disable()
    ctypes.string_at(8)  # reads an unmapped address
    raise AssertionError


def exiting(ctx: CheckContext) -> CheckResult:
    sys.exit(3)


def large_result(ctx: CheckContext) -> CheckResult:
    return ok("x" * 300_000)  # larger than a pipe's buffer


def make(id: str, run: Function = passing, *, needs: Sequence[str] = (), timeout: float = 20) -> Check:
    return Check(id, "trial", f"{id} passes", run, 0, Status.ERROR, (), tuple(needs), Repair.CONFIG, timeout)


@pytest.fixture
def ctx(tmp_path: Path) -> CheckContext:
    return CheckContext(FakeHost(tmp_path))


def results(findings: Sequence[Finding]) -> dict[str, tuple[Status, str]]:
    return {f.id: (f.status, f.actual) for f in findings}


def report(ctx: CheckContext, findings: Sequence[Finding]) -> Report:
    return make_report(ctx, findings, started=0.0)


def test_findings_come_in_order(ctx: CheckContext) -> None:
    names = [f"T-{n:02}" for n in range(50)]
    assert [f.id for f in run_checks([make(name) for name in names], ctx)] == names


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGKILL])
def test_killed_check_is_a_crash_and_the_others_run(number: signal.Signals, ctx: CheckContext) -> None:
    by_id = results(run_checks([make("T-1"), make("T-2", dying(number)), make("T-3")], ctx))
    assert by_id["T-2"] == (Status.CRASH, f"the check's process died: signal {number.value} ({number.name})")
    assert by_id["T-1"] == by_id["T-3"] == (Status.OK, "passed")


def test_a_real_segmentation_fault(ctx: CheckContext) -> None:
    findings = run_checks([make("T-1", segfaulting), make("T-2")], ctx)
    assert [f.status for f in findings] == [Status.CRASH, Status.OK]
    assert "SIGSEGV" in findings[0].actual


def test_hanging_check_is_killed_and_unknown(ctx: CheckContext) -> None:
    """The check blocks all signals except SIGKILL."""
    findings = run_checks([make("T-1"), make("T-2", hanging, timeout=0.3), make("T-3")], ctx)
    assert results(findings) == {
        "T-1": (Status.OK, "passed"),
        "T-2": (Status.UNKNOWN, "did not finish within 0.3 s and was killed"),
        "T-3": (Status.OK, "passed"),
    }
    assert findings[1].duration_ms == 300
    assert (report(ctx, findings).verdict, report(ctx, findings).exit_code) == ("incomplete", DoctorExitCode.INCOMPLETE)


def test_no_process_is_left(ctx: CheckContext) -> None:
    before = set(psutil.Process().children())  # servers of other tests
    run_checks([make("T-1", hanging, timeout=0.2), make("T-2", dying(signal.SIGSEGV)), make("T-3")], ctx)
    assert set(psutil.Process().children()) <= before


def test_no_file_is_left_open(ctx: CheckContext) -> None:
    before = os.listdir("/proc/self/fd")
    run_checks([make("T-1", raising), make("T-2", dying(signal.SIGSEGV)), make("T-3")], ctx)
    assert os.listdir("/proc/self/fd") == before


def test_an_exception_is_a_crash(ctx: CheckContext) -> None:
    findings = run_checks([make("T-1", raising), make("T-2")], ctx)
    assert results(findings)["T-1"] == (Status.CRASH, "the check failed: ValueError: no such thing")
    assert results(findings)["T-2"] == (Status.OK, "passed")
    assert report(ctx, findings).exit_code == DoctorExitCode.INCOMPLETE


def test_exit_is_a_crash(ctx: CheckContext) -> None:
    findings = run_checks([make("T-1", exiting), make("T-2")], ctx)
    assert [f.status for f in findings] == [Status.CRASH, Status.OK]


def test_a_finding_larger_than_a_pipe_arrives(ctx: CheckContext) -> None:
    findings = run_checks([make("T-1", large_result), make("T-2")], ctx)
    assert [len(f.actual) for f in findings] == [300_000, 6]


def test_invalid_utf8_is_escaped(ctx: CheckContext) -> None:
    findings = run_checks([make("T-1", lambda ctx: error("/models/\udcff\x1b", "text", "rm \udcff"))], ctx)
    assert findings[0].actual == r"/models/\udcff\x1b"
    assert findings[0].fix.host == r"rm \udcff"


@pytest.mark.parametrize(
    ("cause", "timeout"), [(failing, 20), (raising, 20), (dying(signal.SIGBUS), 20), (hanging, 0.2)], ids="ERXH"
)
def test_check_is_skipped_if_a_dependency_fails(cause: Function, timeout: float, ctx: CheckContext) -> None:
    checks = [make("T-1", cause, timeout=timeout), make("T-2", raising, needs=("T-0", "T-1")), make("T-3")]
    by_id = results(run_checks(checks, ctx))
    assert by_id["T-2"] == (Status.SKIP, "not run, because T-1 did not pass")
    assert by_id["T-3"] == (Status.OK, "passed")


@pytest.mark.parametrize(
    "result", [warn("so", "not so", "fix it"), skip("no"), ok("yes")], ids=lambda result: result.status
)
def test_warn_skip_and_ok_block_no_dependent_check(result: CheckResult, ctx: CheckContext) -> None:
    assert run_checks([make("T-1", lambda ctx: result), make("T-2", needs=("T-1",))], ctx)[1].status == Status.OK


def test_skipped_checks_name_the_first_cause(ctx: CheckContext) -> None:
    """T-5 needs T-4, and so on to T-1: the first check that fails is the only problem."""
    chain = [make("T-1", failing), *(make(f"T-{n}", raising, needs=(f"T-{n - 1}",)) for n in (2, 3, 4, 5))]
    findings = run_checks([*chain, make("T-6")], ctx)
    assert [f.actual for f in findings] == ["failed", *["not run, because T-1 did not pass"] * 4, "passed"]
    assert [f.id for f in report(ctx, findings).problems()] == ["T-1"]


def test_dependencies_run_first_in_any_order_of_the_list(ctx: CheckContext) -> None:
    checks = [make("T-1", raising, needs=("T-2",)), make("T-2", raising, needs=("T-3",)), make("T-3", failing)]
    findings = run_checks(checks, ctx)
    assert [(f.id, f.actual) for f in findings] == [
        ("T-1", "not run, because T-3 did not pass"),
        ("T-2", "not run, because T-3 did not pass"),
        ("T-3", "failed"),
    ]


def test_the_first_of_several_causes_is_named(ctx: CheckContext) -> None:
    checks = [make("T-1", failing), make("T-2", failing), make("T-3", needs=("T-2", "T-1"))]
    assert run_checks(checks, ctx)[2].actual == "not run, because T-2 did not pass"


def test_earlier_findings_count_as_dependencies(ctx: CheckContext) -> None:
    """Checks of a higher tier (group of checks, --tier) may need those of a lower one, which ran before."""
    earlier = run_checks([make("T-1", failing), make("T-2", needs=("T-1",))], ctx)
    assert results(run_checks([make("T-3", needs=("T-2",))], ctx, earlier)) == {
        "T-3": (Status.SKIP, "not run, because T-1 did not pass")
    }


def test_unknown_makes_the_run_incomplete(ctx: CheckContext) -> None:
    findings = run_checks([make("T-1", lambda ctx: unknown("cannot be read"))], ctx)
    assert (report(ctx, findings).verdict, report(ctx, findings).exit_code) == ("incomplete", DoctorExitCode.INCOMPLETE)


def test_error_has_priority_over_unknown(ctx: CheckContext) -> None:
    findings = run_checks([make("T-1", raising), make("T-2", failing)], ctx)
    assert report(ctx, findings).exit_code == DoctorExitCode.ERRORS
