"""Computes which heads, MLP columns and vocabulary rows belong to one rank. Does not import torch.

Any TP size up to the number of query heads works. KV heads are replicated if there are fewer of them than ranks. If
the TP size does not divide the query heads, the number of zero-padded heads differs between ranks.
"""

from dataclasses import dataclass
from math import gcd, lcm

from rtp_llm.errors import ConfigError


@dataclass(frozen=True)
class HeadShard:
    """One rank's heads. `groups[i]` are the query heads that use KV head `kv_heads[i]`.

    All groups are padded to `group_size`: local query head j uses local KV head j // group_size.
    """

    kv_heads: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def group_size(self) -> int:
        return max(len(g) for g in self.groups)

    @property
    def num_heads(self) -> int:
        """Returns the number of query heads on this rank, including padding."""
        return len(self.groups) * self.group_size

    def slots(self) -> list[tuple[int, int]]:
        """Returns (index among this rank's heads, index in the model) of every query head here, without padding."""
        return [(i * self.group_size + j, head) for i, group in enumerate(self.groups) for j, head in enumerate(group)]


def even_split(total: int, num_ranges: int, index: int) -> range:
    """Splits `total` items into `num_ranges` ranges as equal as possible. Returns the one with this `index`."""
    base, extra = divmod(total, num_ranges)
    start = index * base + min(index, extra)
    return range(start, start + base + (index < extra))


def shard_heads(num_heads: int, num_kv_heads: int, tp_size: int, tp_rank: int) -> HeadShard:
    """Returns the heads of one rank; each KV head is on as few ranks as possible.

    Splits the KV heads into gcd(KV heads, ranks) chunks, then the query heads of a chunk evenly over its ranks.
    """
    group_size = num_heads // num_kv_heads
    num_chunks = gcd(num_kv_heads, tp_size)
    ranks_per_chunk = tp_size // num_chunks
    chunk, rank_in_chunk = divmod(tp_rank, ranks_per_chunk)
    heads_per_chunk = num_heads // num_chunks
    heads = [chunk * heads_per_chunk + h for h in even_split(heads_per_chunk, ranks_per_chunk, rank_in_chunk)]
    kv_heads = sorted({h // group_size for h in heads})
    return HeadShard(tuple(kv_heads), tuple(tuple(h for h in heads if h // group_size == kv) for kv in kv_heads))


def shard_mlp(intermediate_size: int, tp_size: int, tp_rank: int, granularity: int = 1) -> range:
    """Returns the columns of gate_proj and up_proj, and thus the rows of down_proj, that belong to one rank.

    Boundaries are multiples of 64 (the tile size of matrix units), or of a smaller power of two if 64 does not divide
    `intermediate_size` or would leave a rank without columns. They are multiples of `granularity` too, which must
    divide `intermediate_size`. Raises ConfigError if there are not enough multiples for all ranks.
    """
    candidates = (lcm(u, granularity) for u in (64, 32, 16, 8, 4, 2, 1))
    unit = next((u for u in candidates if intermediate_size % u == 0 and intermediate_size // u >= tp_size), 0)
    if not unit:
        raise ConfigError(
            f"TP_SIZE={tp_size}: the MLP's {intermediate_size} columns can be split only at multiples of {granularity};"
            f" allowed: at most {intermediate_size // granularity}"
        )
    units = even_split(intermediate_size // unit, tp_size, tp_rank)
    return range(units.start * unit, units.stop * unit)


def shard_vocab(vocab_size: int, tp_size: int, tp_rank: int) -> range:
    """Returns the vocabulary rows of one rank in embedding and LM head, without the padding rows at the end."""
    rows = padded_vocab(vocab_size, tp_size) // tp_size
    start = min(tp_rank * rows, vocab_size)
    return range(start, min(start + rows, vocab_size))


def padded_vocab(vocab_size: int, tp_size: int) -> int:
    """Returns the vocabulary size rounded up, so that the shards of all ranks have equal multiples of 8 rows."""
    unit = 8 * tp_size
    return -(-vocab_size // unit) * unit
