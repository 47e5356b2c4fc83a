"""How one rank's share of a model is cut: which heads, which MLP columns, which vocabulary rows. Plain Python.

Any TP size up to the number of query heads works. Where KV heads are fewer than ranks they are replicated; where query
heads do not divide, some ranks compute a head of zeros less or more.
"""

from dataclasses import dataclass
from math import gcd


@dataclass(frozen=True)
class HeadShard:
    """One rank's heads: `groups[i]` are the query heads that attend with KV head `kv_heads[i]`.

    All groups are padded to `group_size`, so that local query head j uses local KV head j // group_size.
    """

    kv_heads: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def group_size(self) -> int:
        return max(len(g) for g in self.groups)

    @property
    def num_heads(self) -> int:
        """Local query heads, padding included."""
        return len(self.groups) * self.group_size

    def slots(self) -> list[tuple[int, int]]:
        """(local position, query head) of every real query head."""
        return [(i * self.group_size + j, head) for i, group in enumerate(self.groups) for j, head in enumerate(group)]


def even_split(total: int, parts: int, index: int) -> range:
    """Part `index` of `total` items cut into contiguous parts whose sizes differ by at most one."""
    base, extra = divmod(total, parts)
    start = index * base + min(index, extra)
    return range(start, start + base + (index < extra))


def shard_heads(num_heads: int, num_kv_heads: int, tp_size: int, tp_rank: int) -> HeadShard:
    """Cuts so that a KV head's group stays on as few ranks as can be: first whole chunks of KV heads (as many as
    divide both the KV heads and the ranks), then each chunk's query heads evenly over the chunk's ranks."""
    group = num_heads // num_kv_heads
    chunks = gcd(num_kv_heads, tp_size)
    ranks = tp_size // chunks
    chunk, within = divmod(tp_rank, ranks)
    heads_per_chunk = num_heads // chunks
    own = even_split(heads_per_chunk, ranks, within)
    heads = [chunk * heads_per_chunk + h for h in own]
    kv_heads = sorted({h // group for h in heads})
    return HeadShard(tuple(kv_heads), tuple(tuple(h for h in heads if h // group == kv) for kv in kv_heads))


def shard_mlp(intermediate_size: int, tp_size: int, tp_rank: int) -> range:
    """Columns of gate and up (rows of down), cut at multiples of 64 where there are enough, which matrix units like."""
    unit = next(u for u in (64, 32, 16, 8, 4, 2, 1) if intermediate_size % u == 0 and intermediate_size // u >= tp_size)
    share = even_split(intermediate_size // unit, tp_size, tp_rank)
    return range(share.start * unit, share.stop * unit)


def shard_vocab(vocab_size: int, tp_size: int, tp_rank: int) -> range:
    """Rows of embedding and head. All ranks hold `padded_vocab / tp_size` rows; the range gives the real ones."""
    rows = padded_vocab(vocab_size, tp_size) // tp_size
    start = min(tp_rank * rows, vocab_size)
    return range(start, min(start + rows, vocab_size))


def padded_vocab(vocab_size: int, tp_size: int) -> int:
    """The vocabulary rounded up to a multiple of the ranks (and of 8 rows each)."""
    unit = 8 * tp_size
    return -(-vocab_size // unit) * unit
