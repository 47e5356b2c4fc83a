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

from doctor.check import Check, Outcome, Status, unknown
from doctor.node import Node
from doctor.report import Finding, finding
from rtp_llm.parallel.lifeline import die_with_parent

# After these a check that needs it is pointless: what gave no answer to one will give none to the next.
BLOCKING = {Status.ERROR, Status.CRASH, Status.UNKNOWN}


@dataclass
class _Child:
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

    def end(self) -> int:
        """Kills it and returns what waitpid says; a process stuck in the kernel is left behind, not waited for."""
        os.close(self.pipe)
        os.kill(self.pid, signal.SIGKILL)
        for _ in range(50):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return status
            time.sleep(0.01)
        return 0


def run_checks(checks: Sequence[Check], node: Node, earlier: Sequence[Finding] = ()) -> list[Finding]:
    """One finding for each check, in order. `earlier`: findings of another run, for what these checks need."""
    found: dict[str, Finding] = {f.id: f for f in earlier}
    pending = _causes_first(checks)
    while pending:
        child = _start(pending, node, found)
        try:
            failed = _collect(child, pending, found)
        finally:
            status = child.end()
        if failed:
            current, (outcome, seconds) = pending.pop(0), failed
            found[current.id] = finding(current, outcome or _died(status), seconds)
    return [found[check.id] for check in checks]


def _causes_first(checks: Sequence[Check]) -> list[Check]:
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


def _collect(child: _Child, pending: list[Check], found: dict[str, Finding]) -> tuple[Outcome | None, float] | None:
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


def _died(status: int) -> Outcome:
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    how = f"signal {number} ({signal.Signals(number).name})" if number else f"status {status}"
    return Outcome(Status.CRASH, f"the check's process died: {how}")


def _start(pending: Sequence[Check], node: Node, found: dict[str, Finding]) -> _Child:
    sys.stdout.flush()
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return _Child(pid, read)
    os.close(read)
    _work(pending, node, dict(found), write)


def _work(pending: Sequence[Check], node: Node, found: dict[str, Finding], pipe: int) -> NoReturn:
    """The child: leaves by _exit, so that nothing of the parent's is ended twice, and never outlives it."""
    die_with_parent()
    logging.disable(logging.CRITICAL)  # the findings speak
    try:
        for current in pending:
            started = time.monotonic()
            outcome = _judge(current, node, found)
            found[current.id] = finding(current, outcome, time.monotonic() - started)
            os.write(pipe, found[current.id].model_dump_json().encode() + b"\n")
    finally:
        os._exit(0)


def _cause(need: Finding) -> str:
    """The id that makes checks pointless which need this one: itself, or what it was skipped for; empty where none."""
    return need.id if need.status in BLOCKING else str(need.evidence.get("because", ""))


def _judge(check: Check, node: Node, found: dict[str, Finding]) -> Outcome:
    asked = (id for id in check.needs if id in found and id not in node.ignored)
    cause = next(filter(None, (_cause(found[id]) for id in asked)), "")
    if cause:
        return Outcome(Status.SKIP, f"because {cause}", evidence={"because": cause})
    try:
        return check.run(node)
    except Exception as error:  # a finding, never a crash of the doctor
        return Outcome(Status.CRASH, f"the check failed: {type(error).__name__}: {error}")
