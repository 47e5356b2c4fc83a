"""What each layer stores in the KV cache, and how one pool of equally large blocks holds it. No torch.

One pool serves all groups of layers, so that memory moves between groups at run time (like vLLM's hybrid KV cache
manager). The pool is one buffer [num_blocks, block_bytes]; a block belongs to one group at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
ALIGNMENT = 64  # bytes; start of each tensor in a block: a cache line, an AVX-512 register
NULL_BLOCK = 0  # is never allocated: pads block tables, and takes the place of freed blocks


@dataclass(frozen=True)
class KVCacheSpec:
    """What one layer stores in the KV cache on one rank. Layers with equal specs form a group.

    tensors: for each tensor (name, shape of its data for one token), such as ("keys", (kv_heads, head_dim)); the data
        is for one sequence instead if `per_sequence`.
    dtype: fp32, bf16 or fp16.
    per_sequence: the layer stores one fixed-size state per sequence instead of one entry per token.
    window: number of newest tokens that the layer needs; 0: all.
    replicated: every TP rank stores the same content (such as the latent vectors of MLA); otherwise each rank stores
        only its own heads.
    """

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: str
    per_sequence: bool = False
    window: int = 0
    replicated: bool = False

    @property
    def num_bytes(self) -> int:
        """Returns the size in bytes of what the layer stores per token, or per sequence."""
        return sum(self.row_bytes)

    @property
    def row_bytes(self) -> list[int]:
        """Returns, for each tensor, the size in bytes of what the layer stores per token, or per sequence."""
        return [prod(shape) * ITEM_BYTES[self.dtype] for _, shape in self.tensors]


@dataclass(frozen=True)
class KVCacheGroup:
    """Layers with equal specs. A block holds `block_size` tokens of all of them.

    block_size: 0 if the spec is per sequence; a block then holds the states of one sequence.
    """

    spec: KVCacheSpec
    layers: tuple[int, ...]
    block_size: int

    def num_blocks(self, num_tokens: int) -> int:
        """Returns the length of the block table of `num_tokens` tokens, blocks outside the window included."""
        return 1 if self.spec.per_sequence else -(-num_tokens // self.block_size)

    def max_resident_blocks(self, num_tokens: int, chunk: int) -> int:
        """Returns the maximum number of blocks that a sequence of `num_tokens` tokens holds at a time, without those
        outside the window, if steps compute up to `chunk` tokens.
        """
        if not self.spec.window:
            return self.num_blocks(num_tokens)
        return min(self.num_blocks(num_tokens), -(-(self.spec.window + chunk - 2) // self.block_size) + 1)

    @property
    def num_bytes(self) -> int:
        """Returns the size in bytes of this group's content of a block; the rest of the block is unused."""
        return len(self.layers) * sum(self._tensor_bytes())

    def tensor_offsets(self) -> Iterator[tuple[int, str, int]]:
        """Yields (layer, tensor name, its offset in the block in bytes), layer by layer."""
        offset = 0
        for layer in self.layers:
            for (name, _), num_bytes in zip(self.spec.tensors, self._tensor_bytes(), strict=True):
                yield layer, name, offset
                offset += num_bytes

    def _tensor_bytes(self) -> list[int]:
        """Returns the aligned bytes of each tensor of one layer in a block."""
        return [-(-n * max(1, self.block_size) // ALIGNMENT) * ALIGNMENT for n in self.spec.row_bytes]


@dataclass(frozen=True)
class KVCacheLayout:
    """The KV cache groups of a model (layers that share a block table), ordered by their first layer, and the size of
    a block in bytes, equal for all groups.
    """

    groups: tuple[KVCacheGroup, ...]
    block_bytes: int

    def num_blocks(self, num_tokens: int, chunk: int) -> int:
        """Returns the maximum number of blocks that a sequence of `num_tokens` tokens holds, in all groups together.

        `chunk`: maximum number of its tokens that a step computes.
        """
        return sum(group.max_resident_blocks(num_tokens, chunk) for group in self.groups)

    @property
    def group_of_layer(self) -> list[int]:
        """Returns, for each layer, the index of its KV cache group."""
        return [index for _, index in sorted((layer, i) for i, g in enumerate(self.groups) for layer in g.layers)]


def make_layout(specs: Sequence[KVCacheSpec], block_size: int) -> KVCacheLayout:
    """Returns the KV cache layout of a model with these specs, one per layer. `block_size`: the smallest size that a
    block may have, in tokens.

    All blocks have the same size in bytes. It is the maximum over all groups (layers with equal specs) of what a group
    needs for `block_size` tokens, or for the state of one sequence if it stores one per sequence. In a group that needs
    less, a block holds the largest multiple of `block_size` tokens that fits. The layout ignores alignment, which
    depends on a rank's number of KV heads, because all ranks must get the same number of tokens per block.
    """
    layers = {spec: tuple(i for i, s in enumerate(specs) if s == spec) for spec in dict.fromkeys(specs)}
    unit_bytes = {s: len(ids) * s.num_bytes * (1 if s.per_sequence else block_size) for s, ids in layers.items()}
    capacity = max(unit_bytes.values())
    groups = tuple(
        KVCacheGroup(s, ids, 0 if s.per_sequence else capacity // unit_bytes[s] * block_size)
        for s, ids in layers.items()
    )
    return KVCacheLayout(groups, max(group.num_bytes for group in groups))
