"""Every head, layer, column and word belongs to somebody, and every block is written exactly once."""

import itertools

import pytest

from cluster.errors import ModelError
from kvstore.layout import Layout, tiles
from kvstore.layout import whole as everything
from workers.shard import Shard, Sizes, shards, split

SMOLLM2 = Sizes(heads=9, kv_heads=3, layers=30, intermediate=1536, vocabulary=49152)
SHAPES = [
    SMOLLM2,
    Sizes(heads=6, kv_heads=6, layers=5, intermediate=37, vocabulary=101),  # MHA
    Sizes(heads=8, kv_heads=1, layers=3, intermediate=16, vocabulary=33),  # MQA
    Sizes(heads=12, kv_heads=2, layers=4, intermediate=16, vocabulary=64),
    Sizes(heads=32, kv_heads=8, layers=80, intermediate=28672, vocabulary=128256),
]
GRIDS = [(tp, pp) for tp in (1, 2, 3, 5, 6) for pp in (1, 2, 3)]


@pytest.mark.parametrize(("sizes", "grid"), list(itertools.product(SHAPES, GRIDS)))
def test_everything_is_somebodys(sizes: Sizes, grid: tuple[int, int]) -> None:
    ranks = shards(sizes, *grid)
    assert [rank.rank for rank in ranks] == list(range(grid[0] * grid[1]))
    for stage in range(grid[1]):
        across = [rank for rank in ranks if rank.stage == stage]
        for part, total in (
            ("heads", sizes.heads),
            ("intermediate", sizes.intermediate),
            ("vocabulary", sizes.vocabulary),
        ):
            assert covered([getattr(rank, part) for rank in across]) == list(range(total))
    assert covered([rank.layers for rank in ranks[:: grid[0]]]) == list(range(sizes.layers))


@pytest.mark.parametrize(("sizes", "grid"), list(itertools.product(SHAPES, GRIDS)))
def test_query_heads_sit_with_their_kv_heads_in_equal_groups(sizes: Sizes, grid: tuple[int, int]) -> None:
    group = sizes.heads // sizes.kv_heads
    for rank in shards(sizes, *grid):
        queries, kv = range(*rank.heads), range(*rank.kv_heads)
        assert {query // group for query in queries} == set(kv)
        assert len(queries) % len(kv) == 0
        # the kernel gives the first of the local queries to the first local KV head, and so on
        local = len(queries) // len(kv)
        assert rank.group == local
        assert all(query // group == kv[index // local] for index, query in enumerate(queries))


@pytest.mark.parametrize(("sizes", "grid"), list(itertools.product(SHAPES, GRIDS)))
def test_every_block_is_written_exactly_once(sizes: Sizes, grid: tuple[int, int]) -> None:
    layout = Layout(sizes.kv_heads, sizes.layers, 16, 8, "float32", 4)
    ranks = shards(sizes, *grid)
    for block in range(12):
        writers = [rank for rank in ranks if rank.writes(block)]
        assert tiles(layout, [rank.rectangle for rank in writers], everything(layout))


def test_replicas_take_turns() -> None:
    ranks = shards(Sizes(heads=8, kv_heads=1, layers=1, intermediate=8, vocabulary=8), 4, 1)
    assert [[rank.rank for rank in ranks if rank.writes(block)] for block in range(5)] == [[0], [1], [2], [3], [0]]


def test_smollm2_on_two_ranks() -> None:
    first, second = shards(SMOLLM2, 2, 1)
    assert (first.kv_heads, first.heads) == ((0, 2), (0, 6))
    assert (second.kv_heads, second.heads) == ((2, 3), (6, 9))


def test_fewer_kv_heads_than_ranks_are_shared() -> None:
    ranks = shards(Sizes(heads=4, kv_heads=2, layers=1, intermediate=8, vocabulary=8), 3, 1)
    assert [(r.heads, r.kv_heads, r.replica, r.replicas) for r in ranks] == [
        ((0, 1), (0, 1), 0, 2),
        ((1, 2), (0, 1), 1, 2),
        ((2, 4), (1, 2), 0, 1),
    ]


@pytest.mark.parametrize("grid", [(10, 1), (0, 1), (1, 31), (1, 0)])
def test_what_does_not_fit_is_refused_with_what_does(grid: tuple[int, int]) -> None:
    with pytest.raises(ModelError, match=r"use 1 to (9|30)"):
        shards(SMOLLM2, *grid)


def test_its_part_of_a_block() -> None:
    rank: Shard = shards(SMOLLM2, 2, 3)[3]
    part = rank.part(Layout(3, 30, 16, 64, "bfloat16", 2))
    assert (part.heads, part.layers, part.tokens, part.dim, part.dtype) == (1, 10, 16, 64, "bfloat16")


def test_uneven_spans_differ_by_one() -> None:
    assert split(10, 4) == ((0, 3), (3, 6), (6, 8), (8, 10))
    assert split(2, 3) == ((0, 1), (1, 2), (2, 2))


def covered(spans: list[tuple[int, int]]) -> list[int]:
    return [index for first, last in spans for index in range(first, last)]
