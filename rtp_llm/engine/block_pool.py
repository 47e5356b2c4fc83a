"""Pool of KV blocks: reference counts, prefix cache and LRU eviction.

A free block keeps its content until it is allocated again. Allocated first are free blocks that are not in the prefix
cache, then blocks that do not occupy memory yet (at most `BlockPool.growth`), then the least recently used block of the
prefix cache. All operations are O(1) per block.
"""

from collections import OrderedDict
from collections.abc import Sequence

from rtp_llm.contract.kv_cache import NULL_BLOCK


class BlockPool:
    """Pool of the KV blocks 1 … `num_blocks` - 1 of the paged KV cache. Block 0 is the null block, which is neither
    allocated nor counted.

    Methods that take blocks skip null blocks. A block is backed (occupies physical memory) from its first allocation
    until it is retired, that is until its memory is returned to the kernel. `growth`: number of unbacked blocks that
    may be allocated; each such allocation lowers it.
    """

    def __init__(self, num_blocks: int, is_backed: bool = True):
        """`num_blocks`: including the null block. `is_backed`: all blocks have memory from the start, as on a GPU."""
        self.growth = num_blocks
        self.num_references = 0  # of all blocks; exceeds `num_used` where requests share blocks
        self._num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hash_of_block: list[bytes | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}
        blocks = [block for block in range(num_blocks) if block != NULL_BLOCK]
        self._free_blocks: OrderedDict[int, None] = OrderedDict.fromkeys(blocks if is_backed else ())
        self._untouched: OrderedDict[int, None] = OrderedDict.fromkeys(() if is_backed else blocks)
        self._retired: list[int] = []
        self._num_populated = 0

    @property
    def num_usable(self) -> int:
        """Returns the number of blocks in use plus the free ones for which the host has memory: blocks take memory at
        first use.
        """
        return self.num_used + self.num_free

    @property
    def num_retired(self) -> int:
        """Returns the current number of blocks whose memory was returned to the kernel (retired)."""
        return len(self._retired)

    @property
    def is_short_of_memory(self) -> bool:
        """Returns whether some blocks cannot be allocated because the host lacks memory for them: more blocks occupy no
        memory yet than `growth` allows to allocate.
        """
        return self.growth < self._num_unbacked

    @property
    def num_free(self) -> int:
        """Returns the number of unreferenced blocks that can be allocated, including cached ones."""
        return len(self._free_blocks) + min(self.growth, self._num_unbacked)

    @property
    def num_used(self) -> int:
        """Returns the number of blocks that running requests use (referenced blocks)."""
        return self._num_blocks - 1 - len(self._free_blocks) - self._num_unbacked

    @property
    def _num_unbacked(self) -> int:
        return len(self._untouched) + len(self._retired)

    def find_cached_block(self, block_hash: bytes) -> int | None:
        """Returns the cached block with this hash, or None. Does not reference it: see `acquire`."""
        return self._block_of_hash.get(block_hash)

    def num_unreferenced(self, blocks: Sequence[int]) -> int:
        """Returns how many of these cached blocks no request references. `num_free` counts these, too: it falls by this
        number if a request acquires the blocks.
        """
        return sum(1 for block in blocks if block != NULL_BLOCK and not self._ref_counts[block])

    def acquire(self, blocks: Sequence[int]) -> None:
        """Adds a reference to each block that `find_cached_block` returned."""
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            if not self._ref_counts[block]:
                del self._free_blocks[block]
            self._ref_counts[block] += 1
            self.num_references += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Removes `num_blocks` (at most `num_free`) blocks from the free list and from the prefix cache.

        Returns the blocks, each with one reference.
        """
        blocks = [self._take_free() for _ in range(num_blocks)]
        for block in blocks:
            self._ref_counts[block] = 1
        self.num_references += num_blocks
        return blocks

    def retire(self, num_blocks: int) -> list[int]:
        """Takes up to `num_blocks` free blocks out of use to save memory (CPU only): first blocks without cached
        tokens, then the least recently used ones.

        Returns the blocks; the ranks must then return their memory to the kernel.
        """
        blocks = [self._free_blocks.popitem(last=False)[0] for _ in range(min(num_blocks, len(self._free_blocks)))]
        self.evict(blocks)
        self._retired += blocks
        return blocks

    def mark_populated(self, num_blocks: int) -> None:
        """Counts the first `num_blocks` blocks as occupying memory even if they were never allocated, because a thread
        has pre-faulted their pages. Excludes retired blocks, whose memory was returned to the kernel.
        """
        for block in range(self._num_populated, num_blocks):
            if block in self._untouched:
                del self._untouched[block]
                self._free_blocks[block] = None
                self._free_blocks.move_to_end(block, last=False)
        self._num_populated = max(self._num_populated, num_blocks)

    def cache_block(self, block: int, block_hash: bytes) -> None:
        """Adds a full, computed block to the prefix cache, unless another block with the same hash is in it."""
        if block_hash not in self._block_of_hash:
            self._evict_block(block)
            self._block_of_hash[block_hash] = block
            self._hash_of_block[block] = block_hash

    def evict(self, blocks: Sequence[int]) -> None:
        """Removes these blocks from the prefix cache. Requests that reference the blocks keep them."""
        for block in blocks:
            self._evict_block(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Removes one reference from each block of a request, last block first.

        So the end of a prefix is evicted before its start, which more requests can reuse.
        """
        for block in reversed(blocks):
            if block == NULL_BLOCK:
                continue
            self._ref_counts[block] -= 1
            self.num_references -= 1
            if not self._ref_counts[block]:
                self._free_blocks[block] = None
                if self._hash_of_block[block] is None:
                    self._free_blocks.move_to_end(block, last=False)

    def _take_free(self) -> int:
        first = next(iter(self._free_blocks), None)
        can_grow = self.growth > 0 and self._num_unbacked > 0
        if first is not None and (self._hash_of_block[first] is None or not can_grow):
            del self._free_blocks[first]
            self._evict_block(first)
            return first
        self.growth -= 1
        return self._retired.pop() if self._retired else self._untouched.popitem(last=False)[0]

    def _evict_block(self, block: int) -> None:
        block_hash = self._hash_of_block[block]
        if block_hash is not None:
            del self._block_of_hash[block_hash]
            self._hash_of_block[block] = None
