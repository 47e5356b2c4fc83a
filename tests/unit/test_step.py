"""Steps: the frame that carries a step to the other ranks, and the sequences that ranks keep from step to step."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rtp_llm.contract.request import Request
from rtp_llm.contract.step import ARRAYS, ROW_SIZES, Ints, Step
from rtp_llm.engine.scheduler_output import ScheduledChunk, SchedulerOutput
from rtp_llm.engine.step_builder import build_sampling_metadata, build_step
from rtp_llm.errors import CommunicationError
from rtp_llm.runner.input_batch import InputBatch, StepInputs
from tests.unit.scheduling import FixedProposer, make_group, make_request, make_scheduler

MAX_SEQ_LEN = 64
GROUPS = {
    "full": [make_group()],
    "full-and-sliding": [make_group(4), make_group(8, window=10)],
    "state": [make_group(4), make_group(per_sequence=True)],
}
INTS = st.integers(-(2**31), 2**31 - 1)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    def array(name: str) -> Ints:
        size = ROW_SIZES.get(name, 1)
        rows = draw(st.lists(st.lists(INTS, min_size=size, max_size=size), max_size=3))
        return np.array(rows, np.int32).reshape((-1, size) if name in ROW_SIZES else -1)

    numbers = (draw(st.integers(0, 2**31 - 1)), draw(st.integers(0, 2**31 - 1)), draw(st.integers(0, 2**32 - 1)))
    arrays: dict[str, Any] = {name: array(name) for name in ARRAYS}
    return Step(*numbers, **arrays)


@settings(max_examples=200, deadline=None)
@given(steps())
def test_bytes_round_trip(step: Step) -> None:
    received = Step.from_bytes(step.to_bytes())
    assert (received.epoch, received.number, received.digest) == (step.epoch, step.number, step.digest)
    for name in ARRAYS:
        sent, array = getattr(step, name), getattr(received, name)
        assert array.dtype == sent.dtype == np.int32, name
        assert array.shape == sent.shape, name
        assert (array == sent).all(), name


@settings(max_examples=200, deadline=None)
@given(steps(), st.data())
def test_frame_of_wrong_length_is_rejected(step: Step, data: st.DataObject) -> None:
    frame = step.to_bytes()
    length = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(ValueError, match=r".+"):
        Step.from_bytes(frame[:length])
    with pytest.raises(ValueError, match=r".+"):
        Step.from_bytes(frame + bytes(data.draw(st.integers(1, 9))))


NUMBERS = st.lists(st.integers(-3, 5) | INTS, max_size=20)


@settings(max_examples=300, deadline=None)
@example(np.array([0, 0, 0, *(1, -3), *[0] * 7, 0], dtype=np.int32).tobytes())  # lengths that cancel out
@given(st.binary(max_size=200) | NUMBERS.map(lambda numbers: np.array(numbers, np.int32).tobytes()))
def test_random_bytes_are_rejected_or_a_valid_frame(data: bytes) -> None:
    try:
        step = Step.from_bytes(data)
    except ValueError:
        return
    assert step.to_bytes() == data


def chunk(name: str, prompt: list[int], slot: int, start: int, num_tokens: int, **fields: object) -> ScheduledChunk:
    request = make_request(name, prompt)
    request.slot = slot
    return ScheduledChunk(request, start, num_tokens, **fields)  # type: ignore[arg-type]


def test_arrays_of_a_step() -> None:
    decode = chunk("a", [5, 6, 7], 2, 5, 1, num_sampled=1)
    drafts = chunk("b", [5, 6], 0, 4, 3, token_ids=[8, 9], draft_tokens=[8, 9], num_sampled=3)
    prompt = chunk("c", [1, 2, 3], 1, 0, 3, token_ids=[1, 2, 3], num_sampled=1, num_prompt_logprobs=2, is_new=True)
    prompt.new_blocks.extend([(0, 0, 7), (1, 0, 9)])
    output = SchedulerOutput([decode, drafts, prompt], ended_slots=[1], rewinds=[(0, 4)])
    step = build_step(output, 3, 9)
    assert (step.epoch, step.number, step.num_tokens) == (3, 9, 7)
    assert step.ended_slots.tolist() == [1]
    assert step.new_sequences.tolist() == [[1, 3, 0]]
    assert step.rewinds.tolist() == [[0, 4]]
    assert step.new_blocks.tolist() == [[1, 0, 0, 7], [1, 1, 0, 9]]
    assert step.slots.tolist() == [2, 0, 1]
    assert step.counts.tolist() == [1, 3, 3]
    assert step.num_sampled.tolist() == [1, 3, 1]
    assert step.token_ids.tolist() == [8, 9, 1, 2, 3]
    assert step.logprob_indices.tolist() == [4, 5]
    metadata = build_sampling_metadata(output.chunks)
    assert metadata.new_requests == [(1, prompt.request)]
    assert metadata.prompt_logprobs == [(2, 0), (3, 0)]


def test_rows_of_a_step_with_drafts() -> None:
    batch = InputBatch([make_group()], 4, MAX_SEQ_LEN)
    prompt = chunk("a", [1, 2, 3], 2, 0, 3, token_ids=[1, 2, 3], num_sampled=1, is_new=True, new_blocks=[(0, 0, 5)])
    inputs = batch.apply(build_step(SchedulerOutput([prompt]), 1, 1))
    assert inputs.token_ids.tolist() == [1, 2, 3]
    assert (inputs.sampled_indices.tolist(), inputs.sampled_slots.tolist()) == ([2], [2])
    drafts = chunk("a", [1, 2, 3], 2, 3, 3, token_ids=[8, 9], draft_tokens=[8, 9], num_sampled=3)
    inputs = batch.apply(build_step(SchedulerOutput([drafts]), 1, 2))
    assert (inputs.device_indices.tolist(), inputs.device_slots.tolist()) == ([0], [2])
    assert inputs.token_ids[1:].tolist() == [8, 9]
    assert inputs.sampled_indices.tolist() == [0, 1, 2]
    rows = inputs.sampled_rows()
    assert (rows.slots.tolist(), rows.positions.tolist()) == ([2, 2, 2], [4, 5, 6])
    assert (rows.draft_offsets.tolist(), rows.draft_tokens.tolist()) == ([0, 1, 2], [-1, 8, 9])


def check_inputs(inputs: StepInputs, chunks: Sequence[ScheduledChunk], newest: dict[int, int]) -> None:
    """Compares the arrays that a rank derives with the requests themselves.

    `newest`: by slot, the newest token that ranks hold on the device.
    """
    token_ids = inputs.token_ids.copy()
    token_ids[inputs.device_indices] = [newest[slot] for slot in inputs.device_slots.tolist()]
    for index, chunk in enumerate(chunks):
        request, end = chunk.request, chunk.start + chunk.num_tokens
        first, last = inputs.query_start_loc[index : index + 2].tolist()
        expected = [*request.tokens, *chunk.draft_tokens][chunk.start : end]
        assert token_ids[first:last].tolist() == expected
        assert (inputs.seq_lens[index], inputs.prompt_lens[index]) == (end, request.num_prompt_tokens)
        for tables, blocks in zip(inputs.block_tables, request.block_tables, strict=True):
            row = tables[index].tolist()
            used = blocks[: len(row)]  # rejected drafts may have left a block that the step does not reach
            assert [r for r, block in zip(row, used, strict=False) if block] == [b for b in used if b]


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(sorted(GROUPS)), st.booleans())
def test_ranks_keep_the_state_that_the_requests_have(rng: random.Random, groups: str, has_drafts: bool) -> None:
    """Random arrivals, ends, preemptions, aborts and rejected drafts."""
    scheduler = make_scheduler(14, 12, 4, GROUPS[groups], max_seq_len=MAX_SEQ_LEN)
    scheduler.proposer = FixedProposer([3, 3]) if has_drafts else None
    leader, follower = (InputBatch(GROUPS[groups], 4, MAX_SEQ_LEN) for _ in range(2))
    newest: dict[int, int] = {}
    for number in range(1, 60):
        if rng.random() < 0.3:
            scheduler.add(make_request(f"{number}", [rng.randrange(4) for _ in range(rng.randrange(1, 20))], 30))
        if rng.random() < 0.1 and (requests := [*scheduler.running, *scheduler.waiting]):
            scheduler.remove(rng.choice(requests).id)
        output = scheduler.schedule()
        if not output.chunks:
            continue
        step = build_step(output, 1, number)
        inputs = leader.apply(step)
        received = follower.apply(Step.from_bytes(replace(step, digest=inputs.digest()).to_bytes()))
        received.check_digest()
        check_inputs(inputs, output.chunks, newest)
        follower.check_snapshot(leader.snapshot())
        results = [sample(chunk, rng) for chunk in output.chunks if chunk.num_sampled]
        newest |= dict(zip(inputs.sampled_slots.tolist(), [tokens[-1] for tokens in results], strict=True))
        scheduler.update(output, results)


def sample(chunk: ScheduledChunk, rng: random.Random) -> list[int]:
    """Returns random accepted draft tokens and the token after them."""
    return [*chunk.draft_tokens[: rng.randrange(chunk.num_sampled)], rng.randrange(4)]


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda batch: batch.num_computed.__setitem__(0, 7),
        lambda batch: batch.block_tables[0].__setitem__((0, 0), 9),
        lambda batch: batch.has_sampled.__setitem__(0, 0),
    ],
    ids=["num_computed", "block_table", "has_sampled"],
)
def test_diverged_sequences_are_detected(corrupt: Callable[[InputBatch], None]) -> None:
    leader, follower = (InputBatch([make_group()], 4, MAX_SEQ_LEN) for _ in range(2))
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 5))
    for number in (1, 2):
        output = scheduler.schedule()
        step = build_step(output, 1, number)
        inputs = leader.apply(step)
        if number == 2:
            corrupt(follower)
            with pytest.raises(CommunicationError, match="differs from rank 0"):
                follower.check_snapshot(leader.snapshot())
            if not follower.has_sampled[0]:
                break  # the step does not even have the tokens for it
            with pytest.raises(CommunicationError, match="step 2"):
                follower.apply(replace(step, digest=inputs.digest())).check_digest()
            return
        follower.apply(step)
        scheduler.update(output, [[1]])


def count_operations(batch: InputBatch, slots: Sequence[int], number: int) -> int:
    """Returns the Python function calls and lines that applying a decode step of these slots takes."""
    import sys

    def make(slot: int) -> ScheduledChunk:
        request: Request = make_request("a", [1])
        request.slot = slot
        return ScheduledChunk(request, 0, 1, num_sampled=1)

    step = build_step(SchedulerOutput([make(slot) for slot in slots]), 1, number)
    count = 0

    def trace(frame: object, event: str, argument: object) -> object:
        nonlocal count
        count += 1
        return trace

    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        batch.apply(step)
    finally:
        sys.settrace(None)
    return count


def test_host_operations_grow_neither_with_context_nor_with_sequences() -> None:
    counts = set()
    for num_slots, context in ((1, 1), (64, 1), (1, 4000), (64, 4000)):
        batch = InputBatch([make_group(16)], 64, 4096)
        batch.num_computed[:], batch.has_sampled[:] = context, 1
        counts.add(count_operations(batch, range(num_slots), 1))
    assert len(counts) == 1
