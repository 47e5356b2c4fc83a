"""Runs checks in a child process that can be killed, one after another, and reads what they found from a pipe.

A driver, a name server or a network disk may hang a check, and a broken library may crash it: the child is then
replaced by another one that goes on with the rest, and the check's finding says what happened.
"""

import json
import logging
import os
import selectors
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from doctor.check import Check, CheckResult, Status, unknown
from doctor.context import CheckContext
from doctor.report import Finding, make_finding
from rtp_llm.machine.process import die_with_parent

# After these a check that needs it is pointless: what gave no answer to one will give none to the next.
BLOCKING = {Status.ERROR, Status.CRASH, Status.UNKNOWN}


@dataclass
class _Worker:
    """A forked process and the pipe it writes a line of JSON to before and after each check."""

    pid: int
    pipe: int
    buffer: bytes = b""
    lines: list[dict[str, Any]] = field(default_factory=list)

    def next(self, seconds: float) -> dict[str, Any] | None:
        """Its next line; None at the end of its output. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.pipe, selectors.EVENT_READ)
            while not self.lines:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                data = os.read(self.pipe, 1 << 16)
                if not data:
                    return None
                *whole, self.buffer = (self.buffer + data).split(b"\n")
                self.lines += [json.loads(line) for line in whole]
        return self.lines.pop(0)

    def kill_and_wait(self) -> int:
        """Kills it and returns what waitpid says; a process stuck in the kernel is left behind, not waited for."""
        os.close(self.pipe)
        os.kill(self.pid, signal.SIGKILL)
        for _ in range(50):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return status
            time.sleep(0.01)
        return 0


def run_checks(checks: Sequence[Check], ctx: CheckContext, earlier: Sequence[Finding] = ()) -> list[Finding]:
    """One finding for each check, in order. `earlier`: findings of another run, for what these checks need."""
    found: dict[str, Finding] = {f.id: f for f in earlier}
    pending = topological_order(checks)
    while pending:
        child = _start(pending, ctx, found)
        try:
            failed = _collect(child, pending, found)
        finally:
            status = child.kill_and_wait()
        if failed:
            current, (outcome, seconds) = pending.pop(0), failed
            found[current.id] = make_finding(current, outcome or _crash_result(status), seconds)
    return [found[check.id] for check in checks]


def topological_order(checks: Sequence[Check]) -> list[Check]:
    """The same checks, each after those that it needs, whatever the order of categories in the report."""
    by_id = {check.id: check for check in checks}
    ordered: dict[str, Check] = {}

    def place(check: Check) -> None:
        for need in check.needs:
            if need in by_id and need not in ordered:
                place(by_id[need])
        ordered.setdefault(check.id, check)

    for check in checks:
        place(check)
    return list(ordered.values())


def _collect(
    child: _Worker, pending: list[Check], found: dict[str, Finding]
) -> tuple[CheckResult | None, float] | None:
    """Moves finished checks from `pending` to `found`. Returns None at the orderly end, else what became of the check
    that is now first (None: its process died), and the seconds it took."""
    while pending:
        current, started = pending[0], time.monotonic()
        try:
            line = child.next(current.timeout)
        except TimeoutError:
            return unknown(f"gave no answer within {current.timeout:g} s and was killed"), current.timeout
        if line is None:
            return None, time.monotonic() - started
        found[current.id] = Finding.model_validate(line)
        pending.pop(0)
    return None


def _crash_result(status: int) -> CheckResult:
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    how = f"signal {number} ({signal.Signals(number).name})" if number else f"status {status}"
    return CheckResult(Status.CRASH, f"the check's process died: {how}")


def _start(pending: Sequence[Check], ctx: CheckContext, found: dict[str, Finding]) -> _Worker:
    sys.stdout.flush()
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return _Worker(pid, read)
    os.close(read)
    _worker_main(pending, ctx, dict(found), write)


def _worker_main(pending: Sequence[Check], ctx: CheckContext, found: dict[str, Finding], pipe: int) -> NoReturn:
    """The child: leaves by _exit, so that nothing of the parent's is ended twice, and never outlives it."""
    die_with_parent()
    logging.disable(logging.CRITICAL)  # the findings speak
    try:
        for current in pending:
            started = time.monotonic()
            outcome = _run_check(current, ctx, found)
            found[current.id] = make_finding(current, outcome, time.monotonic() - started)
            os.write(pipe, found[current.id].model_dump_json().encode() + b"\n")
    finally:
        os._exit(0)


def _failed_dependency(need: Finding) -> str:
    """The id that makes checks pointless which need this one: itself, or what it was skipped for; empty where none."""
    return need.id if need.status in BLOCKING else str(need.evidence.get("because", ""))


def _run_check(check: Check, ctx: CheckContext, found: dict[str, Finding]) -> CheckResult:
    asked = (id for id in check.needs if id in found and id not in ctx.ignored)
    cause = next(filter(None, (_failed_dependency(found[id]) for id in asked)), "")
    if cause:
        return CheckResult(Status.SKIP, f"because {cause}", evidence={"because": cause})
    try:
        return check.run(ctx)
    except Exception as error:  # a finding, never a crash of the doctor
        return CheckResult(Status.CRASH, f"the check failed: {type(error).__name__}: {error}")
