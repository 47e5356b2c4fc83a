"""Keys of the prefix cache: a full block is found by a hash of its tokens, its prefix and the request's extra keys (as
in vLLM: a cache salt, or other inputs on which keys and values depend).
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b


def hash_block(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Returns the 16-byte hash of a full block. If two blocks have equal hashes, all tokens up to their ends are equal.

    `parent`: hash of the block before it; for the first block, the result of `hash_extra_keys`.
    """
    return blake2b(parent + array("i", tokens).tobytes(), digest_size=16).digest()


def hash_extra_keys(keys: Sequence[str | bytes]) -> bytes:
    """Returns the 16-byte hash of a request's extra keys (such as a cache salt). It is part of the hash of the first
    block, so that only requests with equal extra keys share cached blocks.
    """
    digest = blake2b(digest_size=16)
    for key in keys:
        data = key.encode() if isinstance(key, str) else key
        digest.update(f"{type(key).__name__} {len(data)} ".encode() + data)
    return digest.digest()
