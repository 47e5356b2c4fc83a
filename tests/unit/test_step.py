"""The step frame: what goes in comes out, and a frame that was cut or stretched is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.contract.step import Step
from rtp_llm.engine.scheduler import ScheduledChunk
from rtp_llm.engine.step_builder import build_step, decodes_first, logits_offsets

SIZE = 4
ARRAYS = (
    "token_ids",
    "positions",
    "slot_mapping",
    "query_start_loc",
    "seq_lens",
    "prompt_lens",
    "block_tables",
    "logits_indices",
)


def piece(tokens: list[int], start: int, count: int, first_block: int = 0, *, logprobs: bool = False) -> ScheduledChunk:
    request = Request("r", tokens, SamplingParams(1, prompt_logprobs=logprobs))
    request.block_ids = list(range(first_block, first_block + -(-(start + count) // SIZE)))
    return ScheduledChunk(request, start, count)


@st.composite
def slices(draw: st.DrawFn) -> list[ScheduledChunk]:
    found = []
    for index in range(draw(st.integers(1, 5))):
        tokens = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20))
        start = draw(st.integers(0, len(tokens) - 1))
        count = draw(st.integers(1, len(tokens) - start))
        found.append(piece(tokens, start, count, 10 * index, logprobs=draw(st.booleans())))
    return decodes_first(found)


def assert_equal(one: Step, other: Step) -> None:
    assert (one.epoch, one.number, one.num_decodes) == (other.epoch, other.number, other.num_decodes)
    for name in ARRAYS:
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype == np.int32, name
        assert a.shape == b.shape, name
        assert (a == b).all(), name


@settings(max_examples=200, deadline=None)
@given(slices(), st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_bytes_round_trip(pieces: list[ScheduledChunk], epoch: int, number: int) -> None:
    step = build_step(pieces, SIZE, epoch, number)
    received = Step.from_bytes(step.to_bytes())
    assert_equal(step, received)
    assert received.token_ids.flags.writeable  # torch wants memory it may write


@settings(max_examples=200, deadline=None)
@given(slices(), st.data())
def test_a_frame_of_any_other_length_is_refused(pieces: list[ScheduledChunk], data: st.DataObject) -> None:
    frame = build_step(pieces, SIZE, 1, 1).to_bytes()
    cut = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(ValueError, match=r".+"):
        Step.from_bytes(frame[:cut])
    with pytest.raises(ValueError, match=r".+"):
        Step.from_bytes(frame + bytes(data.draw(st.integers(1, 9))))


NUMBERS = st.lists(st.integers(-3, 5) | st.integers(-(2**31), 2**31 - 1), max_size=20)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | NUMBERS.map(lambda numbers: np.array(numbers, np.int32).tobytes()))
def test_noise_is_refused_or_happens_to_fit(noise: bytes) -> None:
    try:
        step = Step.from_bytes(noise)
    except ValueError:
        return
    assert step.to_bytes() == noise


def test_a_step_says_where_every_token_goes() -> None:
    decode = piece([5, 6, 7, 8, 9, 10], 5, 1, first_block=2)
    prompt = piece([1, 2, 3], 0, 3, first_block=7)
    step = build_step([decode, prompt], SIZE, 1, 9)
    assert step.token_ids.tolist() == [10, 1, 2, 3]
    assert step.positions.tolist() == [5, 0, 1, 2]
    assert step.slot_mapping.tolist() == [3 * SIZE + 1, 28, 29, 30]
    assert step.query_start_loc.tolist() == [0, 1, 4]
    assert step.seq_lens.tolist() == [6, 3]
    assert step.block_tables.tolist() == [[2, 3], [7, 0]]
    assert step.logits_indices.tolist() == [0, 3]
    assert (step.num_tokens, step.num_sequences, step.num_decodes) == (4, 2, 1)


def test_the_context_ends_where_the_slice_ends() -> None:
    step = build_step([piece(list(range(10)), 2, 3)], SIZE, 1, 1)
    assert (step.seq_lens.tolist(), step.prompt_lens.tolist()) == ([5], [10])


@settings(max_examples=100, deadline=None)
@given(slices())
def test_decodes_come_first_and_keep_their_order(pieces: list[ScheduledChunk]) -> None:
    counts = [s.num_tokens for s in pieces]
    ones = build_step(pieces, SIZE, 1, 1).num_decodes
    assert counts[:ones] == [1] * ones
    assert 1 not in counts[ones:]
    assert [id(s) for s in decodes_first(pieces)] == [id(s) for s in pieces]


@pytest.mark.parametrize(
    ("start", "count", "logprobs", "rows"),
    [(0, 3, False, []), (3, 3, False, [2]), (0, 6, False, [5]), (0, 3, True, [0, 1, 2]), (3, 3, True, [0, 1, 2])],
)
def test_logits_are_wanted_of_the_last_token_or_of_all(start: int, count: int, logprobs: bool, rows: list[int]) -> None:
    assert logits_offsets(piece([1] * 6, start, count, logprobs=logprobs)).tolist() == rows
