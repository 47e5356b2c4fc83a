"""The short run of the chaos driver, and the driver's own judgement.

`CHAOS_SEED` repeats a run; the seed of a random one is in the report of the test.
"""

import os
import random
import time
from pathlib import Path

import pytest

from tests.chaos import report
from tests.chaos.campaign import Plan, Records, describe, run
from tests.chaos.client import Request, Response
from tests.chaos.driver import Injection
from tests.chaos.faults import FAULTS
from tests.chaos.health import HealthWatch, Sample
from tests.chaos.lane import Start
from tests.chaos.ledger import Outcome, judge
from tests.chaos.load import Entry

DOCS = Path(__file__).parents[2] / "docs"
STREAM = Request("r", "/v1/completions", {"prompt": "x", "stream": True})
TEXTS = {"r": {0: "text"}}
ERROR = {"error_code": 606, "message": "lost", "error": {"message": "lost"}}


def response(**changes: object) -> Response:
    """Returns a complete response to STREAM, with changes."""
    fields = {"status": 200, "ended_at": 3.0, "text": {0: "text"}, "finishes": [0], "num_done": 1, **changes}
    return Response(1.0, **fields)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_faults_lose_no_request() -> None:
    seed = int(os.environ.get("CHAOS_SEED", random.randrange(1 << 16)))
    print(f"CHAOS_SEED={seed}")
    records = Records(None)
    faults = [fault for fault in FAULTS.values() if fault.in_ci and (fault.plain or os.geteuid() == 0)]
    run(faults, records, 1, seed, deadline=time.monotonic() + 150)
    bad = [describe(injection) for injection in records.injections if injection.problems]
    assert not bad, f"CHAOS_SEED={seed}\n" + "\n".join(bad)
    assert records.injections


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, Outcome.COMPLETE),
        ({"text": {0: "texd"}}, Outcome.WRONG),
        ({"text": {0: "tex"}}, Outcome.WRONG),
        ({"finishes": [0, 0]}, Outcome.WRONG),
        ({"num_done": 2}, Outcome.WRONG),
        ({"finishes": [], "num_done": 0}, Outcome.CUT),
        ({"ended_at": 0.0}, Outcome.HUNG),
        ({"errors": [ERROR]}, Outcome.ERROR),
        ({"errors": [ERROR, ERROR]}, Outcome.WRONG),
        ({"errors": [ERROR], "num_done": 0}, Outcome.WRONG),
        ({"errors": [{"detail": "?"}]}, Outcome.WRONG),
        ({"status": 503, "errors": [ERROR]}, Outcome.ERROR),
        ({"broken": "ConnectionResetError: reset"}, Outcome.CUT),
        ({"broken": "JSONDecodeError: ?"}, Outcome.WRONG),
    ],
)
def test_the_ledger_knows_how_a_request_ended(changes: dict[str, object], outcome: Outcome) -> None:
    assert judge(Entry(STREAM, response(**changes)), TEXTS, injected_at=2.0)[0] == outcome


def test_a_refusal_counts_as_one_only_after_the_fault() -> None:
    entry = Entry(STREAM, response(status=503, errors=[ERROR]))
    assert judge(entry, TEXTS, injected_at=0.5)[0] == Outcome.REFUSED
    assert judge(entry, TEXTS, injected_at=1.5)[0] == Outcome.ERROR


def test_the_watch_measures_how_long_health_was_wrong() -> None:
    """A completion hangs from 1.0 to 5.0; /health says 200 until 2.0, 503 until 6.0, and 200 again."""
    watch = HealthWatch.__new__(HealthWatch)
    watch.probes = [Sample(1.0, 5.0, 200), Sample(5.2, 5.3, 200)]
    watch.samples = [Sample(t / 20, t / 20 + 0.01, 200 if t / 20 < 2 or t / 20 > 6 else 503) for t in range(160)]
    truth = watch.truth(injected_at=1.0)
    assert truth.noticed == pytest.approx(1.01)
    assert truth.healthy == pytest.approx(5.06)
    assert truth.wrong == pytest.approx(0.95)
    assert truth.late == pytest.approx(0.7, abs=0.05)


def test_a_campaign_gives_all_faults_about_the_same_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.chaos.campaign.MAX_PER_START", 3)
    records = Records(None)
    for name, number in [("a", 0), ("a", 1), ("b", 0), ("b", 4)]:
        records.add(Injection(name, 1, number))
    plan = Plan(["a", "b", "c"], records, num_injections=6, seed=7)
    starts = [plan.next_start() for _ in range(3)]
    assert starts == [Start("c", 7, range(3)), Start("a", 7, range(2, 5)), Start("b", 7, range(5, 8))]

    plan.skip("b", "no root")
    records.add(Injection("c", 7, 0))
    plan.end(Start("c", 7, range(3)), num_recorded=1)  # restarts became slow: two are planned again, as new ones
    assert plan.next_start() == Start("c", 7, range(3, 6))
    assert [plan.next_start() for _ in range(3)] == [Start("c", 7, range(6, 8)), Start("a", 7, range(5, 6)), None]
    assert plan.skipped == {"b": "no root"}


def test_records_are_kept_and_continued(tmp_path: Path) -> None:
    injection = Injection("kill_rank", 5, 2, outcomes={"complete": 3}, noticed=0.5)
    Records(tmp_path / "new" / "records.jsonl").add(injection)
    found = Records(tmp_path / "new" / "records.jsonl")
    assert found.injections == [injection]
    assert found.numbers("kill_rank") == [2]
    assert found.numbers("kill_api") == []


def test_the_documented_table_is_that_of_the_records(tmp_path: Path) -> None:
    report.write(tmp_path / "reliability.md", Records(DOCS / "reliability.jsonl").injections, {})
    assert (tmp_path / "reliability.md").read_text() == (DOCS / "reliability.md").read_text()
