"""Injects one fault into a running gang under load, and records what its clients saw."""

import os
import random
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.chaos.faults import Fault, Scene
from tests.chaos.health import HealthWatch
from tests.chaos.ledger import Outcome, Texts, judge, judge_marked, longest_pause
from tests.chaos.load import Entry, Load
from tests.chaos.rig import Rig

NUM_CLIENTS = 8
FLOW_SECONDS = 60.0
SETTLE_SECONDS = 150.0  # from the repair to a healthy gang; five times what is wanted and more
GRACE_SECONDS = 1.0  # of load after the recovery
MAX_PROBLEMS = 12  # of one injection that are recorded in words


@dataclass
class Injection:
    """The record of one fault. Times are seconds; `number` tells the faults of one kind apart."""

    fault: str
    seed: int
    number: int
    moment: float = 0.0  # after the streams flow, or the gang is idle
    lasted: float = 0.0  # until the repair
    target: str = ""
    in_flight: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    lost: int = 0  # accepted requests without their text, although the fault allows no such end
    pause: float = 0.0  # longest silence of a stream that was in flight
    noticed: float | None = None  # see health.Truth
    healthy: float = 0.0
    wrong: float = 0.0
    late: float = 0.0
    took: float = 0.0  # the whole injection, without starting the gang
    cores: int = 0  # of the machine

    def to_json(self) -> dict[str, Any]:
        """Returns the fields that are not at their defaults; times are rounded to milliseconds."""
        fields, defaults = asdict(self), asdict(Injection(self.fault, self.seed, -1))
        values = {name: round(value, 3) if isinstance(value, float) else value for name, value in fields.items()}
        return {name: value for name, value in values.items() if name in ("fault", "seed") or value != defaults[name]}


def inject(fault: Fault, rig: Rig, texts: Texts, seed: int, number: int) -> Injection:
    """Runs one injection: load, fault, repair, recovery, ledger. The gang runs on afterwards, if it can.

    Raises NotHereError if the fault cannot be injected.
    """
    record = Injection(fault.name, seed, number, cores=os.cpu_count() or 0)
    rng = random.Random(f"{seed} {fault.name} {number}")
    begun_at = time.monotonic()
    if missing := rig.wait_steady():
        record.problems.append(missing)
    load, watch = Load(rig.endpoint, rng, NUM_CLIENTS), HealthWatch(rig.endpoint)
    scene = Scene(rig, rng, load)
    watch.start()
    injected_at = time.monotonic()
    try:
        if not fault.idle:
            load.start()
            load.wait_flowing(NUM_CLIENTS // 2, FLOW_SECONDS)
        record.moment = round(rng.uniform(0.0, 1.0), 3)
        time.sleep(record.moment)
        record.lasted = round(rng.uniform(*fault.seconds), 3)
        injected_at = time.monotonic()
        with fault.inject(scene):
            record.target = scene.target
            if fault.idle:
                load.start()
            time.sleep(record.lasted)
        _wait_recovered(rig, watch)
        time.sleep(GRACE_SECONDS)
    except AssertionError as error:
        record.problems.append(str(error).splitlines()[0])
    except SystemExit:  # told to end, perhaps within a fault that nobody repairs: there is nothing to wait for
        for part in rig.parts:
            part.kill_all()
        raise
    finally:
        load.stop(SETTLE_SECONDS if rig.is_running() else GRACE_SECONDS)
        watch.stop()
    if problem := rig.idle_problem():
        record.problems.append(problem)
    _judge(record, fault, [e for e in load.entries if e not in scene.marked], texts, injected_at)
    record.problems += [problem for entry in scene.marked if (problem := judge_marked(entry))]
    truth = watch.truth(injected_at)
    record.noticed, record.healthy, record.wrong, record.late = truth.noticed, truth.healthy, truth.wrong, truth.late
    record.took = round(time.monotonic() - begun_at, 1)
    return record


def _wait_recovered(rig: Rig, watch: HealthWatch) -> None:
    """Waits until /health says 200 and a completion passes, both begun from now on. Raises AssertionError."""
    since = time.monotonic()
    while not watch.healthy_since(since):
        assert rig.is_running(), "a part has ended"
        assert time.monotonic() < since + SETTLE_SECONDS, f"no healthy gang within {SETTLE_SECONDS:g} s"
        time.sleep(0.02)


def _judge(record: Injection, fault: Fault, entries: Iterable[Entry], texts: Texts, injected_at: float) -> None:
    """Judges the entries of the load, and measures the pause of those that were in flight at the fault."""
    fine = {Outcome.COMPLETE, Outcome.REFUSED, *fault.allowed}
    outcomes: Counter[str] = Counter()
    in_flight = []
    for entry in entries:
        outcome, text = judge(entry, texts, injected_at)
        outcomes[outcome.value] += 1
        if entry.is_open_at(injected_at):
            in_flight.append(entry)
        if outcome not in fine:
            record.lost += 1
            sent = entry.response.sent_at - injected_at
            if record.lost <= MAX_PROBLEMS:
                record.problems.append(f"{entry.request.name}, sent {sent:+.1f} s: {outcome}: {text}")
    record.outcomes = dict(sorted(outcomes.items()))
    record.in_flight, record.pause = len(in_flight), longest_pause(in_flight, injected_at)
