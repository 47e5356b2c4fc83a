"""KV block pool: reference counts, prefix cache and LRU eviction.

The cache finds a full block by the hash of its tokens and all tokens before them, so equal hashes mean equal prefixes.
A free block keeps its content until it is allocated again: first the blocks that are not in the cache, then the least
recently used. All operations are O(1) per block.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b


def hash_block(parent: bytes, tokens: Sequence[int], salt: bytes = b"") -> bytes:
    """Returns the 16-byte hash of a full block.

    `parent`: hash of the block before it, b"" for the first. `salt`: at most 16 bytes; blocks with different salts have
    different hashes even if their tokens are equal.
    """
    return blake2b(parent + array("i", tokens).tobytes(), digest_size=16, salt=salt).digest()


class BlockPool:
    """Pool of `num_blocks` KV blocks of `block_size` tokens each. `enable_caching`: use the prefix cache."""

    def __init__(self, num_blocks: int, block_size: int, enable_caching: bool = True):
        self.num_blocks, self.block_size, self.enable_caching = num_blocks, block_size, enable_caching
        self._ref_counts = [0] * num_blocks
        self._hash_of_block: list[bytes | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}
        self._free_blocks: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Returns the number of blocks without references, cached ones included."""
        return len(self._free_blocks)

    @property
    def num_used(self) -> int:
        """Returns the number of referenced blocks."""
        return self.num_blocks - len(self._free_blocks)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Returns the number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def find_cached_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """Returns the blocks of the longest cached prefix: one per hash, up to the first hash that is not cached.

        `hashes`: of a request's full blocks, in order. `acquire` must then reference the returned blocks.
        """
        blocks = []
        for block_hash in hashes if self.enable_caching else ():
            block = self._block_of_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_unreferenced(self, blocks: Sequence[int]) -> int:
        """Returns how many of these cached blocks no request references; `num_free` still includes them."""
        return sum(1 for block in blocks if not self._ref_counts[block])

    def acquire(self, blocks: Sequence[int]) -> None:
        """Adds a reference to each block that `find_cached_prefix` returned."""
        for block in blocks:
            if not self._ref_counts[block]:
                del self._free_blocks[block]
            self._ref_counts[block] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Removes `num_blocks` (at most `num_free`) blocks from the free list and from the prefix cache.

        Returns them with one reference each.
        """
        blocks = [self._free_blocks.popitem(last=False)[0] for _ in range(num_blocks)]
        for block in blocks:
            self._ref_counts[block] = 1
            self._evict_block(block)
        return blocks

    def cache_block(self, block: int, block_hash: bytes) -> None:
        """Adds a full, computed block to the prefix cache, unless another block with the same hash is in it."""
        if self.enable_caching and block_hash not in self._block_of_hash:
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
            self._ref_counts[block] -= 1
            if not self._ref_counts[block]:
                self._free_blocks[block] = None
                if self._hash_of_block[block] is None:
                    self._free_blocks.move_to_end(block, last=False)

    def _evict_block(self, block: int) -> None:
        block_hash = self._hash_of_block[block]
        if block_hash is not None:
            del self._block_of_hash[block_hash]
            self._hash_of_block[block] = None
