"""Sharding of heads, MLP and vocabulary: every element is on exactly one rank, and shards are balanced."""

import pytest

from rtp_llm.parallel.sharding import HeadShard, even_split, padded_vocab, shard_heads, shard_mlp, shard_vocab

# (query heads, KV heads) of released models, and all small combinations.
RELEASED = [
    (14, 2),
    (28, 4),
    (32, 8),
    (64, 8),
    (40, 8),
    (48, 8),
    (71, 1),
    (96, 8),
    (128, 8),
    (40, 40),
    (25, 5),
    (36, 12),
]
SMALL = [(kv * group, kv) for kv in range(1, 13) for group in range(1, 8)]
SHAPES = sorted({*RELEASED, *SMALL})


def head_shards(num_heads: int, num_kv_heads: int, tp_size: int) -> list[HeadShard]:
    return [shard_heads(num_heads, num_kv_heads, tp_size, rank) for rank in range(tp_size)]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), SHAPES)
def test_heads(num_heads: int, num_kv_heads: int) -> None:
    for tp_size in range(1, min(num_heads, 33) + 1):
        shards = head_shards(num_heads, num_kv_heads, tp_size)
        check_heads(shards, num_heads, num_kv_heads)
        check_balance(shards, num_heads, num_kv_heads, tp_size)


def check_heads(shards: list[HeadShard], num_heads: int, num_kv_heads: int) -> None:
    """Every query head is on one rank, together with its KV head."""
    query_heads = [head for shard in shards for group in shard.groups for head in group]
    assert sorted(query_heads) == list(range(num_heads))
    for shard in shards:
        assert len(shard.groups) == len(shard.kv_heads) == len(set(shard.kv_heads))
        assert all(shard.groups), "a KV head without query heads"
        for kv_head, group in zip(shard.kv_heads, shard.groups, strict=True):
            assert {head // (num_heads // num_kv_heads) for head in group} == {kv_head}


def check_balance(shards: list[HeadShard], num_heads: int, num_kv_heads: int, tp_size: int) -> None:
    """Asserts that numbers of query heads differ by at most one, and that no KV head is on more ranks than needed if
    the number of KV heads divides the number of ranks or is a multiple of it."""
    counts = [sum(map(len, shard.groups)) for shard in shards]
    assert max(counts) - min(counts) <= 1
    kv_counts = [len(shard.kv_heads) for shard in shards]
    if num_kv_heads % tp_size == 0:
        assert set(kv_counts) == {num_kv_heads // tp_size}
    if tp_size % num_kv_heads == 0:
        assert set(kv_counts) == {1}
    # A rank's query heads are consecutive, so they need at most one KV head more than the minimum.
    group_size = num_heads // num_kv_heads
    assert max(kv_counts) <= -(-(max(counts) - 1) // group_size) + 1


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), SHAPES)
def test_slots(num_heads: int, num_kv_heads: int) -> None:
    """A query head at local position i uses local KV head i // group_size."""
    for tp_size in range(1, min(num_heads, 17) + 1):
        for shard in head_shards(num_heads, num_kv_heads, tp_size):
            positions = dict(shard.slots())
            assert len(positions) == len(shard.slots()) == sum(map(len, shard.groups))
            assert all(0 <= position < shard.num_heads for position in positions)
            assert shard.num_heads == shard.group_size * len(shard.kv_heads)
            for position, head in positions.items():
                assert shard.kv_heads[position // shard.group_size] == head // (num_heads // num_kv_heads)


def test_14_query_heads_on_4_ranks() -> None:
    """Two ranks per KV head, with four and three of its seven query heads."""
    assert head_shards(14, 2, 4) == [
        HeadShard((0,), ((0, 1, 2, 3),)),
        HeadShard((0,), ((4, 5, 6),)),
        HeadShard((1,), ((7, 8, 9, 10),)),
        HeadShard((1,), ((11, 12, 13),)),
    ]


def test_heads_across_kv_heads_are_padded() -> None:
    """With three ranks and two KV heads, the middle rank has query heads of both, and one padded position."""
    middle = shard_heads(6, 2, 4, 1), shard_heads(6, 2, 3, 1), shard_heads(10, 2, 3, 1)
    assert middle[0] == HeadShard((0,), ((2,),))
    assert middle[1] == HeadShard((0, 1), ((2,), (3,)))
    assert middle[2] == HeadShard((0, 1), ((4,), (5, 6)))
    assert middle[2].num_heads == 4
    assert middle[2].slots() == [(0, 4), (2, 5), (3, 6)]


@pytest.mark.parametrize("total", range(0, 40))
def test_even_split(total: int) -> None:
    for num_parts in range(1, 20):
        ranges = [even_split(total, num_parts, index) for index in range(num_parts)]
        assert [i for r in ranges for i in r] == list(range(total))
        assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize("size", [*range(16, 200, 7), 512, 1000, 4864, 8960, 11008, 13824, 14336, 18944, 28672, 29568])
def test_mlp(size: int) -> None:
    for tp_size in range(1, 17):
        ranges = [shard_mlp(size, tp_size, rank) for rank in range(tp_size)]
        assert [column for r in ranges for column in r] == list(range(size))
        assert all(ranges), "a rank without columns"
        # Boundaries are multiples of the largest unit that gives every rank one; sizes differ by at most one unit.
        unit = max(u for u in (1, 2, 4, 8, 16, 32, 64) if size % u == 0 and size // u >= tp_size)
        assert all(r.start % unit == 0 for r in ranges)
        assert max(map(len, ranges)) - min(map(len, ranges)) <= unit


@pytest.mark.parametrize("size", [1, 7, 8, 9, 211, 509, 1000, 32000, 32003, 128256, 151936, 152064])
def test_vocabulary(size: int) -> None:
    for tp_size in range(1, 17):
        ranges = [shard_vocab(size, tp_size, rank) for rank in range(tp_size)]
        rows = padded_vocab(size, tp_size) // tp_size
        assert [row for r in ranges for row in r] == list(range(size))
        assert padded_vocab(size, tp_size) % tp_size == 0
        assert size <= padded_vocab(size, tp_size) < size + 8 * tp_size
        # Row i of rank r is token r * rows + i, so the head can concatenate logits in rank order.
        assert all(len(r) <= rows for r in ranges)
        assert all(r.start == rank * rows for rank, r in enumerate(ranges) if len(r))
