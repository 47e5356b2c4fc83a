"""How a model is cut, for every size there could be: nothing lost, nothing twice, nobody with more than their part."""

import pytest

from rtp_llm.parallel.sharding import HeadShard, even_split, padded_vocab, shard_heads, shard_mlp, shard_vocab

# (query heads, KV heads) of all released models that come to mind, and every small combination.
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


def shares(num_heads: int, num_kv_heads: int, tp_size: int) -> list[HeadShard]:
    return [shard_heads(num_heads, num_kv_heads, tp_size, rank) for rank in range(tp_size)]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), SHAPES)
def test_heads(num_heads: int, num_kv_heads: int) -> None:
    for tp_size in range(1, min(num_heads, 33) + 1):
        all_shares = shares(num_heads, num_kv_heads, tp_size)
        check_heads(all_shares, num_heads, num_kv_heads)
        check_balance(all_shares, num_heads, num_kv_heads, tp_size)


def check_heads(all_shares: list[HeadShard], num_heads: int, num_kv_heads: int) -> None:
    """Each query head once, each beside its own KV head."""
    found = [head for share in all_shares for group in share.groups for head in group]
    assert sorted(found) == list(range(num_heads))
    for share in all_shares:
        assert len(share.groups) == len(share.kv_heads) == len(set(share.kv_heads))
        assert all(share.groups), "a KV head that nobody attends with"
        for kv_head, group in zip(share.kv_heads, share.groups, strict=True):
            assert {head // (num_heads // num_kv_heads) for head in group} == {kv_head}


def check_balance(all_shares: list[HeadShard], num_heads: int, num_kv_heads: int, tp_size: int) -> None:
    """Query heads differ by one at most, and KV heads lie on as few ranks as can be where sizes divide."""
    counts = [sum(map(len, share.groups)) for share in all_shares]
    assert max(counts) - min(counts) <= 1
    kv_counts = [len(share.kv_heads) for share in all_shares]
    if num_kv_heads % tp_size == 0:
        assert set(kv_counts) == {num_kv_heads // tp_size}
    if tp_size % num_kv_heads == 0:
        assert set(kv_counts) == {1}
    # A rank's heads are neighbours, so they touch at most one KV head more than they fill.
    group = num_heads // num_kv_heads
    assert max(kv_counts) <= -(-(max(counts) - 1) // group) + 1


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), SHAPES)
def test_slots(num_heads: int, num_kv_heads: int) -> None:
    """The place of a query head says which local KV head it uses: place // group size."""
    for tp_size in range(1, min(num_heads, 17) + 1):
        for share in shares(num_heads, num_kv_heads, tp_size):
            places = dict(share.slots())
            assert len(places) == len(share.slots()) == sum(map(len, share.groups))
            assert all(0 <= place < share.num_heads for place in places)
            assert share.num_heads == share.group_size * len(share.kv_heads)
            for place, head in places.items():
                assert share.kv_heads[place // share.group_size] == head // (num_heads // num_kv_heads)


def test_the_issues_example() -> None:
    """14 query heads on 2 KV heads, 4 ranks: two ranks per KV head, with four and three of its seven heads."""
    assert shares(14, 2, 4) == [
        HeadShard((0,), ((0, 1, 2, 3),)),
        HeadShard((0,), ((4, 5, 6),)),
        HeadShard((1,), ((7, 8, 9, 10),)),
        HeadShard((1,), ((11, 12, 13),)),
    ]


def test_heads_across_kv_heads_are_padded() -> None:
    """Three ranks on two KV heads: the one in the middle has a bit of both, and one place that stays empty."""
    middle = shard_heads(6, 2, 4, 1), shard_heads(6, 2, 3, 1), shard_heads(10, 2, 3, 1)
    assert middle[0] == HeadShard((0,), ((2,),))
    assert middle[1] == HeadShard((0, 1), ((2,), (3,)))
    assert middle[2] == HeadShard((0, 1), ((4,), (5, 6)))
    assert middle[2].num_heads == 4
    assert middle[2].slots() == [(0, 4), (2, 5), (3, 6)]


@pytest.mark.parametrize("total", range(0, 40))
def test_even_split(total: int) -> None:
    for parts in range(1, 20):
        ranges = [even_split(total, parts, index) for index in range(parts)]
        assert [i for r in ranges for i in r] == list(range(total))
        assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize("size", [*range(16, 200, 7), 512, 1000, 4864, 8960, 11008, 13824, 14336, 18944, 28672, 29568])
def test_mlp(size: int) -> None:
    for tp_size in range(1, 17):
        ranges = [shard_mlp(size, tp_size, rank) for rank in range(tp_size)]
        assert [column for r in ranges for column in r] == list(range(size))
        assert all(ranges), "a rank without work"
        # Cut at multiples of the largest unit that leaves every rank one: nobody has more than one unit more.
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
        # All ranks hold as many rows, and row i of rank r is token r x rows + i: the head's parts are just put in line.
        assert all(len(r) <= rows for r in ranges)
        assert all(r.start == rank * rows for rank, r in enumerate(ranges) if len(r))
