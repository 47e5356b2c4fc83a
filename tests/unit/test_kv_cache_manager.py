"""Block tables and prefix hits of several KV cache groups on one pool."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.contract.request import Request
from rtp_llm.engine.block_pool import BlockPool
from rtp_llm.engine.kv_cache_manager import KVCacheManager
from tests.unit.scheduling import make_group, make_request


def make_manager(*groups: tuple[int, int], blocks: int = 64, enable_caching: bool = True) -> KVCacheManager:
    """`groups`: (block size, window) of each."""
    return KVCacheManager(BlockPool(1 + blocks), [make_group(*group) for group in groups], enable_caching)


def compute(manager: KVCacheManager, request: Request, num_tokens: int) -> None:
    """Computes the next tokens of a request, as a step does."""
    start, end = request.num_computed_tokens, request.num_computed_tokens + num_tokens
    if request.block_tables:
        assert manager.allocate_slots(request, num_tokens) is not None
    else:
        prefix = manager.find_cached_prefix(request)
        start, end = prefix.num_tokens, prefix.num_tokens + num_tokens
        assert manager.start_request(request, prefix, num_tokens) is not None
    request.num_computed_tokens = end
    manager.cache_full_blocks(request, start, end)
    manager.free_outside_windows(request, end)


def cached_tokens(manager: KVCacheManager, tokens: list[int]) -> int:
    return manager.find_cached_prefix(make_request("again", tokens)).num_tokens


TOKENS = list(range(100))


def test_each_group_has_its_block_size() -> None:
    manager = make_manager((4, 0), (12, 0))
    request = make_request("a", TOKENS)
    compute(manager, request, 13)
    assert [len(table) for table in request.block_tables] == [4, 2]
    assert len({block for table in request.block_tables for block in table} - {0}) == 6
    assert manager.allocate_slots(request, 3) == []
    new_blocks = manager.allocate_slots(request, 12)
    assert new_blocks is not None
    assert [(group, index) for group, index, _ in new_blocks] == [(0, 4), (0, 5), (0, 6), (1, 2)]


def test_fixed_state_takes_one_block_and_prevents_prefix_hits() -> None:
    manager = KVCacheManager(BlockPool(20), [make_group(4), make_group(per_sequence=True)])
    request = make_request("a", TOKENS)
    compute(manager, request, 4)
    compute(manager, request, 13)
    assert [len(table) for table in request.block_tables] == [5, 1]
    assert manager.num_blocks_for(np.array([17])).tolist() == [6]
    assert cached_tokens(manager, TOKENS) == 0


def test_nothing_is_allocated_if_blocks_do_not_suffice() -> None:
    manager = make_manager((4, 0), (4, 0), blocks=5)
    request = make_request("a", TOKENS)
    compute(manager, request, 8)
    tables = [list(table) for table in request.block_tables]
    assert manager.allocate_slots(request, 1) is None
    assert (request.block_tables, manager.pool.num_free) == (tables, 1)
    other = make_request("b", TOKENS)
    assert manager.start_request(other, manager.find_cached_prefix(other), 1) is None
    assert (other.block_tables, manager.pool.num_free) == ([], 1)


def test_prefix_hit_is_the_longest_that_every_group_can_serve() -> None:
    manager = make_manager((4, 0), (12, 0))
    compute(manager, make_request("a", TOKENS), 35)
    assert cached_tokens(manager, TOKENS) == 24  # 32 in the first group, 24 in the second


def test_groups_with_equal_block_sizes_have_their_own_blocks() -> None:
    manager = make_manager((4, 0), (4, 0))
    request = make_request("a", TOKENS)
    compute(manager, request, 8)
    assert manager.find_cached_prefix(make_request("b", TOKENS)).blocks == request.block_tables
    assert request.block_tables[0] != request.block_tables[1]


def test_disabled_cache_finds_nothing() -> None:
    manager = make_manager((4, 0), enable_caching=False)
    compute(manager, make_request("a", TOKENS), 40)
    assert cached_tokens(manager, TOKENS) == 0


@pytest.mark.parametrize(("window", "first_kept"), [(1, 5), (4, 4), (5, 4), (6, 3), (9, 3), (100, 0)])
def test_blocks_outside_the_window_are_freed(window: int, first_kept: int) -> None:
    """Position 20 sees positions 21 - window … 20, so block (21 - window) // 4 is the first that is kept."""
    manager = make_manager((4, 0), (4, window))
    request = make_request("a", TOKENS)
    compute(manager, request, 20)
    full, sliding = request.block_tables
    assert (len(full), len(sliding)) == (5, 5)
    assert 0 not in full
    assert [index for index, block in enumerate(sliding) if not block] == list(range(first_kept))
    assert manager.pool.num_used == 10 - first_kept
    manager.release(request)
    assert manager.pool.num_used == 0


def test_window_group_needs_only_the_blocks_in_its_window() -> None:
    manager = make_manager((4, 0), (4, 6))
    request = make_request("a", TOKENS[:21])
    compute(manager, request, 20)
    manager.release(request)
    prefix = manager.find_cached_prefix(make_request("b", TOKENS))
    assert prefix.num_tokens == 20
    assert prefix.blocks[1][:3] == [0, 0, 0]
    assert 0 not in prefix.blocks[1][3:]
    sliding = prefix.blocks[1]
    manager.pool.evict([sliding[4]])  # positions 16 … 19; a hit of 16 tokens sees positions 11 … 15
    prefix = manager.find_cached_prefix(make_request("b", TOKENS))
    assert prefix.num_tokens == 16
    assert [bool(block) for block in prefix.blocks[1]] == [False, False, True, True]


@settings(max_examples=300, deadline=None)
@given(
    windows=st.lists(st.sampled_from([0, 1, 3, 4, 5, 8, 13]), min_size=1, max_size=3),
    sizes=st.lists(st.sampled_from([2, 4, 6]), min_size=3, max_size=3),
    cached=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 29))),
    length=st.integers(1, 60),
)
def test_prefix_hit_agrees_with_trying_every_length(
    windows: list[int], sizes: list[int], cached: set[tuple[int, int]], length: int
) -> None:
    """`cached`: (group, index) of the blocks that are evicted from the cache again."""
    manager = make_manager(*zip(sizes, windows, strict=False), blocks=200)
    request = make_request("a", TOKENS[:60])
    prefix = manager.find_cached_prefix(request)
    assert manager.start_request(request, prefix, 60) is not None
    manager.cache_full_blocks(request, 0, 60)
    tables = request.block_tables
    evicted = {(group, index) for group, index in cached if group < len(tables) and index < len(tables[group])}
    manager.pool.evict([tables[group][index] for group, index in evicted])

    def needed(group: int, num_tokens: int) -> set[int]:
        """Returns the blocks with positions that the token after `num_tokens` tokens sees."""
        window = windows[group] or 1000
        return {p // sizes[group] for p in range(num_tokens) if p > num_tokens - window}

    expected = max(
        n
        for n in range(length)
        if all(n % sizes[g] == 0 and not any((g, i) in evicted for i in needed(g, n)) for g in range(len(windows)))
    )
    prefix = manager.find_cached_prefix(make_request("b", TOKENS[:length]))
    assert prefix.num_tokens == expected
    for group, blocks in enumerate(prefix.blocks):
        assert blocks == [
            tables[group][i] if i in needed(group, expected) else 0 for i in range(expected // sizes[group])
        ]


def test_blocks_of_rejected_drafts_are_used_next() -> None:
    manager = make_manager((4, 0))
    request = make_request("a", TOKENS)
    compute(manager, request, 8)
    new_blocks = manager.allocate_slots(request, 8)
    assert new_blocks is not None
    assert len(new_blocks) == 2
    assert manager.allocate_slots(request, 5) == []
    assert manager.allocate_slots(request, 9) == [(0, 4, request.block_tables[0][4])]
