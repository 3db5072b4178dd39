"""Shards without a model, each rank in a process of its own that serves `BlockServer`, and rank 0's side of them here.

A follower process has caches for many workers of any sharding; block ids below FILLED hold known bytes from the start.
Reading block GATE stops in the middle of a copy until the test says `go`.
"""

import asyncio
import multiprocessing
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from cluster.identity import Identity
from kvstore.client import StoreClient
from kvstore.connections import Connections
from kvstore.copying import Block
from kvstore.layout import Layout
from kvstore.part import Part
from kvstore.writer import HandoffWriter
from tests.kvstore.rig import PATIENCE_S, SECRET
from workers.all_shards import AllShards, holders
from workers.block_mover import BlockMover, OwnBlocks
from workers.quantization import Int8Codec
from workers.runner import Chunk
from workers.shard import Shard
from workers.shard_blocks import BlockServer
from workers.shard_peers import ShardPeers
from workers.stored_blocks import EncodedBlocks, ExactBlocks, StoredBlocks

IDENTITY = Identity("ns", "", SECRET, "127.0.0.1")
FILLED, BLOCKS, GATE = 12, 32, 5
Grid = tuple[int, int]  # tp, pp
GRIDS: tuple[Grid, ...] = ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1))


@cache
def content(block: int, layout: Layout) -> Block:
    """The whole of a block: numbers that can be quantized, others for every id."""
    values = np.random.default_rng(block).normal(size=layout.block_bytes // 4).astype(np.float32)
    return values.view(np.uint8)


class Cache:
    """A Stage that computes nothing."""

    def __init__(self, layout: Layout, shard: Shard) -> None:
        self.layout, self.shard, self.num_blocks, self.vocab_size = layout, shard, BLOCKS, 1
        self.device_cache = None
        part = Part(layout, shard.rectangle)
        self._blocks = np.zeros((BLOCKS, part.own.block_bytes), np.uint8)
        for index in range(FILLED):
            part.read(self._blocks[index], content(index, layout))

    def run(self, chunks: list[Chunk]) -> list[int | None]:
        raise AssertionError(f"nobody computes here: {chunks}")

    def block(self, index: int) -> Block:
        block: Block = self._blocks[index]
        return block


class GatedCache(Cache):
    """Says when GATE is about to be copied, and goes on when it may."""

    def __init__(self, layout: Layout, shard: Shard, connection: Connection) -> None:
        super().__init__(layout, shard)
        self.go = threading.Event()
        self._connection = connection

    def block(self, index: int) -> Block:
        if index == GATE and not self.go.is_set():
            self._connection.send("at the gate")
            self.go.wait(60)
        return super().block(index)


def follow(connection: Connection) -> None:
    """Main of a follower process: ("serve", ...) -> address; ("blocks" or "wipe", address, ids) -> bytes; ("go",)."""
    asyncio.run(_follow(connection))


async def _follow(connection: Connection) -> None:
    caches: dict[str, Cache] = {}
    servers: list[BlockServer] = []
    while True:
        try:
            what, *more = await asyncio.to_thread(connection.recv)
        except EOFError:
            return
        if what == "serve":
            layout, grid, rank, inline, gated = more
            shard = holders(layout, *grid)[rank]
            made = GatedCache(layout, shard, connection) if gated else Cache(layout, shard)
            servers.append(BlockServer(made, IDENTITY, quantized=True, force_inline=inline))
            address = await servers[-1].start()
            caches[address] = made
            connection.send(address)
        elif what == "blocks":
            connection.send([caches[more[0]].block(index).tobytes() for index in more[1]])
        elif what == "wipe":
            for index in more[1]:
                caches[more[0]].block(index)[:] = 0
            connection.send(None)
        else:
            for made in caches.values():
                if isinstance(made, GatedCache):
                    made.go.set()


class Follower:
    """A process for one rank."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=follow, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def ask(self, *words: Any) -> Any:
        self.connection.send(words)
        return self.hear()

    def hear(self) -> Any:
        assert self.connection.poll(PATIENCE_S), "the follower says nothing"
        return self.connection.recv()

    def close(self) -> None:
        self.process.kill()
        self.process.join(PATIENCE_S)
        self.connection.close()


@dataclass
class LeadSide:
    """Rank 0 of one worker, and where its other shards are."""

    layout: Layout
    grid: Grid
    cache: Cache
    followers: Sequence[Follower]
    addresses: tuple[str, ...]
    connections: dict[bool, Connections]
    movers: dict[bool, BlockMover]  # exact -> all shards
    failures: list[str]  # why the worker would have ended

    def blocks(self, ids: Sequence[int]) -> list[list[bytes]]:
        """Of each rank its parts."""
        own = [self.cache.block(index).tobytes() for index in ids]
        rest = [f.ask("blocks", a, list(ids)) for f, a in zip(self.followers, self.addresses, strict=False)]
        return [own, *rest]

    def wipe(self, ids: Sequence[int]) -> None:
        for index in ids:
            self.cache.block(index)[:] = 0
        for follower, address in zip(self.followers, self.addresses, strict=False):
            follower.ask("wipe", address, list(ids))


@asynccontextmanager
async def lead(
    layout: Layout,
    grid: Grid,
    followers: Sequence[Follower],
    addresses: Sequence[str],
    *,
    inline: bool = False,
    patience_s: float = PATIENCE_S,
) -> AsyncIterator[LeadSide]:
    shard = holders(layout, *grid)[0]
    stage = Cache(layout, shard)
    blocks: dict[bool, StoredBlocks] = {
        True: ExactBlocks(stage),
        False: EncodedBlocks(stage, Int8Codec(shard.part(layout))),
    }
    failures: list[str] = []
    peers = ShardPeers(addresses, SECRET, patience_s, failures.append)
    links = {exact: Connections(SECRET, kind.layout, force_inline=inline) for exact, kind in blocks.items()}
    movers: dict[bool, BlockMover] = {exact: OwnBlocks(kind, links[exact]) for exact, kind in blocks.items()}
    if grid != (1, 1):
        movers = {exact: AllShards(own, shard, peers, exact=exact) for exact, own in movers.items()}
    try:
        yield LeadSide(layout, grid, stage, followers, tuple(addresses), links, movers, failures)
    finally:
        for closing in (*movers.values(), *links.values(), peers):
            await closing.close()


@asynccontextmanager
async def writing(address: str, mover: BlockMover) -> AsyncIterator[HandoffWriter]:
    made = HandoffWriter(StoreClient(address, SECRET, "writer", mover.layout), mover.layout, mover)
    await made.connect()
    try:
        yield made
    finally:
        await made.close()
