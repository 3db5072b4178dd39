"""Workers in shards for tests: real processes, control connections and links; only the model is simulated.

Processes are forked from a server that has imported everything, because importing torch takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from cluster.errors import ModelError
from cluster.rpc import Server
from kvstore.layout import Layout
from tests.workers.engine_run import BLOCK, VOCAB, prompt, sequence
from workers import assembly
from workers.control import ControlListener
from workers.follower import Follower
from workers.lead import Lead
from workers.process_links import ProcessLinks, Rendezvous
from workers.runner import Chunk, Stage
from workers.shard import shards
from workers.sim import SimRunner, Timings, sim_sizes

HOST, SECRET = "127.0.0.1", "a cluster secret"
PATIENCE_S = 30.0
STALLED_S = 3.0  # step_timeout where something is to stall
LAYOUT = Layout(heads=2, layers=3, tokens=BLOCK, dim=2, dtype="float32", itemsize=4)

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Grid:
    """What all processes of a worker are told."""

    tp: int
    pp: int
    blocks: int = 256
    step_timeout: float = PATIENCE_S
    timings: Timings = field(default_factory=Timings)
    broken: int | None = None  # this rank cannot load
    crashes: int | None = None  # this rank's process ends while it loads

    @property
    def followers(self) -> int:
        return self.tp * self.pp - 1

    def stage(self, rank: int, rendezvous: str) -> Stage:
        if rank == self.crashes:
            os._exit(1)
        if rank == self.broken:
            raise ModelError(f"rank {rank} has no memory for its part; lower kv_memory")
        shard = shards(sim_sizes(LAYOUT, VOCAB), self.tp, self.pp)[rank]
        links = ProcessLinks.join(rendezvous, shard, self.step_timeout)
        return SimRunner(LAYOUT, self.blocks, VOCAB, self.timings, shard=shard, links=links)


class Nothing:
    """Serves, but has no calls."""

    def __init__(self, _: Stage) -> None:
        self._server = Server(SECRET, {}, {})

    async def start(self) -> str:
        return await self._server.start(HOST)


def follow(grid: Grid, rank: int, address: str, secret: str) -> None:
    Follower(rank, address, secret, partial(grid.stage, rank), Nothing).run()


@dataclass
class Group:
    """A worker's shards, with rank 0 in this process."""

    lead: Lead
    followers: list[BaseProcess]  # rank - 1 -> process
    ended: threading.Event  # this process would have ended

    def kill(self, rank: int, how: signal.Signals = signal.SIGKILL) -> None:
        pid = self.followers[rank - 1].pid
        assert pid is not None
        os.kill(pid, how)

    def exit_code(self, rank: int) -> int | None:
        self.followers[rank - 1].join(PATIENCE_S)
        return self.followers[rank - 1].exitcode


@contextmanager
def started(grid: Grid, target: Callable[..., None] = follow) -> Iterator[Group]:
    with following(grid, target) as (listener, followers):
        ended = threading.Event()
        lead, rendezvous = assemble(grid, listener, ended.set)
        try:
            yield Group(lead, followers, ended)
        finally:
            lead.close()
            rendezvous.close()


@contextmanager
def following(
    grid: Grid, target: Callable[..., None] = follow, secret: str = SECRET
) -> Iterator[tuple[ControlListener, list[BaseProcess]]]:
    """The followers' processes; none of them is left behind."""
    listener = ControlListener(HOST, SECRET)
    try:
        with follower_processes(grid, listener.address, target, secret) as followers:
            yield listener, followers
    finally:
        listener.close()


@contextmanager
def follower_processes(
    grid: Grid, address: str, target: Callable[..., None] = follow, secret: str = SECRET
) -> Iterator[list[BaseProcess]]:
    followers = [
        processes.Process(target=target, args=(grid, rank, address, secret)) for rank in range(1, grid.followers + 1)
    ]
    for process in followers:
        process.start()
    try:
        yield list(followers)
    finally:
        for process in followers:
            process.kill()
            process.join(PATIENCE_S)
            process.close()


def assemble(
    grid: Grid, listener: ControlListener, ended: Callable[[], None] = lambda: None, timeout_s: float = PATIENCE_S
) -> tuple[Lead, Rendezvous]:
    controls = assembly.join(listener, grid.followers, timeout_s)
    rendezvous = Rendezvous(HOST)
    stage, peers = assembly.load(controls, rendezvous.address, partial(grid.stage, 0), timeout_s)
    return Lead(stage, controls, peers, grid.step_timeout, ended), rendezvous


def lead_alone(grid: Grid, test: Connection) -> None:
    """Rank 0 as a process of its own: says where the others join, then that they did, and computes until it is
    killed."""
    listener = ControlListener(HOST, SECRET)
    test.send(listener.address)
    lead, rendezvous = assemble(grid, listener, lambda: os._exit(70))
    test.send("computing")
    forever = sequence("forever", prompt(9))
    forever.block_table = [0, 1, 2]
    deadline = time.monotonic() + 3 * PATIENCE_S
    while time.monotonic() < deadline:
        lead.submit([Chunk(forever, 0, 9)])
        lead.collect()
    rendezvous.close()
