"""EVENTS frames: what is unpacked is what was packed, and a damaged frame is rejected."""

from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.contract.engine_events import EngineStats, pack_events, unpack_events
from rtp_llm.contract.engine_output import EngineOutput, FinishReason

FLOATS = st.floats(allow_nan=False, width=32)
LOGPROBS = st.lists(
    st.tuples(FLOATS, st.integers(0, 9), st.lists(st.tuples(st.integers(0, 9), FLOATS), max_size=2)), max_size=2
)
OUTPUTS = st.builds(
    EngineOutput,
    request_id=st.text(max_size=20),
    tokens=st.lists(st.integers(0, 2**31 - 1), max_size=4),
    logprobs=LOGPROBS,
    prompt_logprobs=LOGPROBS,
    finish=st.sampled_from([None, *get_args(FinishReason)]),
    cached_tokens=st.integers(0, 2**31 - 1),
    queue_ms=st.floats(0, 1e6, width=32),
    hidden_state=st.binary(max_size=40),
    error=st.text(max_size=20),
)
STATS = st.builds(EngineStats, running=st.integers(0, 99), flops=st.integers(0, 2**53), step_seconds=st.floats(0, 9))


def as_lists(value: object) -> object:
    """Returns the value with all sequences replaced by lists."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [as_lists(item) for item in value]
    return value


@settings(max_examples=200, deadline=None)
@given(st.lists(OUTPUTS, max_size=4), STATS)
def test_round_trip(outputs: list[EngineOutput], stats: EngineStats) -> None:
    received, received_stats = unpack_events(pack_events(outputs, stats))
    assert received_stats == stats
    assert isinstance(received_stats.running, int)
    for output, expected in zip(received, outputs, strict=True):
        for name in EngineOutput.__dataclass_fields__:
            assert as_lists(getattr(output, name)) == as_lists(getattr(expected, name)), name


@settings(max_examples=200, deadline=None)
@given(st.lists(OUTPUTS, max_size=3), st.data())
def test_frame_of_wrong_length_is_rejected(outputs: list[EngineOutput], data: st.DataObject) -> None:
    frame = pack_events(outputs, EngineStats())
    length = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(ValueError, match="EVENTS frame"):
        unpack_events(frame[:length])
    with pytest.raises(ValueError, match="EVENTS frame"):
        unpack_events(frame + bytes(data.draw(st.integers(1, 9))))


def test_numbers_take_few_bytes() -> None:
    """An output of one token takes its id and 21 bytes; the tokens of a long prompt's logprobs are rare."""
    outputs = [EngineOutput(f"request-{i:02d}", tokens=[i]) for i in range(64)]
    empty, full = len(pack_events([], EngineStats())), len(pack_events(outputs, EngineStats()))
    assert full - empty == 64 * (len("request-00") + 17 + np.dtype(np.int32).itemsize)
