"""Runs checks one after another in a forked process, which sends each finding through a pipe.

A check may hang in a driver, a DNS server or a network file system, or crash in a broken library. Then the process is
killed, the check's finding says so, and a new process runs the remaining checks.
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
from graphlib import TopologicalSorter
from typing import Any, NoReturn

from doctor.check import Check, CheckResult, Status, skip, unknown
from doctor.context import CheckContext
from doctor.report import Finding, make_finding
from rtp_llm.machine.process import die_with_parent

# A check is skipped if a check that it needs has one of these statuses.
BLOCKING = {Status.ERROR, Status.CRASH, Status.UNKNOWN}


@dataclass
class _Worker:
    """A forked process that runs checks, and the read end of a pipe to which it writes one line of JSON per check."""

    pid: int
    pipe: int
    buffer: bytes = b""
    lines: list[dict[str, Any]] = field(default_factory=list)

    def next_finding(self, timeout: float) -> dict[str, Any] | None:
        """Returns the next finding, None if the pipe is closed. Raises TimeoutError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self.pipe, selectors.EVENT_READ)
            while not self.lines:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                data = os.read(self.pipe, 1 << 16)
                if not data:
                    return None
                *lines, self.buffer = (self.buffer + data).split(b"\n")
                self.lines += [json.loads(line) for line in lines]
        return self.lines.pop(0)

    def kill_and_wait(self) -> int:
        """Kills the process and returns its wait status, or 0 if it is still blocked in the kernel after 0.5 s."""
        os.close(self.pipe)
        os.kill(self.pid, signal.SIGKILL)
        for _ in range(50):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return status
            time.sleep(0.01)
        return 0


def run_checks(checks: Sequence[Check], ctx: CheckContext, earlier: Sequence[Finding] = ()) -> list[Finding]:
    """Runs checks and returns one finding per check, in the order of `checks`.

    `earlier`: findings of checks that have already run. A check is skipped if one that it needs failed there.
    """
    findings = {finding.id: finding for finding in earlier}
    pending = topological_order(checks)
    while pending:
        worker = _start_worker(pending, ctx, findings)
        try:
            failure = _collect(worker, pending, findings)
        finally:
            status = worker.kill_and_wait()
        if failure:
            check, (result, seconds) = pending.pop(0), failure
            findings[check.id] = make_finding(check, result or _crash_result(status), seconds)
    return [findings[check.id] for check in checks]


def topological_order(checks: Sequence[Check]) -> list[Check]:
    """Returns the checks in an order in which each check follows the checks that it needs."""
    by_id = {check.id: check for check in checks}
    dependencies = {check.id: [id for id in check.needs if id in by_id] for check in checks}
    return [by_id[id] for id in TopologicalSorter(dependencies).static_order()]


def _collect(
    worker: _Worker, pending: list[Check], findings: dict[str, Finding]
) -> tuple[CheckResult | None, float] | None:
    """Reads the worker's findings, and moves each finished check from `pending` to `findings`.

    Returns None if all checks finished. Otherwise returns (result, seconds) of the first check in `pending`: result is
    a finding if the check hangs, and None if the worker died.
    """
    while pending:
        check, started = pending[0], time.monotonic()
        try:
            data = worker.next_finding(check.timeout)
        except TimeoutError:
            return unknown(f"did not finish within {check.timeout:g} s and was killed"), check.timeout
        if data is None:
            return None, time.monotonic() - started
        findings[check.id] = Finding.model_validate(data)
        pending.pop(0)
    return None


def _crash_result(status: int) -> CheckResult:
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    reason = f"signal {number} ({signal.Signals(number).name})" if number else f"status {status}"
    return CheckResult(Status.CRASH, f"the check's process died: {reason}")


def _start_worker(pending: Sequence[Check], ctx: CheckContext, findings: dict[str, Finding]) -> _Worker:
    sys.stdout.flush()  # otherwise the child could print the buffered output again
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write_end)
        return _Worker(pid, read_end)
    os.close(read_end)
    _worker_main(pending, ctx, dict(findings), write_end)


def _worker_main(pending: Sequence[Check], ctx: CheckContext, findings: dict[str, Finding], pipe: int) -> NoReturn:
    """Runs the checks in the child. Exits by os._exit, so that the parent's exit handlers do not run twice."""
    die_with_parent()
    logging.disable(logging.CRITICAL)  # the findings contain all results
    try:
        for check in pending:
            started = time.monotonic()
            result = _run_check(check, ctx, findings)
            findings[check.id] = make_finding(check, result, time.monotonic() - started)
            os.write(pipe, findings[check.id].model_dump_json().encode() + b"\n")
    finally:
        os._exit(0)


def _failed_dependency(finding: Finding) -> str:
    """Returns the id of the failed check to name as the cause if a check that needs this one is skipped; empty if it
    can run.

    The cause is this check if it failed, or the failed check because of which this one was skipped.
    """
    return finding.id if finding.status in BLOCKING else str(finding.evidence.get("because", ""))


def _run_check(check: Check, ctx: CheckContext, findings: dict[str, Finding]) -> CheckResult:
    dependencies = (findings[id] for id in check.needs if id in findings and id not in ctx.ignored)
    cause = next(filter(None, map(_failed_dependency, dependencies)), "")
    if cause:
        return skip(f"not run, because {cause} did not pass", because=cause)
    try:
        return check.run(ctx)
    except Exception as error:  # a bug in one check must not end the doctor
        return CheckResult(Status.CRASH, f"the check failed: {type(error).__name__}: {error}")
