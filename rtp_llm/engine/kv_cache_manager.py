"""The KV blocks of requests: one block table per KV cache group, all of them from one pool."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

import numpy as np
from numpy.typing import NDArray

from rtp_llm.contract.kv_cache import NULL_BLOCK, KVCacheGroup
from rtp_llm.contract.request import Request
from rtp_llm.engine.block_hash import hash_block, hash_extra_keys
from rtp_llm.engine.block_pool import BlockPool

NewBlocks = list[tuple[int, int, int]]  # (group, index in the block table, block id)


@dataclass(frozen=True)
class CachedPrefix:
    """A cached prefix of a request: its first `num_tokens` tokens.

    `blocks`: by KV cache group, the blocks of these tokens; null blocks outside the group's window.
    """

    num_tokens: int
    blocks: list[list[int]]


class KVCacheManager:
    """Allocates, shares, caches and frees the KV blocks of requests (each one sequence).

    A block of a group holds the group's `block_size` tokens of all its layers, or the state of one sequence. A prefix
    is shared only if every group has it in the prefix cache. Models with a per-sequence state share no prefixes, since
    every token overwrites that state.
    """

    def __init__(self, pool: BlockPool, groups: Sequence[KVCacheGroup], enable_caching: bool = True):
        """`enable_caching`: use the prefix cache."""
        self.pool, self.groups = pool, groups
        self.enable_caching = enable_caching and not any(group.spec.per_sequence for group in groups)
        self._prefix_alignment = lcm(*(group.block_size for group in groups if group.block_size))

    def num_blocks_for(self, num_tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns how many KV blocks sequences hold at the end of a step: for each given number of tokens, the number
        of blocks.
        """
        total = np.zeros_like(num_tokens)
        for group in self.groups:
            if group.spec.per_sequence:
                total += 1
                continue
            num_blocks = -(-num_tokens // group.block_size)
            if group.spec.window:  # which touches one block more than it fills, unless it starts with a block
                num_blocks = np.minimum(num_blocks, -(-(group.spec.window - 1) // group.block_size) + 1)
            total += num_blocks
        return total

    def find_cached_prefix(self, request: Request) -> CachedPrefix:
        """Returns the longest prefix that every group has cached. Does not reference its blocks: see `start_request`.

        It never includes the last token, which must be computed for its logits.
        """
        if not self.enable_caching or request.skip_prefix_cache or request.wants_prompt_logprobs:
            return CachedPrefix(0, [[] for _ in self.groups])
        num_tokens, longest = self._align(request.num_tokens - 1), -1
        while num_tokens != longest:  # a prefix that one group shortens may lie in no window of a group before it
            longest = num_tokens
            for index in range(len(self.groups)):
                num_tokens = self._find_hit(request, index, num_tokens)
        return CachedPrefix(num_tokens, [self._cached_blocks(request, i, num_tokens) for i in range(len(self.groups))])

    def num_referenced(self, prefix: CachedPrefix) -> int:
        """Returns how many blocks of a cached prefix other requests reference."""
        blocks = [block for blocks in prefix.blocks for block in blocks if block != NULL_BLOCK]
        return len(blocks) - self.pool.num_unreferenced(blocks)

    def start_request(self, request: Request, prefix: CachedPrefix, num_tokens: int) -> NewBlocks | None:
        """Gives a request, which enters the batch, the blocks of a cached prefix, and new blocks for `num_tokens` more
        tokens.

        Returns all of its blocks except null blocks, or None if too few are free.
        """
        num_missing = sum(
            group.num_blocks(prefix.num_tokens + num_tokens) - len(blocks)
            for group, blocks in zip(self.groups, prefix.blocks, strict=True)
        )
        if num_missing + sum(self.pool.num_unreferenced(blocks) for blocks in prefix.blocks) > self.pool.num_free:
            return None
        for blocks in prefix.blocks:
            self.pool.acquire(blocks)
        request.block_tables = prefix.blocks
        request.num_computed_tokens = prefix.num_tokens
        cached = [
            (group, index, block)
            for group, blocks in enumerate(prefix.blocks)
            for index, block in enumerate(blocks)
            if block != NULL_BLOCK
        ]
        return cached + (self.allocate_slots(request, num_tokens) or [])

    def allocate_slots(self, request: Request, num_tokens: int) -> NewBlocks | None:
        """Allocates the blocks that a request lacks for `num_tokens` tokens after its computed ones. Returns the new
        blocks, or None if too few are free.

        Blocks that rejected draft tokens left empty in the request's block tables are used first.
        """
        end = request.num_computed_tokens + num_tokens
        counts = [
            max(0, group.num_blocks(end) - len(table))
            for group, table in zip(self.groups, request.block_tables, strict=True)
        ]
        if sum(counts) > self.pool.num_free:
            return None
        new_blocks: NewBlocks = []
        for group, (table, count) in enumerate(zip(request.block_tables, counts, strict=True)):
            if count:
                blocks = self.pool.allocate(count)
                new_blocks += [(group, index, block) for index, block in enumerate(blocks, len(table))]
                table += blocks
        return new_blocks

    def cache_full_blocks(self, request: Request, start: int, end: int) -> None:
        """Adds the blocks that the computed tokens [start, end) have filled to the prefix cache."""
        if not self.enable_caching:
            return
        for index, (group, table) in enumerate(zip(self.groups, request.block_tables, strict=True)):
            first, last = start // group.block_size, end // group.block_size
            hashes = _hash_full_blocks(request, group.block_size, last) if first < last else []
            for block, block_hash in zip(table[first:last], hashes[first:last], strict=True):
                if block != NULL_BLOCK:
                    self.pool.cache_block(block, _cache_key(block_hash, index))

    def free_outside_windows(self, request: Request, num_tokens: int) -> int:
        """Frees the blocks that no token from position `num_tokens` on attends to, because its window begins after
        them. Returns the number of blocks.
        """
        num_freed = 0
        for group, table in zip(self.groups, request.block_tables, strict=True):
            end = index = _first_block_in_window(group, num_tokens)
            while index and table[index - 1] != NULL_BLOCK:
                index -= 1
            self.pool.release(table[index:end])
            table[index:end] = [NULL_BLOCK] * (end - index)
            num_freed += end - index
        return num_freed

    def evict(self, request: Request) -> None:
        """Removes the blocks of a request from the prefix cache, because their content is invalid."""
        for table in request.block_tables:
            self.pool.evict(table)

    def release(self, request: Request) -> None:
        """Frees the blocks of a request."""
        for table in request.block_tables:
            self.pool.release(table)
        request.block_tables = []

    def _align(self, num_tokens: int) -> int:
        """Returns the largest number of tokens, at most `num_tokens`, that ends a block of every group."""
        return num_tokens - num_tokens % self._prefix_alignment

    def _find_hit(self, request: Request, index: int, max_tokens: int) -> int:
        """Returns the length of the longest prefix, at most `max_tokens`, whose blocks in the window are cached.

        `index`: index of the group.
        """
        group = self.groups[index]
        end = block = max_tokens // group.block_size
        hashes = _hash_full_blocks(request, group.block_size, end)
        while block > _first_block_in_window(group, end * group.block_size):
            block -= 1
            if self.pool.find_cached_block(_cache_key(hashes[block], index)) is None:
                end = block = self._align(block * group.block_size) // group.block_size
        return end * group.block_size

    def _cached_blocks(self, request: Request, index: int, num_tokens: int) -> list[int]:
        """Returns a group's cached blocks of the first `num_tokens` tokens; null blocks outside the group's window."""
        group = self.groups[index]
        first, end = _first_block_in_window(group, num_tokens), num_tokens // group.block_size
        hashes = _hash_full_blocks(request, group.block_size, end)[first:end]
        blocks = (self.pool.find_cached_block(_cache_key(block_hash, index)) for block_hash in hashes)
        return [NULL_BLOCK] * min(first, end) + [block for block in blocks if block is not None]


def _first_block_in_window(group: KVCacheGroup, position: int) -> int:
    """Returns the index of the first block that a token at this position sees."""
    return max(0, position - group.spec.window + 1) // group.block_size if group.spec.window else 0


def _hash_full_blocks(request: Request, block_size: int, num_blocks: int) -> list[bytes]:
    """Returns the hashes of at least the first `num_blocks` blocks of a request. Each is computed once."""
    hashes = request.block_hashes.setdefault(block_size, [])
    while len(hashes) < num_blocks:
        start = len(hashes) * block_size
        parent = hashes[-1] if hashes else hash_extra_keys(request.extra_keys)
        hashes.append(hash_block(parent, request.tokens[start : start + block_size]))
    return hashes


def _cache_key(block_hash: bytes, group: int) -> bytes:
    """Returns the prefix-cache key of a block: groups keep different content for equal tokens."""
    return block_hash + bytes((group,))
