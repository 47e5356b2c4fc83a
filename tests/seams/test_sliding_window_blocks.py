"""Alternating full and sliding layers: blocks outside the window are freed and counted, and prefixes are still shared.

A simulated rank records in each (block, offset) what was written, and reads all that a token sees.
"""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.contract.kv_cache import KVCacheSpec, make_layout
from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.engine.block_pool import BlockPool
from rtp_llm.engine.kv_cache_manager import KVCacheManager
from rtp_llm.engine.scheduler import Scheduler
from rtp_llm.engine.scheduler_config import SchedulerConfig
from rtp_llm.engine.scheduler_output import ScheduledChunk, SchedulerOutput

BLOCK_SIZE = 4
TENSORS = (("keys", (2, 8)), ("values", (2, 8)))


def make_specs(num_layers: int, window: int) -> list[KVCacheSpec]:
    """Every second layer is a sliding one."""
    return [KVCacheSpec(TENSORS, "bf16", window=window * (layer % 2)) for layer in range(num_layers)]


class Ranks:
    """Scheduler and simulated ranks, with steps in flight."""

    def __init__(self, window: int, blocks: int, tokens: int = 64, depth: int = 0):
        self.groups = make_layout(make_specs(4, window), BLOCK_SIZE).groups
        self.pool = BlockPool(1 + blocks)
        config = SchedulerConfig(tokens, max_num_seqs=8)
        self.scheduler = Scheduler(KVCacheManager(self.pool, self.groups), config)
        self.depth = depth
        self.in_flight: deque[SchedulerOutput] = deque()
        self.slots: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}  # by (block, offset): group, prefix
        self.num_computed = 0

    def run(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)
        while self.scheduler.running or self.scheduler.waiting or self.in_flight:
            self.step()

    def step(self) -> None:
        output = self.scheduler.schedule()
        if output.chunks:
            self.in_flight.append(output)
            self.num_computed += output.num_tokens
        if self.in_flight and (len(self.in_flight) > self.depth or not output.chunks):
            output = self.in_flight.popleft()
            for chunk in output.chunks:
                self.compute(chunk)
            self.scheduler.update(output, [[1] for c in output.chunks if c.num_sampled])

    def compute(self, chunk: ScheduledChunk) -> None:
        request, end = chunk.request, chunk.start + chunk.num_tokens
        for index, (group, table) in enumerate(zip(self.groups, request.block_tables, strict=True)):
            window = group.spec.window or end
            for position in range(max(0, chunk.start - window + 1), end):
                block, offset = table[position // group.block_size], position % group.block_size
                assert block, "a token sees a block that was freed"
                content = (index, tuple(request.tokens[: position + 1]))
                if position >= chunk.start:
                    self.slots[block, offset] = content
                assert self.slots[block, offset] == content


def make_request(name: str, prompt: list[int], max_tokens: int) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens))


@pytest.mark.parametrize("depth", [0, 1])
def test_freed_blocks_are_counted_and_bound_the_memory_of_a_long_sequence(depth: int) -> None:
    """200 tokens are 50 blocks in each group; the sliding group holds two to four of them at a time."""
    ranks = Ranks(window=6, blocks=55, tokens=8, depth=depth)
    ranks.run(make_request("a", list(range(100)), 101))
    assert ranks.scheduler.stats.preemptions == 0
    assert ranks.scheduler.stats.window_freed == (200 - 6 + 1) // BLOCK_SIZE
    assert ranks.pool.num_free == ranks.pool.num_usable


def test_full_layers_free_nothing() -> None:
    ranks = Ranks(window=0, blocks=55)
    ranks.run(make_request("a", list(range(100)), 101))
    assert ranks.scheduler.stats.window_freed == 0


def test_freed_blocks_serve_the_other_group() -> None:
    """Two sequences of 200 tokens run together in 110 blocks, though 200 would hold all of their tokens."""
    ranks = Ranks(window=6, blocks=110, tokens=16)
    ranks.run(make_request("a", [1] * 100, 101), make_request("b", [2] * 100, 101))
    assert ranks.scheduler.stats.preemptions == 0
    assert ranks.num_computed == 400


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(("common", "cached"), [(100, 100), (99, 96), (50, 48), (4, 4), (3, 0)])
def test_prefix_is_shared_though_its_blocks_lay_outside_the_window(common: int, cached: int, depth: int) -> None:
    """Freed blocks stay in the prefix cache until they are allocated again."""
    ranks = Ranks(window=6, blocks=200, tokens=32, depth=depth)
    prompt = list(range(100))
    ranks.run(make_request("a", prompt, 20))
    request = make_request("b", [*prompt[:common], *range(1000, 1020)], 20)
    ranks.run(request)
    assert request.cached_tokens == cached


def test_prefix_hit_references_only_blocks_in_the_window() -> None:
    ranks = Ranks(window=6, blocks=200)
    prompt = list(range(100))
    ranks.run(make_request("a", prompt, 1))
    request = make_request("b", [*prompt, 7], 10)
    ranks.scheduler.add(request)
    output = ranks.scheduler.schedule()
    assert request.block_tables[1][:23] == [0] * 23
    assert 0 not in request.block_tables[1][23:]
    assert ranks.pool.num_used == 26 + 3
    assert {block for group, _, block in output.chunks[0].new_blocks if group == 1} == set(request.block_tables[1][23:])


@settings(max_examples=60, deadline=None)
@given(
    window=st.integers(1, 12),
    depth=st.integers(0, 1),
    tokens=st.integers(3, 40),
    blocks=st.integers(40, 60),
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=1, max_size=8),
)
def test_tokens_see_what_was_computed_from_their_prefix(
    window: int, depth: int, tokens: int, blocks: int, prompts: list[list[int]]
) -> None:
    ranks = Ranks(window, blocks, tokens, depth)
    requests = [make_request(str(index), prompt, 12) for index, prompt in enumerate(prompts)]
    ranks.run(*requests)
    assert all(r.num_output_tokens == 12 for r in requests)
    assert ranks.pool.num_free == ranks.pool.num_usable
