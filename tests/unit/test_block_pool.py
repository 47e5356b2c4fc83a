"""The KV block pool: references, prefix cache and eviction order."""

from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rtp_llm.contract.kv_cache import NULL_BLOCK
from rtp_llm.engine.block_hash import hash_block, hash_extra_keys
from rtp_llm.engine.block_pool import BlockPool

BLOCK_SIZE = 4


def hash_blocks(*blocks: list[int]) -> list[bytes]:
    """Returns the chained hashes of consecutive full blocks."""
    hashes: list[bytes] = []
    for tokens in blocks:
        hashes.append(hash_block(hashes[-1] if hashes else b"", tokens))
    return hashes


def allocate_cached(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    """Allocates a block per hash and adds it to the prefix cache."""
    blocks = pool.allocate(len(hashes))
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.cache_block(block, block_hash)
    return blocks


def find_cached_prefix(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    """Returns the cached blocks up to the first hash that is not cached."""
    blocks: list[int] = []
    for block_hash in hashes:
        if (block := pool.find_cached_block(block_hash)) is None:
            break
        blocks.append(block)
    return blocks


A, B, C = hash_blocks([1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12])


def test_hash_depends_on_the_block_and_its_prefix() -> None:
    assert hash_blocks([1, 2, 3, 4], [5, 6, 7, 8])[1] == B
    assert hash_blocks([1, 2, 3, 5], [5, 6, 7, 8])[1] != B
    assert hash_block(b"", [5, 6, 7, 8]) != B


@given(st.lists(st.integers(0, 2**31 - 1), max_size=8), st.lists(st.integers(0, 2**31 - 1), max_size=8))
def test_hashes_differ_if_tokens_differ(a: list[int], b: list[int]) -> None:
    assert (hash_block(b"", a) == hash_block(b"", b)) == (a == b)


KEYS = st.lists(st.text(max_size=3) | st.binary(max_size=3) | st.just("long" * 100), max_size=3)


@given(KEYS, KEYS)
@example(["ab", "c"], ["a", "bc"])
@example([b"a"], ["a"])
@example(["long" * 100], ["long" * 101])
@example([], [""])
@example(["a"], ["a", "str 1 a"])
def test_extra_keys_separate_equal_tokens(a: list[str | bytes], b: list[str | bytes]) -> None:
    hashes = [hash_block(hash_extra_keys(keys), [1, 2, 3]) for keys in (a, b)]
    assert (hashes[0] == hashes[1]) == (a == b)


def test_all_blocks_of_a_new_pool_are_free() -> None:
    pool = BlockPool(9)
    assert (pool.num_free, pool.num_used, pool.num_usable) == (8, 0, 8)


def test_null_block_is_neither_allocated_nor_counted() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    assert sorted(blocks) == [1, 2]
    pool.acquire([NULL_BLOCK])
    assert pool.num_unreferenced([NULL_BLOCK]) == 0
    pool.release([NULL_BLOCK, *blocks])
    assert sorted(pool.allocate(2)) == [1, 2]


def test_retired_blocks_are_free_ones_and_come_back_with_growth() -> None:
    pool = BlockPool(5)
    pool.growth = 0
    blocks = allocate_cached(pool, [A, B])
    cached, held = blocks[:1], blocks[1:]
    pool.release(cached)
    retired = pool.retire(10)
    assert set(retired) == {1, 2, 3, 4} - set(held)
    assert (pool.num_retired, pool.num_usable, pool.num_free, pool.num_used) == (3, 1, 0, 1)
    assert find_cached_prefix(pool, [A, B]) == []
    pool.release(held)
    assert pool.allocate(1) == held
    pool.growth = 2
    assert (pool.num_free, pool.num_usable, pool.is_short_of_memory) == (2, 3, True)
    assert set(pool.allocate(2)) < set(retired)
    assert (pool.num_free, pool.num_retired, pool.growth) == (0, 1, 0)


def test_blocks_without_memory_are_taken_as_far_as_growth_allows_before_cached_ones() -> None:
    pool = BlockPool(6, is_backed=False)
    cached = allocate_cached(pool, [A])
    pool.release(cached)
    pool.growth = 2
    assert pool.num_free == 3
    assert pool.allocate(2) == [2, 3]
    assert pool.allocate(1) == cached
    assert (pool.num_free, pool.num_usable, pool.num_used) == (0, 3, 3)


def test_populated_blocks_need_no_growth() -> None:
    pool = BlockPool(6, is_backed=False)
    pool.allocate(1)
    pool.growth = 0
    pool.mark_populated(4)
    assert (pool.num_free, pool.num_usable) == (2, 3)
    retired = pool.retire(1)
    pool.mark_populated(6)
    assert pool.num_free == 3, "a retired block is not populated"
    assert not set(retired) & set(pool.allocate(3))


def test_blocks_outside_the_cache_are_retired_first() -> None:
    pool = BlockPool(4)
    cached = allocate_cached(pool, [A])
    pool.release(cached)
    assert set(pool.retire(2)) == {1, 2, 3} - set(cached)
    assert find_cached_prefix(pool, [A]) == cached


def test_released_prefix_is_found_and_acquiring_it_shrinks_the_free_list() -> None:
    pool = BlockPool(5)
    blocks = allocate_cached(pool, [A, B])
    pool.release(blocks)
    assert pool.num_free == 4
    assert find_cached_prefix(pool, [A, B, C]) == blocks
    assert pool.num_unreferenced(blocks) == 2
    pool.acquire(blocks)
    assert (pool.num_free, pool.num_unreferenced(blocks)) == (2, 0)


def test_cached_prefix_ends_at_the_first_missing_block() -> None:
    pool = BlockPool(5)
    blocks = allocate_cached(pool, [A, B, C])
    assert find_cached_prefix(pool, [A, hash_block(A, [0] * BLOCK_SIZE), C]) == blocks[:1]
    assert find_cached_prefix(pool, [B, C]) == blocks[1:]
    assert find_cached_prefix(pool, [hash_block(b"", [0] * BLOCK_SIZE), A]) == []


def test_shared_block_is_free_after_the_last_release() -> None:
    pool = BlockPool(3)
    blocks = allocate_cached(pool, [A])
    pool.acquire(blocks)
    pool.release(blocks)
    assert pool.num_used == 1
    pool.release(blocks)
    assert pool.num_used == 0


def test_least_recently_used_block_is_evicted_first() -> None:
    pool = BlockPool(4)
    old, new = allocate_cached(pool, [A]), allocate_cached(pool, [hash_block(b"", [7] * BLOCK_SIZE)])
    pool.release(old)
    pool.release(new)
    pool.allocate(1)  # the block that was never used
    assert find_cached_prefix(pool, [A]) == old
    assert pool.allocate(1) == old
    assert find_cached_prefix(pool, [A]) == []


def test_uncached_blocks_are_allocated_before_cached_ones() -> None:
    pool = BlockPool(3)
    cached, uncached = allocate_cached(pool, [A]), pool.allocate(1)
    pool.release(cached)
    pool.release(uncached)
    assert pool.allocate(2) == uncached + cached


def test_tail_of_a_prefix_is_evicted_before_its_head() -> None:
    pool = BlockPool(4)
    blocks = allocate_cached(pool, [A, B, C])
    pool.release(blocks)
    pool.allocate(1)
    assert find_cached_prefix(pool, [A, B, C]) == blocks[:2]


def test_first_block_of_a_hash_stays_cached() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    pool.cache_block(first, A)
    pool.cache_block(second, A)
    assert find_cached_prefix(pool, [A]) == [first]
    pool.release([first, second])
    assert pool.allocate(1) == [second]
    assert find_cached_prefix(pool, [A]) == [first]


def test_evicted_blocks_are_not_found_but_keep_their_references() -> None:
    pool = BlockPool(4)
    blocks = allocate_cached(pool, [A, B])
    pool.evict(blocks)
    assert find_cached_prefix(pool, [A, B]) == []
    assert pool.num_used == 2


class BlockPoolMachine(RuleBasedStateMachine):
    """Random allocations and releases; the pool must agree with a reference count of each block."""

    @initialize(num_blocks=st.integers(2, 13))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.holders: list[list[int]] = []
        self.hashes: dict[int, bytes] = {}

    @rule(num_blocks=st.integers(0, 5))
    def allocate(self, num_blocks: int) -> None:
        if num_blocks > self.pool.num_free:
            return
        held = {block for holder in self.holders for block in holder}
        blocks = self.pool.allocate(num_blocks)
        assert len(set(blocks)) == num_blocks
        assert held.isdisjoint(blocks)
        for block in blocks:
            self.hashes.pop(block, None)
        self.holders.append(blocks)

    @rule(data=st.data(), block_hash=st.integers(0, 6).map(lambda n: hash_block(b"", [n])))
    def cache_block(self, data: st.DataObject, block_hash: bytes) -> None:
        blocks = [block for holder in self.holders for block in holder]
        if blocks:
            block = data.draw(st.sampled_from(blocks))
            if block_hash not in self.hashes.values():
                self.hashes[block] = block_hash
            self.pool.cache_block(block, block_hash)

    @rule(block_hash=st.integers(0, 6).map(lambda n: hash_block(b"", [n])))
    def acquire(self, block_hash: bytes) -> None:
        blocks = find_cached_prefix(self.pool, [block_hash])
        assert [self.hashes.get(block) for block in blocks] == (
            [block_hash] if block_hash in self.hashes.values() else []
        )
        self.pool.acquire(blocks)
        self.holders.append(blocks)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.holders:
            self.pool.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @invariant()
    def no_block_is_leaked(self) -> None:
        if hasattr(self, "pool"):
            counts = Counter(block for holder in self.holders for block in holder)
            assert self.pool.num_used == len(counts)
            assert self.pool.num_references == counts.total()
            blocks = range(1, 1 + self.pool.num_usable)
            free = [b for b in blocks if b not in counts]
            assert self.pool.num_unreferenced(blocks) == len(free) == self.pool.num_free


TestBlockPool = pytest.mark.timeout(120)(BlockPoolMachine.TestCase)
TestBlockPool.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
