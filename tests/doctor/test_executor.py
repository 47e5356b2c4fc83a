"""Checks that hang, crash or raise: the others still run, and the finding says what happened."""

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


def well(ctx: CheckContext) -> CheckResult:
    return ok("well")


def bad(ctx: CheckContext) -> CheckResult:
    return error("bad", "good", "mend it")


def hanging(ctx: CheckContext) -> CheckResult:
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
    threading.Event().wait()
    raise AssertionError


def raising(ctx: CheckContext) -> CheckResult:
    raise ValueError("no such thing")


def dying(number: signal.Signals) -> Function:
    def run(ctx: CheckContext) -> CheckResult:
        faulthandler.disable()  # pytest's would say so at length
        os.kill(os.getpid(), number)
        raise AssertionError

    return run


def wild(ctx: CheckContext) -> CheckResult:
    faulthandler.disable()
    ctypes.string_at(8)  # reads where nothing is
    raise AssertionError


def leaving(ctx: CheckContext) -> CheckResult:
    sys.exit(3)


def chattering(ctx: CheckContext) -> CheckResult:
    return ok("x" * 300_000)  # more than a pipe holds


def make(id: str, run: Function = well, *, needs: Sequence[str] = (), timeout: float = 20) -> Check:
    return Check(id, "trial", f"{id} is well", run, 0, Status.ERROR, (), tuple(needs), Repair.CONFIG, timeout)


@pytest.fixture
def ctx(tmp_path: Path) -> CheckContext:
    return CheckContext(FakeHost(tmp_path))


def judged(findings: Sequence[Finding]) -> dict[str, tuple[Status, str]]:
    return {f.id: (f.status, f.actual) for f in findings}


def report(ctx: CheckContext, findings: Sequence[Finding]) -> Report:
    return make_report(ctx, findings, started=0.0)


def test_findings_come_in_order(ctx: CheckContext) -> None:
    names = [f"T-{n:02}" for n in range(50)]
    assert [f.id for f in run_checks([make(name) for name in names], ctx)] == names


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGKILL])
def test_a_check_that_is_killed_is_a_crash_and_the_others_run(number: signal.Signals, ctx: CheckContext) -> None:
    found = judged(run_checks([make("T-1"), make("T-2", dying(number)), make("T-3")], ctx))
    assert found["T-2"] == (Status.CRASH, f"the check's process died: signal {number.value} ({number.name})")
    assert found["T-1"] == found["T-3"] == (Status.OK, "well")


def test_a_real_segmentation_fault(ctx: CheckContext) -> None:
    found = run_checks([make("T-1", wild), make("T-2")], ctx)
    assert [f.status for f in found] == [Status.CRASH, Status.OK]
    assert "SIGSEGV" in found[0].actual


def test_a_check_that_hangs_is_killed_and_unknown(ctx: CheckContext) -> None:
    """Even one that no signal but SIGKILL ends."""
    findings = run_checks([make("T-1"), make("T-2", hanging, timeout=0.3), make("T-3")], ctx)
    assert judged(findings) == {
        "T-1": (Status.OK, "well"),
        "T-2": (Status.UNKNOWN, "gave no answer within 0.3 s and was killed"),
        "T-3": (Status.OK, "well"),
    }
    assert findings[1].duration_ms == 300
    assert (report(ctx, findings).verdict, report(ctx, findings).exit_code) == ("incomplete", DoctorExitCode.INCOMPLETE)


def test_no_process_is_left(ctx: CheckContext) -> None:
    before = set(psutil.Process().children())  # other tests may have servers running
    run_checks([make("T-1", hanging, timeout=0.2), make("T-2", dying(signal.SIGSEGV)), make("T-3")], ctx)
    assert set(psutil.Process().children()) <= before


def test_no_file_is_left_open(ctx: CheckContext) -> None:
    before = os.listdir("/proc/self/fd")
    run_checks([make("T-1", raising), make("T-2", dying(signal.SIGSEGV)), make("T-3")], ctx)
    assert os.listdir("/proc/self/fd") == before


def test_an_exception_is_a_crash(ctx: CheckContext) -> None:
    findings = run_checks([make("T-1", raising), make("T-2")], ctx)
    assert judged(findings)["T-1"] == (Status.CRASH, "the check failed: ValueError: no such thing")
    assert judged(findings)["T-2"] == (Status.OK, "well")
    assert report(ctx, findings).exit_code == DoctorExitCode.INCOMPLETE


def test_leaving_is_a_crash(ctx: CheckContext) -> None:
    findings = run_checks([make("T-1", leaving), make("T-2")], ctx)
    assert [f.status for f in findings] == [Status.CRASH, Status.OK]


def test_a_finding_larger_than_a_pipe_arrives(ctx: CheckContext) -> None:
    findings = run_checks([make("T-1", chattering), make("T-2")], ctx)
    assert [len(f.actual) for f in findings] == [300_000, 4]


def test_bytes_that_are_no_text_arrive(ctx: CheckContext) -> None:
    findings = run_checks([make("T-1", lambda ctx: error("/models/\udcff\x1b", "text", "rm \udcff"))], ctx)
    assert findings[0].actual == r"/models/\udcff\x1b"
    assert findings[0].fix.host == r"rm \udcff"


@pytest.mark.parametrize(
    ("cause", "timeout"), [(bad, 20), (raising, 20), (dying(signal.SIGBUS), 20), (hanging, 0.2)], ids="ERXH"
)
def test_what_needs_it_is_skipped_and_says_why(cause: Function, timeout: float, ctx: CheckContext) -> None:
    checks = [make("T-1", cause, timeout=timeout), make("T-2", raising, needs=("T-0", "T-1")), make("T-3")]
    found = judged(run_checks(checks, ctx))
    assert found["T-2"] == (Status.SKIP, "because T-1")
    assert found["T-3"] == (Status.OK, "well")


@pytest.mark.parametrize("outcome", [warn("so", "not so", "mend it"), skip("no"), ok("yes")], ids=lambda o: o.status)
def test_what_is_no_fault_stops_nothing(outcome: CheckResult, ctx: CheckContext) -> None:
    assert run_checks([make("T-1", lambda ctx: outcome), make("T-2", needs=("T-1",))], ctx)[1].status == Status.OK


def test_the_root_is_named_through_any_number_of_checks(ctx: CheckContext) -> None:
    """T-4 needs T-3 needs T-2 needs T-1: the first red line is the cause of all, and the only one."""
    chain = [make("T-1", bad), *(make(f"T-{n}", raising, needs=(f"T-{n - 1}",)) for n in (2, 3, 4, 5))]
    findings = run_checks([*chain, make("T-6")], ctx)
    assert [f.actual for f in findings] == ["bad", *["because T-1"] * 4, "well"]
    assert [f.id for f in report(ctx, findings).problems()] == ["T-1"]


def test_a_cause_is_asked_first_wherever_it_stands(ctx: CheckContext) -> None:
    checks = [make("T-1", raising, needs=("T-2",)), make("T-2", raising, needs=("T-3",)), make("T-3", bad)]
    findings = run_checks(checks, ctx)
    assert [(f.id, f.actual) for f in findings] == [("T-1", "because T-3"), ("T-2", "because T-3"), ("T-3", "bad")]


def test_the_first_of_several_causes_is_named(ctx: CheckContext) -> None:
    checks = [make("T-1", bad), make("T-2", bad), make("T-3", needs=("T-2", "T-1"))]
    assert run_checks(checks, ctx)[2].actual == "because T-2"


def test_what_was_found_earlier_counts(ctx: CheckContext) -> None:
    """The tiers run one after another; a later one needs what an earlier one found."""
    earlier = run_checks([make("T-1", bad), make("T-2", needs=("T-1",))], ctx)
    assert judged(run_checks([make("T-3", needs=("T-2",))], ctx, earlier)) == {"T-3": (Status.SKIP, "because T-1")}


def test_what_cannot_be_read_is_never_green(ctx: CheckContext) -> None:
    findings = run_checks([make("T-1", lambda ctx: unknown("cannot be read"))], ctx)
    assert (report(ctx, findings).verdict, report(ctx, findings).exit_code) == ("incomplete", DoctorExitCode.INCOMPLETE)


def test_an_error_outweighs_what_is_unknown(ctx: CheckContext) -> None:
    findings = run_checks([make("T-1", raising), make("T-2", bad)], ctx)
    assert report(ctx, findings).exit_code == DoctorExitCode.ERRORS
