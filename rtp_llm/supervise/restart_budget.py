"""The restart budget: how many failures of the ranks are allowed before the part ends."""

from dataclasses import dataclass, field

WINDOW_SECONDS = 600.0
VERDICT_SECONDS = 5.0  # from a failure until it counts, if the API process has not said that a request is its cause
MAX_DELAY_SECONDS = 60.0


@dataclass
class Failure:
    """Processes that ended together, which count as one failure.

    key: number of the epoch (the life of one communicator of the ranks) that their exit ended, or a unique text if they
    had no communicator.
    """

    key: str
    time: float
    codes: list[int]


@dataclass
class RestartBudget:
    """Allows at most `limit` failures of ranks in ten minutes; beyond that, the part ends. Until the gang serves
    again, no failure expires.

    Failures that a request caused do not count.
    """

    limit: int
    failures: list[Failure] = field(default_factory=list)

    def charge(self, now: float, key: str, code: int, served_at: float) -> None:
        """Counts the end of a process against the limit. Processes with the same `key` are one failure: it names the
        epoch (the life of one communicator of the ranks) that their exits ended, see `Failure`.

        code: exit code; -1 for killed by a signal. served_at: when the gang last served (failures since then never
        expire).
        """
        self.failures = [f for f in self.failures if now - f.time <= WINDOW_SECONDS or f.time > served_at]
        known = next((f for f in self.failures if f.key == key), None)
        if known:
            known.codes.append(code)
        else:
            self.failures.append(Failure(key, now, [code]))

    def num_failures(self, now: float, verdicts: dict[str, str]) -> int:
        """Returns the number of failures, without those that a request caused or may have caused.

        verdicts: {epoch: what ended it}: "request", "engine", or "investigating" while that is not known yet.
        """
        return sum(self._counts(failure, now, verdicts) for failure in self.failures)

    def is_spent(self, now: float, verdicts: dict[str, str]) -> bool:
        return self.num_failures(now, verdicts) > self.limit

    def delay(self, now: float, verdicts: dict[str, str]) -> float:
        """Returns the seconds before the next restart, by the number of failures that count: 0, 0.5, 1, 2, 4 … 60.

        verdicts: {epoch: what ended it}. Failures of epochs that "request" ended do not count, nor those of which it is
        not known yet ("investigating").
        """
        count = self.num_failures(now, verdicts)
        return 0.0 if count <= 1 else min(MAX_DELAY_SECONDS, 0.5 * 2 ** min(count - 2, 10))

    def last_codes(self) -> list[int]:
        """Returns the exit codes of the processes that ended together in the last failure."""
        return self.failures[-1].codes if self.failures else []

    def _counts(self, failure: Failure, now: float, verdicts: dict[str, str]) -> bool:
        verdict = verdicts.get(failure.key, "")
        if verdict in ("investigating", "request"):
            return False
        is_settled = verdict == "engine" or not failure.key.isdigit() or now - failure.time > VERDICT_SECONDS
        return is_settled or self.limit == 0
