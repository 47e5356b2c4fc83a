"""KV blocks: who holds which, which hold a known prefix, and which may be taken next.

A full block is known by a hash chained over everything before it, so equal hash means equal prefix. Freed blocks keep
their content and go to the end of the free list; the longest unused is taken first. All operations are O(1) per block.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b


def hash_block(parent: bytes, tokens: Sequence[int], salt: bytes = b"") -> bytes:
    """16 bytes that identify `tokens` (one full block) behind the prefix that `parent` identifies (b"" at the
    start).
    """
    return blake2b(parent + array("i", tokens).tobytes(), digest_size=16, salt=salt).digest()


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each, with reference counts and a prefix cache."""

    def __init__(self, num_blocks: int, block_size: int, caching: bool = True):
        self.num_blocks, self.block_size, self.caching = num_blocks, block_size, caching
        self._refs = [0] * num_blocks
        self._hash: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find_cached_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks that hold the longest cached prefix of these hashes. Takes no reference: see `take`."""
        found = []
        for key in hashes if self.caching else ():
            block = self._by_hash.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_unreferenced(self, blocks: Sequence[int]) -> int:
        """How many of these blocks nobody holds: taking them shrinks the free list."""
        return sum(1 for b in blocks if not self._refs[b])

    def acquire(self, blocks: Sequence[int]) -> None:
        """Adds a reference to blocks that `match` found."""
        for block in blocks:
            if not self._refs[block]:
                del self._free[block]
            self._refs[block] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each; what they cached is forgotten. The caller has checked `num_free`."""
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
            self._evict(block)
        return blocks

    def cache_block(self, block: int, key: bytes) -> None:
        """The block is full and computed: it may serve other requests from now on. The first holder of a key stays."""
        if self.caching and key not in self._by_hash:
            self._evict(block)
            self._by_hash[key] = block
            self._hash[block] = key

    def evict(self, blocks: Sequence[int]) -> None:
        """What these blocks hold serves nobody who does not hold them already."""
        for block in blocks:
            self._evict(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Gives up one reference each. The tail goes first to the free list: a prefix's head is worth keeping
        longer.
        """
        for block in reversed(blocks):
            self._refs[block] -= 1
            if not self._refs[block]:
                self._free[block] = None
                if self._hash[block] is None:
                    self._free.move_to_end(block, last=False)

    def _evict(self, block: int) -> None:
        key = self._hash[block]
        if key is not None:
            del self._by_hash[key]
            self._hash[block] = None
