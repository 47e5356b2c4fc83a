"""How many failures the guard forgives, and how long it waits before a restart."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtp_llm.supervise.restart_budget import MAX_DELAY_SECONDS, VERDICT_SECONDS, WINDOW_SECONDS, RestartBudget

SIGNAL = -1
SERVED = float("inf")  # the gang serves all the time
SETTLED = VERDICT_SECONDS + 1


def charged(limit: int, *times: float) -> RestartBudget:
    """Returns a budget with a failure outside of any epoch, which counts at once, at each of these times."""
    budget = RestartBudget(limit)
    for time in times:
        budget.charge(time, f"worker0 at {time}", SIGNAL, SERVED)
    return budget


def test_first_restart_is_immediate_then_the_delay_doubles() -> None:
    times = [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [charged(4, *times[: n + 1]).delay(times[n], {}) for n in range(5)] == [0.0, 0.5, 1.0, 2.0, 4.0]
    assert charged(100, *map(float, range(100))).delay(100.0, {}) == MAX_DELAY_SECONDS == 60


def test_the_failure_beyond_the_limit_spends_the_budget() -> None:
    assert not charged(2, 0.0, 1.0).is_spent(1.0, {})
    assert charged(2, 0.0, 1.0, 2.0).is_spent(2.0, {})
    assert not RestartBudget(0).is_spent(0.0, {})
    assert charged(0, 0.0).is_spent(0.0, {})


def test_failures_older_than_ten_minutes_do_not_count() -> None:
    assert charged(2, 0.0, 300.0, 500.0, 601.0).num_failures(601.0, {}) == 3
    assert charged(1, 0.0, WINDOW_SECONDS + 1).delay(WINDOW_SECONDS + 1, {}) == 0.0


def test_processes_that_ended_one_epoch_are_one_failure() -> None:
    budget = RestartBudget(1)
    for time, code in ((0.0, SIGNAL), (0.1, 71), (3.0, 71)):
        budget.charge(time, "4", code, SERVED)
    assert budget.num_failures(SETTLED, {}) == 1
    assert budget.last_codes() == [SIGNAL, 71, 71]
    budget.charge(SETTLED, "5", 70, SERVED)
    assert budget.last_codes() == [70]


@pytest.mark.parametrize(
    ("verdict", "at_once", "later"),
    [("engine", 1, 1), ("request", 0, 0), ("investigating", 0, 0), (None, 0, 1)],
)
def test_verdict_on_a_lost_epoch(verdict: str | None, at_once: int, later: int) -> None:
    """What a request broke is free. Without a verdict the loss counts after five seconds, also if the API hangs."""
    verdicts = {"7": verdict} if verdict else {}
    budget = RestartBudget(3)
    budget.charge(10.0, "7", SIGNAL, SERVED)
    assert budget.num_failures(10.0, verdicts) == at_once
    assert budget.num_failures(10.0 + SETTLED, verdicts) == later


def test_verdict_may_turn_against_the_engine_later() -> None:
    budget = RestartBudget(0)
    budget.charge(0.0, "7", SIGNAL, SERVED)
    assert not budget.is_spent(60.0, {"7": "investigating"})
    assert budget.is_spent(61.0, {"7": "engine"})


def test_verdict_on_another_epoch_does_not_matter() -> None:
    budget = RestartBudget(3)
    budget.charge(0.0, "7", SIGNAL, SERVED)
    assert budget.num_failures(SETTLED, {"6": "request", "8": "request"}) == 1


def test_without_restarts_the_first_failure_counts_at_once() -> None:
    """With RESTART_LIMIT=0 the part must not serve five more seconds in which a client sees 503."""
    budget = RestartBudget(0)
    budget.charge(0.0, "1", SIGNAL, SERVED)
    assert budget.is_spent(0.0, {})


EVENTS = st.lists(
    st.tuples(st.floats(0, 300), st.integers(1, 5), st.sampled_from(["", "investigating", "request", "engine"])),
    max_size=12,
)


@given(EVENTS, st.integers(1, 4))
def test_budget_counts_the_epochs_that_no_request_ended(events: list[tuple[float, int, str]], limit: int) -> None:
    """Compares with sets: of the epochs lost within the window, minus those with a verdict against a request."""
    budget, now = RestartBudget(limit), 0.0
    verdicts: dict[str, str] = {}
    lost: dict[int, float] = {}
    for pause, epoch, verdict in events:
        now += pause
        if now - lost.get(epoch, now) > WINDOW_SECONDS:
            del lost[epoch]
        budget.charge(now, str(epoch), SIGNAL, SERVED)
        lost.setdefault(epoch, now)
        verdicts[str(epoch)] = verdict
    now += SETTLED
    budget.charge(now, "unrelated", SIGNAL, SERVED)  # what is too old is forgotten with the next failure
    counting = {e for e, at in lost.items() if now - at <= WINDOW_SECONDS and verdicts[str(e)] in ("", "engine")}
    assert budget.num_failures(now, verdicts) == len(counting) + 1
    assert budget.is_spent(now, verdicts) == (len(counting) + 1 > limit)


def test_failures_without_serving_in_between_are_not_forgotten() -> None:
    """Epochs whose communicator fails after its timeout of minutes are rarer than the window is long."""
    budget = RestartBudget(2)
    for number in range(3):
        now = number * WINDOW_SECONDS
        assert not budget.is_spent(now, {})
        budget.charge(now, f"{number}", 70, served_at=-1.0)
    now += SETTLED
    assert budget.is_spent(now, {})
    budget.charge(now + WINDOW_SECONDS, "3", 70, served_at=now)
    assert not budget.is_spent(now + WINDOW_SECONDS, {})
