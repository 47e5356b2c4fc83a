"""Pool of KV blocks: reference counts, prefix cache and LRU eviction.

A free block keeps its content until it is allocated again: first the blocks that are not in the prefix cache, then the
least recently used. All operations are O(1) per block.
"""

from collections import OrderedDict
from collections.abc import Sequence

from rtp_llm.contract.kv_cache import NULL_BLOCK


class BlockPool:
    """Pool of the KV blocks 1 … `num_blocks` - 1. Block 0 is the null block, which is neither allocated nor counted.

    Methods that take blocks skip null blocks. A retired block's memory has been given back: it is never used again.
    """

    def __init__(self, num_blocks: int):
        """`num_blocks`: including the null block."""
        self.num_retired = 0
        self.num_references = 0  # of all blocks; exceeds `num_used` where requests share blocks
        self._num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hash_of_block: list[bytes | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}
        self._free_blocks: OrderedDict[int, None] = OrderedDict.fromkeys(
            block for block in range(num_blocks) if block != NULL_BLOCK
        )

    @property
    def num_usable(self) -> int:
        """Returns the number of blocks that requests can have together."""
        return self._num_blocks - 1 - self.num_retired

    @property
    def num_free(self) -> int:
        """Returns the number of blocks without references, cached ones included."""
        return len(self._free_blocks)

    @property
    def num_used(self) -> int:
        """Returns the number of referenced blocks."""
        return self.num_usable - len(self._free_blocks)

    def find_cached_block(self, block_hash: bytes) -> int | None:
        """Returns the cached block with this hash, or None. Does not reference it: see `acquire`."""
        return self._block_of_hash.get(block_hash)

    def num_unreferenced(self, blocks: Sequence[int]) -> int:
        """Returns how many of these cached blocks no request references; `num_free` still includes them."""
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

        Returns them with one reference each.
        """
        blocks = self._take_free(num_blocks)
        for block in blocks:
            self._ref_counts[block] = 1
        self.num_references += num_blocks
        return blocks

    def retire(self, num_blocks: int) -> list[int]:
        """Removes up to `num_blocks` free blocks from the pool for good. Returns them."""
        blocks = self._take_free(min(num_blocks, self.num_free))
        self.num_retired += len(blocks)
        return blocks

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

        The end of a prefix is thus evicted before its beginning, which more requests can reuse.
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

    def _take_free(self, num_blocks: int) -> list[int]:
        blocks = [self._free_blocks.popitem(last=False)[0] for _ in range(num_blocks)]
        self.evict(blocks)
        return blocks

    def _evict_block(self, block: int) -> None:
        block_hash = self._hash_of_block[block]
        if block_hash is not None:
            del self._block_of_hash[block_hash]
            self._hash_of_block[block] = None
