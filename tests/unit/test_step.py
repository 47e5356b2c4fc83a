"""Steps: the arrays that describe a step's chunks, and the frame (message) that carries a step to the other ranks,
which is rejected if its length is wrong."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.contract.step import Step
from rtp_llm.engine.scheduler import ScheduledChunk
from rtp_llm.engine.step_builder import build_step, logits_offsets, sort_decodes_first

BLOCK_SIZE = 4
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


def make_chunk(
    tokens: list[int], start: int, num_tokens: int, first_block: int = 0, *, logprobs: bool = False
) -> ScheduledChunk:
    """Returns a chunk of a request whose KV blocks are numbered from `first_block`."""
    request = Request("r", tokens, SamplingParams(1, prompt_logprobs=logprobs))
    request.block_ids = list(range(first_block, first_block + -(-(start + num_tokens) // BLOCK_SIZE)))
    return ScheduledChunk(request, start, num_tokens)


@st.composite
def chunk_lists(draw: st.DrawFn) -> list[ScheduledChunk]:
    chunks = []
    for index in range(draw(st.integers(1, 5))):
        tokens = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20))
        start = draw(st.integers(0, len(tokens) - 1))
        num_tokens = draw(st.integers(1, len(tokens) - start))
        chunks.append(make_chunk(tokens, start, num_tokens, 10 * index, logprobs=draw(st.booleans())))
    return sort_decodes_first(chunks)


def assert_equal(a: Step, b: Step) -> None:
    assert (a.epoch, a.number, a.num_decodes) == (b.epoch, b.number, b.num_decodes)
    for name in ARRAYS:
        array_a, array_b = getattr(a, name), getattr(b, name)
        assert array_a.dtype == array_b.dtype == np.int32, name
        assert array_a.shape == array_b.shape, name
        assert (array_a == array_b).all(), name


@settings(max_examples=200, deadline=None)
@given(chunk_lists(), st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_bytes_round_trip(chunks: list[ScheduledChunk], epoch: int, number: int) -> None:
    step = build_step(chunks, BLOCK_SIZE, epoch, number)
    received = Step.from_bytes(step.to_bytes())
    assert_equal(step, received)
    assert received.token_ids.flags.writeable  # as torch requires


@settings(max_examples=200, deadline=None)
@given(chunk_lists(), st.data())
def test_frame_of_wrong_length_is_rejected(chunks: list[ScheduledChunk], data: st.DataObject) -> None:
    frame = build_step(chunks, BLOCK_SIZE, 1, 1).to_bytes()
    length = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(ValueError, match=r".+"):
        Step.from_bytes(frame[:length])
    with pytest.raises(ValueError, match=r".+"):
        Step.from_bytes(frame + bytes(data.draw(st.integers(1, 9))))


NUMBERS = st.lists(st.integers(-3, 5) | st.integers(-(2**31), 2**31 - 1), max_size=20)


@settings(max_examples=300, deadline=None)
@example(np.array([0, 0, 0, 0, 1, 0, -3, 0], dtype=np.int32).tobytes())  # lengths that cancel out
@given(st.binary(max_size=200) | NUMBERS.map(lambda numbers: np.array(numbers, np.int32).tobytes()))
def test_random_bytes_are_rejected_or_a_valid_frame(data: bytes) -> None:
    try:
        step = Step.from_bytes(data)
    except ValueError:
        return
    assert step.to_bytes() == data


def test_arrays_of_a_step() -> None:
    decode = make_chunk([5, 6, 7, 8, 9, 10], 5, 1, first_block=2)
    prompt = make_chunk([1, 2, 3], 0, 3, first_block=7)
    step = build_step([decode, prompt], BLOCK_SIZE, 1, 9)
    assert step.token_ids.tolist() == [10, 1, 2, 3]
    assert step.positions.tolist() == [5, 0, 1, 2]
    assert step.slot_mapping.tolist() == [3 * BLOCK_SIZE + 1, 28, 29, 30]
    assert step.query_start_loc.tolist() == [0, 1, 4]
    assert step.seq_lens.tolist() == [6, 3]
    assert step.block_tables.tolist() == [[2, 3], [7, 0]]
    assert step.logits_indices.tolist() == [0, 3]
    assert (step.num_tokens, step.num_sequences, step.num_decodes) == (4, 2, 1)


def test_seq_len_ends_with_the_chunk() -> None:
    step = build_step([make_chunk(list(range(10)), 2, 3)], BLOCK_SIZE, 1, 1)
    assert (step.seq_lens.tolist(), step.prompt_lens.tolist()) == ([5], [10])


@settings(max_examples=100, deadline=None)
@given(chunk_lists())
def test_decodes_come_first_in_order(chunks: list[ScheduledChunk]) -> None:
    counts = [c.num_tokens for c in chunks]
    num_decodes = build_step(chunks, BLOCK_SIZE, 1, 1).num_decodes
    assert counts[:num_decodes] == [1] * num_decodes
    assert 1 not in counts[num_decodes:]
    assert [id(c) for c in sort_decodes_first(chunks)] == [id(c) for c in chunks]


@pytest.mark.parametrize(
    ("start", "num_tokens", "logprobs", "offsets"),
    [(0, 3, False, []), (3, 3, False, [2]), (0, 6, False, [5]), (0, 3, True, [0, 1, 2]), (3, 3, True, [0, 1, 2])],
)
def test_logits_of_the_last_token_or_of_all(start: int, num_tokens: int, logprobs: bool, offsets: list[int]) -> None:
    assert logits_offsets(make_chunk([1] * 6, start, num_tokens, logprobs=logprobs)).tolist() == offsets
