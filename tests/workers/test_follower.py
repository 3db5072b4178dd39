"""How a shard that is not rank 0 ends: with rank 0, or saying why. What it computes is in test_lead.py."""

import asyncio
import threading
from functools import partial

import psutil

from cluster.codec import encode
from cluster.messages import Ack
from cluster.shard_messages import StepPlan
from tests.workers.shard_group import (
    HOST,
    PATIENCE_S,
    Grid,
    Nothing,
    follow,
    follower_processes,
    following,
    lead_alone,
    processes,
    started,
)
from workers.follower import FAILED, Follower


def test_the_shards_end_when_rank_0_is_killed_in_a_step_that_one_of_them_holds_up() -> None:
    """Whatever they wait for: the timeout of their links is far longer than the test waits."""
    here, there = processes.Pipe()
    grid = Grid(2, 2, step_timeout=10 * PATIENCE_S)
    lead = processes.Process(target=lead_alone, args=(grid, there))
    lead.start()
    assert here.poll(PATIENCE_S)
    with follower_processes(grid, here.recv()) as followers:
        assert here.poll(PATIENCE_S)
        assert here.recv() == "computing"
        stopped = psutil.Process(followers[-1].pid)
        stopped.suspend()
        lead.kill()
        for process in followers[:-1]:
            process.join(PATIENCE_S)
            assert process.exitcode is not None
        stopped.resume()
        followers[-1].join(PATIENCE_S)
        assert followers[-1].exitcode is not None
    lead.join(PATIENCE_S)


def test_a_plan_that_does_not_follow_ends_the_shard_and_the_worker() -> None:
    with started(Grid(1, 2)) as group:
        group.lead.send(encode(StepPlan(7, b"", (), b"", b"", b"")))
        assert group.ended.wait(PATIENCE_S)
        assert group.exit_code(1) == FAILED


class Copying(Nothing):
    """Has a thread that takes longer than anybody waits."""

    async def start(self) -> str:
        self._copy = asyncio.create_task(asyncio.to_thread(threading.Event().wait, 10 * PATIENCE_S))
        return await super().start()


def follow_copying(grid: Grid, rank: int, address: str, secret: str) -> None:
    Follower(rank, address, secret, partial(grid.stage, rank), Copying).run()


def test_a_shard_that_fails_does_not_wait_for_its_copies() -> None:
    with started(Grid(1, 2), follow_copying) as group:
        group.lead.send(encode(Ack()))
        assert group.ended.wait(PATIENCE_S)
        assert group.exit_code(1) == FAILED


def test_nobody_listens() -> None:
    with following(Grid(1, 2), target=misled) as (_, followers):
        followers[0].join(PATIENCE_S)
        assert followers[0].exitcode == FAILED


def misled(grid: Grid, rank: int, address: str, secret: str) -> None:
    del address
    follow(grid, rank, f"{HOST}:1", secret)
