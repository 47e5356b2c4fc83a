"""Watches /health every 50 ms, and compares it with small completions that are always under way."""

import threading
import time
from dataclasses import dataclass

from tests.chaos.client import Endpoint

SAMPLE_SECONDS = 0.05
PROBE_INTERVAL_SECONDS = 0.25
PROBE = {"prompt": "Hello", "max_tokens": 1, "temperature": 0, "ignore_eos": True}
PROBE_TIMEOUT_SECONDS = 120.0
HANG_SECONDS = 1.0  # a completion that takes longer than this from a sample on was hanging at that sample


@dataclass(frozen=True)
class Sample:
    """One answer. `status` 0: none."""

    started: float
    ended: float
    status: int


@dataclass(frozen=True)
class Truth:
    """What /health said about a fault, in seconds.

    noticed  from the fault to the first answer other than 200; None if there was none
    healthy  from the fault to the first 200 after the last other answer; 0 if all were 200
    wrong    during which /health said 200 although a completion hung
    late     during which it said 503 although completions had passed since
    """

    noticed: float | None
    healthy: float
    wrong: float
    late: float


class HealthWatch:
    """Samples /health and completions in two threads from the start to `stop`."""

    def __init__(self, endpoint: Endpoint):
        self.samples: list[Sample] = []
        self.probes: list[Sample] = []
        self._endpoint, self._stop = endpoint, threading.Event()
        self._open_probe = 0.0  # when the probe that is under way was sent; 0: none
        self._threads = [
            threading.Thread(target=self._watch, name="health", daemon=True),
            threading.Thread(target=self._probe, name="probe", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PROBE_TIMEOUT_SECONDS)

    @property
    def is_healthy(self) -> bool:
        """True if the last answers of /health and of the probe were 200."""
        return all(samples and samples[-1].status == 200 for samples in (self.samples, self.probes))

    def healthy_since(self, moment: float) -> bool:
        """Returns True if /health said 200 and a completion passed, both begun after `moment`."""
        return self.is_healthy and self.samples[-1].started > moment and self.probes[-1].started > moment

    def truth(self, injected_at: float) -> Truth:
        later = [s for s in self.samples if s.started > injected_at]
        noticed = next((s.ended - injected_at for s in later if s.status != 200), None)
        last_bad = max((n for n, s in enumerate(later) if s.status != 200), default=-1)
        recovered = last_bad + 1
        healthy = 0.0 if noticed is None else (later[recovered].ended - injected_at if recovered < len(later) else -1.0)
        wrong = [s for s in later if s.status == 200 and self._was_hanging(s.ended)]
        late = [s for s in later if s.status == 503 and self._had_passed(s.started, injected_at + (noticed or 0.0))]
        return Truth(noticed, healthy, _duration(wrong), _duration(late))

    def _was_hanging(self, moment: float) -> bool:
        return any(p.started < moment and p.ended > moment + HANG_SECONDS for p in self.probes)

    def _had_passed(self, moment: float, since: float) -> bool:
        return any(p.status == 200 and since < p.started and p.ended < moment for p in self.probes)

    def _watch(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            status, _ = self._endpoint.fetch("/health", timeout=5.0)
            self.samples.append(Sample(started, time.monotonic(), status))
            self._stop.wait(max(0.0, SAMPLE_SECONDS - (time.monotonic() - started)))

    def _probe(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            status, _ = self._endpoint.fetch("/v1/completions", PROBE, timeout=PROBE_TIMEOUT_SECONDS)
            self.probes.append(Sample(started, time.monotonic(), status))
            self._stop.wait(PROBE_INTERVAL_SECONDS)


def _duration(samples: list[Sample]) -> float:
    """Returns the seconds for which these samples stand."""
    return len(samples) * SAMPLE_SECONDS
