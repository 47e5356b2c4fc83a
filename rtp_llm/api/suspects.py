"""Finds the request that makes the engine crash. Only the requests of the failed step are suspects.

A request is on probation until it has finished a step, and again for a few steps after it was in a failed step. If the
engine is lost in a step whose requests are all trusted, the engine is the cause (an operator killed a rank, say), and
all requests continue together. Otherwise the requests on probation are tried in groups, one group at a time, while all
other requests are held. A group that fails is halved; one that passes is cleared. A request that was alone in a failed
step is the culprit if it was in at least MIN_FAILED_STEPS: two ranks that are killed one after the other, the second
while a request is tried alone, convict no request.

This module is a state machine without sockets and clocks; `api.client` carries out its decisions.
"""

import logging
from collections.abc import Collection, Iterable
from typing import Generic, Literal, Protocol, TypeVar

log = logging.getLogger(__name__)

Verdict = Literal["investigating", "request", "engine"]

TRIAL_STEPS = 2  # to be cleared: the result of the step before the one that failed may have been lost with the engine
MIN_FAILED_STEPS = 3  # of a culprit, in a row
RELAPSE_STEPS = 8  # on probation after a failed step; a request that fails at some position fails there again at once
MAX_CULPRITS = 3  # different ones within WINDOW_SECONDS; then it is the engine
WINDOW_SECONDS = 600.0
MAX_VERDICTS = 100  # kept, of the latest epochs


class Suspect(Protocol):
    """Interface of a sequence that the engine runs, and that a crash of the engine can be blamed on. Hashable by
    identity.
    """

    @property
    def id(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """A digest of prompt and sampling parameters, equal for repetitions of the same request."""
        ...


R = TypeVar("R", bound=Suspect)


class SuspectTracker(Generic[R]):
    """Finds the sequence that crashes an engine, by running the suspects in smaller and smaller groups. Here "request"
    means one sequence. It knows which requests are on probation (they were in a step that failed) or on trial (their
    group runs while all others wait), and what caused each loss.

    An epoch is the time between two losses of the engine; they are numbered. `verdicts`: what ended each epoch:
    "investigating", "request" or "engine". "investigating" becomes "request" once a culprit is convicted and another
    request has then finished a step; "engine" if no culprit is found. A loss that a request caused does not count
    against RESTART_LIMIT.
    """

    def __init__(self) -> None:
        self.verdicts: dict[int, Verdict] = {}
        self._probation: dict[R, int] = {}  # steps that the request has to finish
        self._num_failed: dict[R, int] = {}  # failed steps of the requests on probation
        self._groups: list[dict[R, int]] = []  # the first is on trial: steps that each request has to finish in it
        self._unexplained: list[int] = []  # epochs that were lost in this investigation, since the last culprit
        self._explained: list[int] = []  # epochs that a culprit explains, until another request finishes a step
        self._culprits: dict[str, float] = {}  # by fingerprint: when it was convicted

    @property
    def is_investigating(self) -> bool:
        """True while a group of requests that may have crashed the engine runs and all other requests wait."""
        return bool(self._groups)

    def may_run(self, request: R) -> bool:
        return not self._groups or request in self._groups[0]

    def is_known_culprit(self, request: R, now: float) -> bool:
        """Returns whether a request with this fingerprint was found to crash the engine in the last WINDOW_SECONDS.
        Such a request must not run again. `now`: time.monotonic().
        """
        self._forget_culprits(now)
        return bool(self._culprits) and not self._blames_engine and request.fingerprint in self._culprits

    def add(self, request: R) -> None:
        """Adds an accepted request: a suspect if the engine is lost before the request has finished a step."""
        self._probation[request] = 1

    def remove(self, request: R) -> None:
        """Removes a request that has finished, failed or was cancelled by its client: it is no suspect any more."""
        self._clear(request)
        for group in self._groups:
            group.pop(request, None)
        self._end_trials()

    def on_step(self, requests: Iterable[R]) -> None:
        """Records that the engine finished a step in which these requests got tokens or ended."""
        for request in requests:
            self._settle(self._explained, "request")
            if self._probation.get(request, 0) > 1:
                self._probation[request] -= 1
            else:
                self._clear(request)
            if self._groups and request in self._groups[0]:
                self._groups[0][request] -= 1
        self._end_trials()

    def on_lost(self, epoch: int, launched: Collection[R], now: float) -> R | None:
        """Handles the loss of the engine. Returns the culprit, which the caller must end; None if no request is
        convicted.

        launched  the requests in flight that were in the failed step
        now       seconds, of a monotonic clock
        """
        self._forget_culprits(now)
        trial = self._groups.pop(0) if self._groups else None
        suspects = [r for r in launched if trial is not None or r in self._probation]
        self._probation |= dict.fromkeys(launched, RELAPSE_STEPS)
        self._num_failed |= {r: self._num_failed.get(r, 0) + 1 for r in launched}
        if trial is None:
            self._settle(self._explained, "engine")  # no other request has finished a step yet
        untried = [r for r in trial or () if r not in launched]
        self._groups[:0] = [_group(untried)] if untried else []
        if not suspects:
            self._log_engine_loss(epoch, len(launched))
            self._record(epoch, "engine")
            return None
        self._record(epoch, "engine" if self._blames_engine else "investigating")
        self._unexplained.append(epoch)
        if trial is not None and len(suspects) == 1 and self._num_failed[suspects[0]] >= MIN_FAILED_STEPS:
            return self._convict(suspects[0], now)
        middle = (len(suspects) + 1) // 2
        self._groups[:0] = [_group(half) for half in (suspects[:middle], suspects[middle:]) if half]
        log.warning(
            "the engine was lost in epoch %d; %d of the %d requests in its last step may have caused that. To find out"
            " which, the first %d of them run next, and all other requests wait",
            epoch,
            len(suspects),
            len(launched),
            len(self._groups[0]),
        )
        return None

    def _convict(self, culprit: R, now: float) -> R:
        self._culprits[culprit.fingerprint] = now
        self._explained += self._unexplained
        self._unexplained = []
        self._probation = {r: steps for r, steps in self._probation.items() if steps == 1}  # the rest is explained
        self._num_failed.clear()
        log.error("request %s was alone in a failed step: it gets an error, the other requests continue", culprit.id)
        if self._blames_engine:
            log.error(
                "%d different requests, each running alone, have made the engine fail within ten minutes: the cause is"
                " the engine, not a request; its further failures count against RESTART_LIMIT",
                len(self._culprits),
            )
        return culprit

    def _end_trials(self) -> None:
        """Ends the trials of groups, in turn, whose requests have all passed or ended."""
        if not self._groups:
            return
        while self._groups and all(steps <= 0 for steps in self._groups[0].values()):
            for request in self._groups.pop(0):
                self._clear(request)
        if not self._groups:
            if self._unexplained:
                log.warning(
                    "none of the suspected requests makes the engine fail alone: the cause is the engine, not a request"
                )
            self._settle(self._unexplained, "engine")

    def _clear(self, request: R) -> None:
        """Ends the probation of a request."""
        self._probation.pop(request, None)
        self._num_failed.pop(request, None)

    def _settle(self, epochs: list[int], verdict: Verdict) -> None:
        """Sets the final verdict of epochs under investigation, and empties the list."""
        for epoch in epochs:
            if self.verdicts.get(epoch) == "investigating":
                self._record(epoch, verdict)
        epochs.clear()

    def _record(self, epoch: int, verdict: Verdict) -> None:
        self.verdicts[epoch] = verdict
        while len(self.verdicts) > MAX_VERDICTS:
            del self.verdicts[min(self.verdicts)]

    def _log_engine_loss(self, epoch: int, num_launched: int) -> None:
        reason = f"all {num_launched} requests of its step had run before" if num_launched else "it computed no request"
        log.warning("the engine was lost in epoch %d, but %s: the cause is the engine, not a request", epoch, reason)

    @property
    def _blames_engine(self) -> bool:
        return len(self._culprits) >= MAX_CULPRITS

    def _forget_culprits(self, now: float) -> None:
        self._culprits = {f: at for f, at in self._culprits.items() if now - at < WINDOW_SECONDS}


def _group(requests: Iterable[R]) -> dict[R, int]:
    return dict.fromkeys(requests, TRIAL_STEPS)
