"""The block pool: who holds what, what a prefix finds, and which block is taken next."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rtp_llm.engine.blocks import BlockPool, hash_block

SIZE = 4


def keys(*blocks: list[int]) -> list[bytes]:
    """The chained hashes of consecutive full blocks."""
    found: list[bytes] = []
    for tokens in blocks:
        found.append(hash_block(found[-1] if found else b"", tokens))
    return found


def filled(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    """Blocks allocated and published under these hashes."""
    blocks = pool.allocate(len(hashes))
    for block, key in zip(blocks, hashes, strict=True):
        pool.cache_block(block, key)
    return blocks


A, B, C = keys([1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12])


def test_a_hash_says_the_block_and_all_before_it() -> None:
    assert keys([1, 2, 3, 4], [5, 6, 7, 8])[1] == B
    assert keys([1, 2, 3, 5], [5, 6, 7, 8])[1] != B
    assert hash_block(b"", [5, 6, 7, 8]) != B


@given(st.lists(st.integers(0, 2**31 - 1), max_size=8), st.lists(st.integers(0, 2**31 - 1), max_size=8))
def test_hashes_differ_where_tokens_or_salt_differ(one: list[int], other: list[int]) -> None:
    assert (hash_block(b"", one) == hash_block(b"", other)) == (one == other)
    assert hash_block(b"", one) != hash_block(b"", one, b"salt")


def test_an_empty_pool_has_everything_free() -> None:
    pool = BlockPool(8, SIZE)
    assert (pool.num_free, pool.num_used) == (8, 0)
    assert [pool.num_blocks_for(n) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


def test_a_freed_prefix_is_found_again_and_taking_it_shrinks_the_free_list() -> None:
    pool = BlockPool(4, SIZE)
    blocks = filled(pool, [A, B])
    pool.release(blocks)
    assert pool.num_free == 4
    assert pool.find_cached_prefix([A, B, C]) == blocks
    assert pool.num_unreferenced(blocks) == 2
    pool.acquire(blocks)
    assert (pool.num_free, pool.num_unreferenced(blocks)) == (2, 0)


def test_a_match_ends_at_the_first_gap() -> None:
    pool = BlockPool(4, SIZE)
    blocks = filled(pool, [A, B, C])
    assert pool.find_cached_prefix([A, hash_block(A, [0] * SIZE), C]) == blocks[:1]
    assert pool.find_cached_prefix([B, C]) == blocks[1:]
    assert pool.find_cached_prefix([hash_block(b"", [0] * SIZE), A]) == []


def test_a_shared_block_is_free_only_when_nobody_holds_it() -> None:
    pool = BlockPool(2, SIZE)
    blocks = filled(pool, [A])
    pool.acquire(blocks)
    pool.release(blocks)
    assert pool.num_used == 1
    pool.release(blocks)
    assert pool.num_used == 0


def test_the_longest_unused_is_taken_first_and_then_forgotten() -> None:
    pool = BlockPool(3, SIZE)
    old, young = filled(pool, [A]), filled(pool, [hash_block(b"", [7] * SIZE)])
    pool.release(old)
    pool.release(young)
    pool.allocate(1)  # the one that has never held anything
    assert pool.find_cached_prefix([A]) == old
    assert pool.allocate(1) == old
    assert pool.find_cached_prefix([A]) == []


def test_blocks_that_cache_nothing_are_taken_before_those_that_do() -> None:
    pool = BlockPool(2, SIZE)
    cached, plain = filled(pool, [A]), pool.allocate(1)
    pool.release(cached)
    pool.release(plain)
    assert pool.allocate(2) == plain + cached


def test_the_tail_of_a_prefix_goes_before_its_head() -> None:
    pool = BlockPool(3, SIZE)
    blocks = filled(pool, [A, B, C])
    pool.release(blocks)
    pool.allocate(1)
    assert pool.find_cached_prefix([A, B, C]) == blocks[:2]


def test_the_first_holder_of_a_hash_stays() -> None:
    pool = BlockPool(2, SIZE)
    first, second = pool.allocate(2)
    pool.cache_block(first, A)
    pool.cache_block(second, A)
    assert pool.find_cached_prefix([A]) == [first]
    pool.release([first, second])
    assert pool.allocate(1) == [second]
    assert pool.find_cached_prefix([A]) == [first]


def test_what_is_to_be_forgotten_is_found_by_nobody_and_still_held() -> None:
    pool = BlockPool(3, SIZE)
    blocks = filled(pool, [A, B])
    pool.evict(blocks)
    assert pool.find_cached_prefix([A, B]) == []
    assert pool.num_used == 2


def test_without_caching_nothing_is_found() -> None:
    pool = BlockPool(2, SIZE, caching=False)
    pool.release(filled(pool, [A]))
    assert pool.find_cached_prefix([A]) == []


class Pool(RuleBasedStateMachine):
    """Holders come and go at random; the pool must agree with plain counting."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, SIZE)
        self.holders: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        if count > self.pool.num_free:
            return
        held = {block for holder in self.holders for block in holder}
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert held.isdisjoint(blocks)
        for block in blocks:
            self.content.pop(block, None)
        self.holders.append(blocks)

    @rule(data=st.data(), key=st.integers(0, 6).map(lambda n: hash_block(b"", [n])))
    def publish(self, data: st.DataObject, key: bytes) -> None:
        blocks = [block for holder in self.holders for block in holder]
        if blocks:
            block = data.draw(st.sampled_from(blocks))
            if key not in self.content.values():
                self.content[block] = key
            self.pool.cache_block(block, key)

    @rule(key=st.integers(0, 6).map(lambda n: hash_block(b"", [n])))
    def take(self, key: bytes) -> None:
        found = self.pool.find_cached_prefix([key])
        assert [self.content.get(block) for block in found] == ([key] if key in self.content.values() else [])
        self.pool.acquire(found)
        self.holders.append(found)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.holders:
            self.pool.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "pool"):
            counts = Counter(block for holder in self.holders for block in holder)
            assert self.pool.num_used == len(counts)
            idle = [b for b in range(self.pool.num_blocks) if b not in counts]
            assert self.pool.num_unreferenced(range(self.pool.num_blocks)) == len(idle) == self.pool.num_free


TestPool = pytest.mark.timeout(120)(Pool.TestCase)
TestPool.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
