"""What a rank says of itself in its heartbeats when memory is short, or when it stands still."""

import time

import pytest

from rtp_llm.parallel import rank_status
from rtp_llm.parallel.rank_status import (
    EVICTED_SECONDS,
    LONGEST_STEPS,
    SHORT_BYTES,
    STALL_SECONDS,
    STILL_SECONDS,
    RankStatus,
)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The available bytes of the machine, which the test may change."""
    found = [SHORT_BYTES]
    monkeypatch.setattr(rank_status, "available_memory", lambda: found[0])
    return found


def test_a_stall_of_the_scheduler_is_reported_until_it_ends(clock: Clock, available: list[int]) -> None:
    status = RankStatus(0)
    status._last_progress = clock()
    for _ in range(3):  # it is recorded again and again
        status.record_stall(True)
        assert not status.to_json()["lacks_memory"]
        clock.now += 0.45 * STALL_SECONDS
    assert status.to_json()["lacks_memory"]
    status.record_stall(False)
    assert not status.to_json()["lacks_memory"]
    status.record_stall(True)
    clock.now += 2 * STALL_SECONDS
    status.begin_epoch(0)
    assert not status.to_json()["lacks_memory"], "the next epoch has not computed anything yet"


def test_a_step_that_stands_still_is_reported_only_if_memory_is_short(
    clock: Clock, available: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    freed = []
    monkeypatch.setattr(rank_status, "return_free_heap", lambda: freed.append(clock.now))
    status = RankStatus(0)
    status.mark_progress()
    clock.now += 2 * EVICTED_SECONDS
    assert not status.to_json()["lacks_memory"], "a long step of a machine with enough memory"
    assert not freed
    available[0] -= 1
    assert status.to_json()["lacks_memory"]
    assert freed == [clock.now]
    status.is_waiting = True  # for a step of rank 0
    assert not status.to_json()["lacks_memory"]
    status.is_waiting = False
    status.count_progress()
    assert not status.to_json()["lacks_memory"]


def test_a_rank_stands_still_if_it_takes_much_longer_than_ever(clock: Clock, available: list[int]) -> None:
    """The longest layer may take 9 s on a slow CPU: it is judged by what the rank has needed before."""
    status = RankStatus(0)
    status.mark_progress()
    clock.now += 0.05
    status.count_progress()
    clock.now += 0.9 * STILL_SECONDS
    assert not status.to_json()["stands_still"]
    clock.now += 0.2 * STILL_SECONDS
    assert status.to_json()["stands_still"]
    status.is_waiting = True  # for a step of rank 0
    assert not status.to_json()["stands_still"]
    status.is_waiting = False
    status.count_progress()  # a long layer, after all
    clock.now += 0.9 * LONGEST_STEPS * status.longest_s
    assert not status.to_json()["stands_still"]
    clock.now += 0.2 * LONGEST_STEPS * status.longest_s
    assert status.to_json()["stands_still"]
