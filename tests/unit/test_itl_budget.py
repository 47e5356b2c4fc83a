"""Prompts beside decodes: streams get their tokens evenly, prompts progress, and nobody's first token comes later."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.engine.itl_budget import MIN_AUTOMATIC_SECONDS
from rtp_llm.engine.scheduler import Scheduler
from rtp_llm.engine.scheduler_config import CHUNK_TILE
from rtp_llm.engine.scheduler_output import SchedulerOutput
from rtp_llm.engine.step_cost import StepWork
from tests.quick import slow_except
from tests.unit.scheduling import complete, make_group, make_request, make_scheduler, step
from tests.unit.serving_simulator import Machine, Simulation, closed_loop, simulate

CPU, FASTER = Machine(noise=0.03), Machine(memory=0.011, row=6e-4, logits=8e-4, noise=0.03)
GPU = Machine(overhead=0.002, memory=0.006, row=2e-5, logits=2.5e-5, key=2e-9, noise=0.03)
LOADS: dict[str, Callable[[], tuple[int, int]]] = {
    "chat": lambda: (128, 64),
    "long-answers": lambda: (128, 128),
    "long-prompts": lambda: (1024, 128),
}


def make_warm_scheduler(machine: Machine, tokens: int = 512, **limits: Any) -> Scheduler:
    """Returns a scheduler that has served short answers, as a benchmark asks for before it measures."""
    scheduler = make_scheduler(8000, tokens, 32, [make_group(16)], admit_all=False, **limits)
    simulate(scheduler, machine, [(0.0, 128, 8)] * 16, seed=1)
    return scheduler


def fair_seconds(result: Simulation, num_streams: int) -> float:
    return num_streams / result.tokens_per_second()


def p99(values: np.ndarray) -> float:
    return float(np.quantile(values, 0.99))


def median_ttft(result: Simulation) -> float:
    return float(np.median([stream.ttft for stream in result.streams]))


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("num_streams", slow_except([1, 4, 16, 32], 4, 16))
@pytest.mark.parametrize("machine", [CPU, FASTER], ids=["cpu", "faster"])
def test_streams_get_their_tokens_evenly(machine: Machine, num_streams: int, load: str) -> None:
    """Compared with chunks of half a step: no gaps, nearly the same throughput, first tokens as early."""
    even = closed_loop(make_warm_scheduler(machine), machine, num_streams, LOADS[load], rounds=4)
    fixed = closed_loop(make_warm_scheduler(machine, max_mixed_chunk=256), machine, num_streams, LOADS[load], rounds=4)
    assert p99(even.gaps()) <= max(1.3 * fair_seconds(even, num_streams), 1.1 * MIN_AUTOMATIC_SECONDS)
    assert even.tokens_per_second() >= 0.94 * fixed.tokens_per_second()
    assert median_ttft(even) <= (1.05 if load == "chat" else 1.6) * median_ttft(fixed)
    if num_streams >= 16:
        assert p99(fixed.gaps()) > 1.5 * p99(even.gaps()), "the load makes no gaps, so that it tests none"


def test_without_a_measured_step_a_prompt_takes_half_of_it() -> None:
    scheduler = make_scheduler(tokens=64, blocks=100)
    scheduler.add(make_request("a", 3))
    step(scheduler)
    scheduler.add(make_request("b", 100))
    assert step(scheduler) == [("a", 3, 1), ("b", 0, 32)]


@pytest.mark.parametrize("budget", [0.06, 0.1, 0.3])
def test_a_given_budget_is_kept(budget: float) -> None:
    """Prompts of 8192 tokens beside streams."""
    exact = Machine()
    scheduler = make_warm_scheduler(exact, itl_budget_seconds=budget)
    chats = [(0.0, 64, 300)] * 8
    result = simulate(scheduler, exact, [*chats, *((1.0 + i, 8192, 20) for i in range(2))])
    floor = exact.seconds(StepWork(1, 9, CHUNK_TILE, 8 * 400, CHUNK_TILE * 8192), np.random.default_rng())
    mixed = [seconds for work, seconds in result.steps if work.decode_keys and work.prompt_keys]
    assert len(mixed) > 30
    assert p99(np.array(mixed)) <= max(1.1 * budget, floor)
    assert np.median(mixed) >= 0.8 * budget, "the prompts could be computed faster"


def test_a_rare_long_prompt_beside_streams_makes_no_long_gaps() -> None:
    scheduler = make_warm_scheduler(CPU)
    lengths = iter([(128, 64)] * 100 + [(8192, 64)] + [(128, 64)] * 1000)
    result = closed_loop(scheduler, CPU, 16, lambda: next(lengths), rounds=16)
    assert p99(result.gaps()) <= 3 * fair_seconds(result, 16)
    long = max(result.streams, key=lambda stream: stream.request.num_prompt_tokens)
    alone = simulate(make_warm_scheduler(CPU), CPU, [(0.0, 8192, 2)])
    assert long.ttft <= 3 * alone.streams[0].ttft


def test_an_open_loop_with_bursts() -> None:
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.exponential(2.0, 30))
    arrivals = [(float(t), int(rng.integers(32, 400)), int(rng.integers(16, 128))) for t in times for _ in range(6)]
    even = simulate(make_warm_scheduler(CPU), CPU, arrivals)
    fixed = simulate(make_warm_scheduler(CPU, max_mixed_chunk=256), CPU, arrivals)
    assert p99(even.gaps()) < 0.5 * p99(fixed.gaps())
    assert median_ttft(even) <= 1.5 * median_ttft(fixed)
    assert even.seconds <= 1.03 * fixed.seconds


def test_hiccups_of_the_machine_do_not_stall_prompts() -> None:
    with_hiccups = Machine(noise=0.1, hiccups=0.02)
    result = closed_loop(make_warm_scheduler(with_hiccups), with_hiccups, 16, LOADS["chat"])
    quiet = closed_loop(make_warm_scheduler(CPU), CPU, 16, LOADS["chat"])
    assert median_ttft(result) <= 2 * median_ttft(quiet)
    assert np.quantile(result.gaps(), 0.9) <= 1.4 * np.quantile(quiet.gaps(), 0.9)


def test_chunks_on_a_gpu_stay_large() -> None:
    """Prompts of 4000 tokens beside a stream: with 20 ms for a step, a third of the speed alone would be too slow."""
    scheduler = make_warm_scheduler(GPU, tokens=8192)
    result = simulate(scheduler, GPU, [(0.0, 100, 400), (0.5, 4000, 10), (1.5, 4000, 10)])
    chunks = [work.other_rows for work, _ in result.steps if work.decode_keys and work.other_rows > CHUNK_TILE]
    assert max(chunks) >= 600
    assert max(result.gaps()) < 0.04


def test_a_step_without_decodes_takes_no_more_prompts_than_it_needs_to_be_full() -> None:
    """The first answers then begin while the last prompts still wait. A prompt alone has the whole step."""
    scheduler = make_warm_scheduler(CPU)
    result = simulate(scheduler, CPU, [(0.0, 128, 2)] * 4, seed=2)
    assert result.steps[0][0].logit_rows == 1
    result = simulate(scheduler, CPU, [(0.0, 1024, 2)], seed=3)
    assert result.steps[0][0].other_rows == 512


@settings(max_examples=60, deadline=None)
@given(data=st.data(), budget=st.sampled_from([0.0, 0.03, 0.1]), depth=st.integers(0, 1))
def test_prompts_progress_and_steps_are_in_time(data: st.DataObject, budget: float, depth: int) -> None:
    """With any durations: the oldest prompt gets a tile's tokens per step, and no step is planned beyond its budget."""
    scheduler = make_scheduler(8000, 512, 8, [make_group(16)], admit_all=False, itl_budget_seconds=budget)
    cost = scheduler.itl_budget.cost
    requests = data.draw(st.lists(st.tuples(st.integers(1, 600), st.integers(1, 30)), min_size=1, max_size=12))
    for index, (prompt, output) in enumerate(requests):
        scheduler.add(make_request(f"r{index}", [index] * prompt, output))
    in_flight: list[SchedulerOutput] = []
    for _ in range(4000):
        if not (scheduler.running or scheduler.waiting or in_flight):
            break
        prompts = [r for r in scheduler.running if r.num_uncomputed_tokens > 1 and not r.num_pending_tokens]
        step_output, was_known = scheduler.schedule(), cost.is_known
        if step_output.chunks:
            in_flight.append(step_output)
            chunks = {c.request.id: c for c in step_output.chunks}
            assert not prompts or chunks[prompts[0].id].num_tokens >= min(CHUNK_TILE, 2)
            has_decodes = any(c.num_tokens == c.num_sampled and not c.is_new for c in step_output.chunks)
            num_prompts = sum(c.num_tokens > 1 for c in step_output.chunks)
            if budget and has_decodes and was_known and num_prompts > 1:
                assert cost.seconds(StepWork.of(step_output.chunks)) <= budget * 1.01 + cost.per_unit.logit_rows * 8
        if len(in_flight) > depth or not step_output.chunks:
            scheduler.record_seconds(in_flight[0], data.draw(st.floats(1e-3, 1.0)))
            complete(scheduler, in_flight.pop(0))
    assert not [*scheduler.running, *scheduler.waiting], "requests do not finish"


def test_the_even_time_follows_the_load() -> None:
    """The chunk beside 16 decodes is about 16 times the prompt tokens per output token of the load."""
    for prompt, output in ((128, 128), (128, 64), (512, 64)):
        scheduler = make_warm_scheduler(CPU)
        result = closed_loop(scheduler, CPU, 16, itertools.repeat((prompt, output)).__next__, rounds=4)
        chunks = [work.other_rows for work, _ in result.steps[100:] if work.decode_keys and work.other_rows]
        assert 0.9 <= np.median(chunks) / (16 * prompt / output) <= 1.7
