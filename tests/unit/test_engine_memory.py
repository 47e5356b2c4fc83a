"""The engine knows when it cannot compute any request for want of memory."""

import time

import pytest

from rtp_llm.engine.block_pool import BlockPool
from rtp_llm.engine.engine import Engine
from rtp_llm.engine.memory_budget import MemoryBudget
from rtp_llm.engine.scheduler import STARVING_SECONDS
from tests.unit.scheduling import make_request, make_scheduler
from tests.unit.test_engine_step_seconds import Runner


def test_an_engine_stays_stalled_until_there_is_memory_for_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after the request that it could not compute has ended: otherwise /health would send it the next one."""
    now, free = 100.0, 0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    scheduler = make_scheduler(blocks=8)
    scheduler.kv_cache_manager.pool = BlockPool(9, is_backed=False)
    scheduler.memory_budget = MemoryBudget(lambda: free, reserve_bytes=0, block_bytes=1)
    engine = Engine(scheduler, Runner(), max_seq_len=100, epoch=1)

    engine.step()
    assert not engine.is_stalled, "nobody waits"
    engine.add(make_request("a", 4, 2))
    assert engine.step() == []
    assert engine.is_stalled
    now += STARVING_SECONDS
    (output,) = engine.step()
    assert (output.request_id, output.finish) == ("a", "out_of_memory")
    for _ in range(2):
        engine.step()
        assert engine.is_stalled
        assert not engine.has_work

    free = 8
    engine.step()
    assert not engine.is_stalled
    engine.add(make_request("b", 4, 2))
    while engine.has_work:
        engine.step()
        assert not engine.is_stalled
