"""Which process gets which rank, without sockets and clocks."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtp_llm.parallel.members import Member
from rtp_llm.parallel.plan import Plan
from rtp_llm.parallel.rendezvous import KVCacheSize, Rendezvous, Worker

FINGERPRINT: dict[str, Any] = {"version": "1", "model": "a", "dtype": "fp32", "max_seq_len": 0}


def make_plan(num_parts: int, local: int) -> Plan:
    members = tuple(Member(n, f"x_part{n}", f"10.0.0.{n}", 10000) for n in range(num_parts))
    return Plan(members, 0, num_parts * local, num_parts * local, local, 10000, 9, "cpu")


def rendezvous(*workers: Worker, num_parts: int = 1, local: int = 2) -> Rendezvous:
    state = Rendezvous(make_plan(num_parts, local), FINGERPRINT)
    state.workers = list(workers)
    return state


def worker(part: int, index: int, resident_rank: int | None = None, **fields: Any) -> Worker:
    return Worker(part, index, 100 * part + index, "10.0.0.1:5", FINGERPRINT, resident_rank, **fields)


def indexes(assigned: dict[int, Worker] | None) -> dict[int, int] | None:
    return None if assigned is None else {rank: w.index for rank, w in assigned.items()}


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        ([], None),
        ([(0, 0)], None),
        ([(0, 0), (0, 1)], {0: 0, 1: 1}),
        ([(0, 2), (0, 1), (0, 0)], {0: 0, 1: 1}),  # the order of their HELLOs does not matter
        ([(0, 0, 1), (0, 1, 0)], {0: 1, 1: 0}),
        ([(0, 0, 1), (0, 2)], {0: 2, 1: 0}),
        ([(0, 1, 1), (0, 0), (0, 2)], {0: 0, 1: 1}),
        ([(0, 0, 0), (0, 2, 0), (0, 1)], {0: 0, 1: 1}),  # both have rank 0's weights
        ([(0, 0, 1), (0, 1, 1)], None),  # a worker with weights cannot become another rank
    ],
)
def test_ranks_of_one_part(workers: list[tuple[int, ...]], expected: dict[int, int] | None) -> None:
    assert indexes(rendezvous(*(worker(*w) for w in workers)).assign()) == expected


def test_worker_never_gets_a_rank_of_another_part() -> None:
    assert rendezvous(*(worker(0, i) for i in range(3)), num_parts=2, local=1).assign() is None


def test_nobody_gets_a_rank_while_one_is_still_leaving() -> None:
    """It holds the ports of its rank, and perhaps its weights are wanted."""
    leaving = worker(0, 0, 0, is_waiting=False, rank=0)
    state = rendezvous(leaving, worker(0, 1, 1), worker(0, 2))
    assert state.assign() is None
    leaving.is_waiting = True
    assert indexes(state.assign()) == {0: 0, 1: 1}


PARTS = st.integers(1, 3)
LOCAL = st.integers(1, 3)


@given(PARTS, LOCAL, st.data())
def test_every_rank_gets_one_worker_of_its_part_and_survivors_keep_theirs(
    num_parts: int, local: int, data: st.DataObject
) -> None:
    """Compares with the definition, over any set of workers that an earlier epoch may have left."""
    plan, workers = make_plan(num_parts, local), []
    for part in range(num_parts):
        free_ranks = data.draw(st.permutations(list(plan.ranks_of(part))))
        for index in data.draw(st.lists(st.integers(0, local), unique=True, max_size=local + 1)):
            is_resident = bool(free_ranks) and data.draw(st.booleans())
            workers.append(worker(part, index, free_ranks.pop() if is_resident else None))
    workers = data.draw(st.permutations(workers))
    assigned = rendezvous(*workers, num_parts=num_parts, local=local).assign()
    assert (assigned is not None) == all(sum(w.part == part for w in workers) >= local for part in range(num_parts))
    if assigned is None:
        return
    assert sorted(assigned) == list(range(plan.world_size))
    assert len({id(w) for w in assigned.values()}) == plan.world_size
    assert all(rank // local == w.part for rank, w in assigned.items())
    assert all(assigned[w.resident_rank] is w for w in workers if w.resident_rank is not None)


def test_size_of_the_kv_cache_comes_from_the_survivors() -> None:
    survivor = worker(0, 0, 0, kv_cache=KVCacheSize(77, 500))
    state = rendezvous(survivor, worker(0, 1))
    assigned = state.assign()
    assert assigned
    state.begin_epoch(assigned)
    assert state.kv_cache == KVCacheSize(77, 500)
    assert [(w.rank, w.is_waiting) for w in state.workers] == [(0, False), (1, False)]


def test_size_of_the_kv_cache_is_remembered_if_no_rank_survives() -> None:
    """Resumed requests may be longer than what would be measured now."""
    state = rendezvous(worker(0, 0, 0, kv_cache=KVCacheSize(77, 500)), worker(0, 1))
    state.begin_epoch(state.assign() or {})
    state.workers = [worker(0, 0), worker(0, 1)]
    state.begin_epoch(state.assign() or {})
    assert state.kv_cache == KVCacheSize(77, 500)


@pytest.mark.parametrize(
    ("part", "fingerprint", "expected"),
    [
        (0, FINGERPRINT, True),
        (1, FINGERPRINT, True),
        (2, FINGERPRINT, False),
        (-1, FINGERPRINT, False),
        (1, FINGERPRINT | {"model": "b", "dtype": "bf16"}, True),  # wrong settings, which it is told
        (1, FINGERPRINT | {"model": "b", "dtype": "bf16", "version": "2"}, False),
        (1, FINGERPRINT | {"extra": 1}, True),  # of another version, perhaps
        (1, {}, False),
    ],
)
def test_members_of_the_gang(part: int, fingerprint: dict[str, Any], expected: bool) -> None:
    assert rendezvous(num_parts=2, local=1).is_member(part, fingerprint) == expected


def test_parts_without_enough_workers_are_missing() -> None:
    state = rendezvous(worker(0, 0), worker(0, 1), worker(1, 0), num_parts=2)
    assert state.missing() == "part1 (10.0.0.1:10000, ranks 2-3)"
    state.workers.append(worker(1, 1))
    assert state.missing() == ""
    state.workers[0].is_waiting = False
    assert state.missing() == "part0 (10.0.0.0:10000, ranks 0-1)"


def test_differences_are_listed_by_key() -> None:
    other = worker(1, 0)
    other.fingerprint = FINGERPRINT | {"model": "b", "max_seq_len": 512}
    state = rendezvous(worker(0, 0), worker(0, 1), other, num_parts=2)
    assert state.differences().splitlines() == [
        "",
        "  max_seq_len: part0=0  part1=512",
        '  model: part0="a"  part1="b"',
    ]
    other.fingerprint = FINGERPRINT
    assert state.differences() == ""


def test_twins_are_workers_in_one_place() -> None:
    first, second, other = worker(0, 0), worker(0, 0), worker(1, 0)
    state = rendezvous(first, second, other, num_parts=2)
    assert [state.twin(w) for w in state.workers] == [second, first, None]


HELLO = {"part": 1, "index": 2, "pid": 3, "fingerprint": FINGERPRINT, "num_blocks": 4, "max_seq_len": 5}


@pytest.mark.parametrize("resident_rank", [None, 0, 7])
def test_worker_from_its_hello(resident_rank: int | None) -> None:
    made = Worker.from_hello({**HELLO, "resident_rank": resident_rank}, "10.0.0.9:1")
    assert (made.part, made.index, made.pid, made.resident_rank) == (1, 2, 3, resident_rank)
    assert (made.address, made.kv_cache, made.rank, made.is_waiting) == ("10.0.0.9:1", KVCacheSize(4, 5), None, True)


@pytest.mark.parametrize("field", [*HELLO, "resident_rank"])
def test_incomplete_hello_is_an_error(field: str) -> None:
    message = {**HELLO, "resident_rank": None}
    del message[field]
    with pytest.raises(KeyError, match=field):
        Worker.from_hello(message, "10.0.0.9:1")
