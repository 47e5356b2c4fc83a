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
from doctor.check import skip as skipped
from doctor.node import Node
from doctor.report import Finding, finding

BLOCKING = {Status.ERROR, Status.CRASH}


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
    pending = list(checks)
    while pending:
        child = _start(pending, node, found)
        try:
            crashed = _collect(child, pending, found)
        finally:
            status = child.end()
        if crashed:
            current = pending.pop(0)
            found[current.id] = finding(current, crashed(status), 0.0)
    return [found[check.id] for check in checks]


def _collect(child: _Child, pending: list[Check], found: dict[str, Finding]) -> Any:
    """Moves finished checks from `pending` to `found`. Returns None at the orderly end, else how to judge the check
    that is now first."""
    while pending:
        current = pending[0]
        try:
            line = child.next(current.timeout)
        except TimeoutError:
            return lambda status: unknown(f"gave no answer within {current.timeout:g} s and was killed")
        if line is None:
            return _died
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
    """The child: leaves by _exit, so that nothing of the parent's is ended twice."""
    logging.disable(logging.CRITICAL)  # the findings speak
    try:
        for current in pending:
            started = time.monotonic()
            outcome = _judge(current, node, found)
            found[current.id] = finding(current, outcome, time.monotonic() - started)
            os.write(pipe, found[current.id].model_dump_json().encode() + b"\n")
    finally:
        os._exit(0)


def _judge(check: Check, node: Node, found: dict[str, Finding]) -> Outcome:
    cause = next((i for i in check.needs if i in found and found[i].status in BLOCKING), None)
    if cause:
        return skipped(f"because {cause}")
    try:
        return check.run(node)
    except Exception as error:  # a finding, never a crash of the doctor
        return Outcome(Status.CRASH, f"the check failed: {type(error).__name__}: {error}")
