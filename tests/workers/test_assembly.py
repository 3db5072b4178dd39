"""Shards that join and load, or do not: rank 0 raises what is wrong, in time and by name. Real processes."""

import pytest

from cluster.errors import ModelError, StartupError, WorkerLost
from tests.workers.shard_group import (
    HOST,
    PATIENCE_S,
    SECRET,
    STALLED_S,
    Grid,
    assemble,
    follow,
    following,
)
from workers.control import ControlListener
from workers.follower import FAILED


@pytest.mark.parametrize("rank", range(4))
def test_a_shard_that_cannot_load_says_why(rank: int) -> None:
    grid = Grid(2, 2, broken=rank, step_timeout=STALLED_S)
    with (
        following(grid) as (listener, _),
        pytest.raises(ModelError, match=f"rank {rank} has no memory for its part; lower kv_memory"),
    ):
        assemble(grid, listener)


def test_a_shard_that_crashes_while_it_loads_is_named() -> None:
    grid = Grid(2, 2, crashes=3, step_timeout=STALLED_S)
    with following(grid) as (listener, _), pytest.raises(WorkerLost, match=r"^shard 3 \(pid \d+\) has ended"):
        assemble(grid, listener)


def test_a_shard_that_never_joins_is_named() -> None:
    listener = ControlListener(HOST, SECRET)
    with pytest.raises(StartupError, match=r"shards 1, 2 of this worker did not join within 0.2 s"):
        assemble(Grid(1, 3), listener, timeout_s=0.2)
    listener.close()


def test_a_shard_with_another_secret_is_refused_and_ends() -> None:
    grid = Grid(1, 2)
    with following(grid, secret="another secret") as (listener, followers):
        with pytest.raises(StartupError, match="1 connections were refused"):
            assemble(grid, listener, timeout_s=1.0)
        followers[0].join(PATIENCE_S)
        assert followers[0].exitcode == FAILED


def test_a_rank_joins_once() -> None:
    grid = Grid(1, 3)
    with following(grid, target=as_rank_one) as (listener, _), pytest.raises(StartupError, match="each once"):
        assemble(grid, listener)


def as_rank_one(grid: Grid, rank: int, address: str, secret: str) -> None:
    del rank
    follow(grid, 1, address, secret)
