"""The cost of a step is learned from the durations of steps, on machines of any speed."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rtp_llm.engine.step_cost import StepCost, StepWork
from tests.unit.scheduling import complete, make_request, make_scheduler
from tests.unit.serving_simulator import Machine

CPU, FASTER, GPU = Machine(), Machine(memory=0.011, row=6e-4, logits=8e-4), Machine(2e-3, 3e-3, 2e-5, 2.5e-5, 2e-9)


def decodes(number: int, context: int = 150) -> StepWork:
    return StepWork(1, logit_rows=number, decode_keys=number * context)


def with_prompt(work: StepWork, num_tokens: int, start: int = 0) -> StepWork:
    return work._replace(
        other_rows=work.other_rows + num_tokens,
        prompt_keys=work.prompt_keys + num_tokens * (start + num_tokens / 2),
    )


def run(cost: StepCost, machine: Machine, works: list[StepWork], seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for work in works:
        cost.record(work, machine.seconds(work, rng))


def mixed_load(number: int = 16, steps: int = 100) -> list[StepWork]:
    return [with_prompt(decodes(number), chunk) for chunk in ([48, 48, 32, 0] * steps)[:steps]]


def exact_seconds(machine: Machine, work: StepWork) -> float:
    """Returns the duration without noise and hiccups."""
    return Machine(machine.overhead, machine.memory, machine.row, machine.logits, machine.key).seconds(
        work, np.random.default_rng()
    )


def test_work_of_a_step_with_all_kinds_of_chunks() -> None:
    scheduler = make_scheduler(blocks=100, tokens=64, sequences=8, max_mixed_chunk=16)
    scheduler.add(make_request("a", 10))
    complete(scheduler, scheduler.schedule())
    for name, prompt, logprobs in (("b", 8, 1), ("c", 30, None)):
        scheduler.add(make_request(name, prompt, prompt_logprobs=logprobs))
    output = scheduler.schedule()
    assert [(c.request.id, c.start, c.num_tokens) for c in output.chunks] == [("a", 10, 1), ("b", 0, 8), ("c", 0, 16)]
    # b: seven prompt tokens have a logprob, the eighth is sampled; c goes on in the next step.
    assert StepWork.of(output.chunks) == StepWork(1, 1 + 8, 16, 10.5, 8 * 4 + 16 * 8)


def test_drafts_are_decodes() -> None:
    scheduler = make_scheduler(blocks=100, tokens=64)
    request = make_request("a", 10)
    scheduler.add(request)
    complete(scheduler, scheduler.schedule())
    chunk = scheduler.schedule().chunks[0]
    chunk = scheduler._with_drafts(chunk, [1, 2, 3], 10)
    assert StepWork.of([chunk]) == StepWork(1, 4, 0, 4 * 12, 0)


@pytest.mark.parametrize("machine", [CPU, FASTER, GPU], ids=["cpu", "faster", "gpu"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_predictions_are_right_after_forty_steps(machine: Machine, noise: float) -> None:
    """Whatever the first guess was."""
    cost = StepCost()
    assert not cost.is_known
    noisy = Machine(machine.overhead, machine.memory, machine.row, machine.logits, machine.key, noise)
    run(cost, noisy, [with_prompt(StepWork(), 512), *mixed_load(steps=40)])
    assert cost.is_known
    for work in mixed_load(steps=4):
        assert cost.seconds(work) == pytest.approx(exact_seconds(machine, work), rel=0.15 + noise)


def test_a_machine_that_gets_slower_is_noticed() -> None:
    cost = StepCost()
    run(cost, FASTER, mixed_load())
    run(cost, CPU, mixed_load(steps=24))
    work = with_prompt(decodes(16), 32)
    assert cost.seconds(work) == pytest.approx(exact_seconds(CPU, work), rel=0.15)


def test_a_hiccup_moves_the_estimate_little_and_not_for_long() -> None:
    cost = StepCost()
    run(cost, CPU, mixed_load(steps=200))
    work = with_prompt(decodes(16), 48)
    before = cost.seconds(work)
    cost.record(work, 10 * before)
    assert before < cost.seconds(work) < 1.2 * before
    run(cost, CPU, mixed_load(steps=12))
    assert cost.seconds(work) == pytest.approx(before, rel=0.03)


def test_what_a_step_has_none_of_stays_as_it_was() -> None:
    """Hours of decodes do not change what is known about prompts."""
    cost = StepCost()
    run(cost, CPU, mixed_load())
    before = cost.per_unit
    run(cost, FASTER, [decodes(1)] * 1000)
    assert cost.per_unit.other_rows == pytest.approx(before.other_rows, rel=0.01)
    assert cost.per_unit.prompt_keys == pytest.approx(before.prompt_keys, rel=0.01)
    assert cost.seconds(decodes(1)) == pytest.approx(exact_seconds(FASTER, decodes(1)), rel=0.01)


def test_long_contexts_are_learned() -> None:
    cost = StepCost()
    works = [with_prompt(decodes(4, 6000), 64, start) for start in range(0, 8192, 64)]
    run(cost, CPU, [with_prompt(StepWork(), 512), *works, *works])
    for work in works[64::16]:
        assert cost.seconds(work) == pytest.approx(exact_seconds(CPU, work), rel=0.15)


AMOUNTS = st.builds(
    StepWork, st.just(1), st.integers(0, 300), st.integers(0, 8192), st.integers(0, 10**7), st.integers(0, 10**7)
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(AMOUNTS, st.one_of(st.just(-1.0), st.just(0.0), st.floats(0.003, 10))), max_size=60))
@example([(StepWork(other_rows=96), 0.004), (StepWork(), 1.0)])  # rows seem to cost nothing
@example([(StepWork(1, 274, 230, 1034, 5092983), 0.005), (StepWork(1, 0, 3399, 0, 3714), 0.0036)])
def test_no_measurements_spoil_the_estimate_for_long(steps: list[tuple[StepWork, float]]) -> None:
    cost = StepCost()
    for work, seconds in steps:
        cost.record(work, seconds)
        assert all(0 < s < math.inf for s in cost.per_unit)
    run(cost, CPU, mixed_load(steps=1000))
    for work in mixed_load(steps=4):
        assert cost.seconds(work) == pytest.approx(exact_seconds(CPU, work), rel=0.5)
