"""Admission: few tokens are computed twice, blocks do not stay idle, and every request is admitted in the end."""

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.contract.request import Request
from rtp_llm.engine.admission_control import FIRST_OUTPUT_LENGTH
from rtp_llm.engine.scheduler import Scheduler
from rtp_llm.engine.scheduler_config import CHUNK_TILE
from rtp_llm.engine.scheduler_output import SchedulerOutput
from tests.quick import slow_except
from tests.unit.scheduling import complete, make_group, make_request, make_scheduler, step

BLOCK_SIZE = 16


def make_pool_scheduler(blocks: int, tokens: int = 256, *, admit_all: bool = False) -> Scheduler:
    return make_scheduler(blocks, tokens, 256, [make_group(BLOCK_SIZE)], admit_all=admit_all, enable_caching=False)


def make_requests(seed: int, number: int, max_tokens: int = 0) -> dict[Request, int]:
    """Returns requests with 50 to 500 prompt tokens, and the length of their answers, 100 to 400 tokens.

    `max_tokens`: of each request; 0: the length of its answer.
    """
    rng = random.Random(seed)
    lengths = [(rng.randint(50, 500), rng.randint(100, 400)) for _ in range(number)]
    return {
        make_request(f"r{index}", [index] * prompt, max_tokens or output): output
        for index, (prompt, output) in enumerate(lengths)
    }


def simulate(scheduler: Scheduler, requests: dict[Request, int], depth: int = 0) -> tuple[float, float]:
    """Runs all requests to their ends.

    Returns the number of computed tokens, relative to the least, and the share of blocks in use, averaged over steps.
    """
    for request in requests:
        scheduler.add(request)
    in_flight: deque[SchedulerOutput] = deque()
    num_computed, used = 0, []
    while scheduler.running or scheduler.waiting or in_flight:
        output = scheduler.schedule()
        if output.chunks:
            in_flight.append(output)
            num_computed += output.num_tokens
            used.append(scheduler.kv_cache_manager.pool.num_used)
        if len(in_flight) > depth or not output.chunks:
            output = in_flight.popleft()
            for update in scheduler.update(output, [[1] for c in output.chunks if c.num_sampled]):
                has_stopped = update.request.num_output_tokens == requests[update.request]
                if has_stopped and not update.request.has_ended:
                    scheduler.remove(update.request.id)
    least = sum(request.num_prompt_tokens + length - 1 for request, length in requests.items())
    return num_computed / least, sum(used) / len(used) / scheduler.kv_cache_manager.pool.num_usable


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("max_tokens", [0, 4096], ids=["known-lengths", "unknown-lengths"])
@pytest.mark.parametrize("tokens", [64, 256, 2048])
@pytest.mark.parametrize("seed", slow_except(range(5), 0))
def test_few_tokens_are_computed_twice(seed: int, tokens: int, max_tokens: int, depth: int) -> None:
    scheduler = make_pool_scheduler(140, tokens)
    ratio, used = simulate(scheduler, make_requests(seed, 24, max_tokens), depth)
    assert ratio <= 1.3
    assert used >= 0.55, "blocks are idle though requests wait"


def test_without_admission_control_most_tokens_are_computed_several_times() -> None:
    """The measure of the test above can fail."""
    ratio, _ = simulate(make_pool_scheduler(140, admit_all=True), make_requests(0, 24))
    assert ratio > 6


def test_lengths_of_answers_are_learned() -> None:
    """Short answers under a high limit: after the first have ended, more run at a time."""
    scheduler = make_pool_scheduler(200, 2048)
    requests = {make_request(f"r{i}", [i] * 100, 4096): 20 for i in range(200)}
    ratio, used = simulate(scheduler, requests)
    assert ratio <= 1.05
    assert used >= 0.75


@pytest.mark.parametrize("depth", [0, 1])
def test_nothing_waits_if_blocks_are_ample(depth: int) -> None:
    requests = make_requests(0, 24, max_tokens=4096)
    blocks = sum(-(-(r.num_prompt_tokens + FIRST_OUTPUT_LENGTH) // BLOCK_SIZE) for r in requests)
    scheduler = make_pool_scheduler(blocks)
    for request in requests:
        scheduler.add(request)
    while scheduler.waiting:
        output = scheduler.schedule()
        idle_tokens = scheduler.config.max_num_batched_tokens - output.num_tokens
        assert not scheduler.waiting or idle_tokens < CHUNK_TILE, "a request waits though tokens are left"
        complete(scheduler, output)
    assert len(scheduler.running) == 24


@pytest.mark.parametrize("prompt", [1, 100, 159])
def test_lone_request_is_admitted_even_if_it_may_outgrow_the_pool(prompt: int) -> None:
    scheduler = make_pool_scheduler(10)
    scheduler.add(make_request("a", prompt, 4096))
    assert step(scheduler) == [("a", 0, prompt)]


def test_whole_prompt_must_fit_beside_running_ones() -> None:
    """The first chunk of the second prompt would fit beside the end of the first prompt."""
    scheduler = make_scheduler(20, 16, 8, [make_group(BLOCK_SIZE)], admit_all=False, enable_caching=False)
    for name, prompt in (("a", 100), ("b", 240), ("c", 60)):
        scheduler.add(make_request(name, prompt, 1))
    for _ in range(6):
        step(scheduler)
    assert [r.id for r in scheduler.running] == ["a"]
    assert step(scheduler) == [("a", 96, 4)]
    assert step(scheduler) == [("b", 0, 16)]


def test_preempted_request_is_not_admitted_again_before_it_fits() -> None:
    """The lengths of two requests are underestimated: the younger is preempted once, until the older has ended."""
    scheduler = make_pool_scheduler(20)
    for _ in range(64):
        scheduler.admission_control.record_output_length(1)
    requests = {make_request(name, [ord(name)] * 100, 150): 150 for name in "ab"}
    ratio, _ = simulate(scheduler, requests)
    assert scheduler.stats.preemptions == 1
    assert ratio < 1.4


def test_shared_prefix_counts_once() -> None:
    """Ten requests with a common prompt of 90 blocks and a short end run together in 140 blocks."""
    scheduler = make_scheduler(140, 2048, 16, [make_group(BLOCK_SIZE)], admit_all=False)
    document = list(range(1440))
    for index in range(10):
        scheduler.add(make_request(f"r{index}", [*document, index], 30))
    for _ in range(3):
        step(scheduler)
    assert len(scheduler.running) == 10
    assert scheduler.stats.preemptions == 0


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    number=st.integers(1, 24),
    blocks=st.integers(60, 300),
    tokens=st.integers(2, 600),
    max_tokens=st.sampled_from([0, 4096]),
    depth=st.integers(0, 1),
)
def test_recomputed_tokens_are_bounded(
    seed: int, number: int, blocks: int, tokens: int, max_tokens: int, depth: int
) -> None:
    """A single request takes up to 57 blocks."""
    ratio, _ = simulate(make_pool_scheduler(blocks, tokens), make_requests(seed, number, max_tokens), depth)
    assert ratio <= 2


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), tokens=st.integers(2, 40), depth=st.integers(0, 1))
def test_decodes_progress_in_a_bounded_number_of_steps(seed: int, tokens: int, depth: int) -> None:
    scheduler = make_pool_scheduler(140, tokens)
    requests = make_requests(seed, 24)
    for request in requests:
        scheduler.add(request)
    in_flight: deque[SchedulerOutput] = deque()
    last_step: dict[str, int] = {}  # of running requests that decode
    for number in range(1500):
        output = scheduler.schedule()
        in_flight.append(output)
        last_step |= {c.request.id: number for c in output.chunks if c.num_sampled}
        for request in scheduler.waiting:
            last_step.pop(request.id, None)  # was preempted
        if len(in_flight) > depth:
            complete(scheduler, in_flight.popleft())
        decoding = [r for r in scheduler.running if r.num_uncomputed_tokens == 1 and r.id in last_step]
        bound = -(-len(scheduler.running) // (tokens - 1)) + 1 + depth
        assert all(number - last_step[r.id] <= bound for r in decoding)
