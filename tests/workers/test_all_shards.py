"""Copies between stores and workers of several shards, with a real store and every rank but the first in its process.

Whatever grid wrote a block, every other grid reads it, byte for byte; and when a shard fails, is killed, stopped or
cancelled in the middle, no slab gets lost and none gets a new owner too early."""

import asyncio
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from cluster.errors import Corrupt, ModelError, WorkerLost
from cluster.messages import Handoff
from kvstore.fetcher import Fetched, Source
from kvstore.layout import Layout, Rectangle
from kvstore.part import Part
from kvstore.reader import Received
from tests.kvstore.rig import keys_for, stat, store
from tests.workers.block_followers import GRIDS, Follower, Grid, LeadSide, content, lead, writing
from workers.all_shards import holders, merged_fetch, merged_receipt, prove_tiling
from workers.quantization import Int8Codec
from workers.shard import Sizes, shards

TOKENS = 4
LAYOUTS = {  # heads, layers
    "MHA": Layout(4, 3, TOKENS, 4, "float32", 4),
    "uneven GQA, uneven layers": Layout(3, 5, TOKENS, 4, "float32", 4),
    "two heads for three ranks": Layout(2, 4, TOKENS, 4, "float32", 4),
    "MQA": Layout(1, 3, TOKENS, 4, "float32", 4),
}
WRITTEN = (7, 0, 3, 6, 11)  # block ids of a sequence of 18 tokens
TABLE = (20, 13, 31, 14, 15)  # where the reader puts them
COUNT = TOKENS * 4 + 2
WAIT_S = 10.0


@pytest.fixture(scope="module")
def followers() -> Iterator[list[Follower]]:
    made = [Follower() for _ in range(3)]
    yield made
    for follower in made:
        follower.close()


def serve(followers: Sequence[Follower], layout: Layout, grid: Grid, inline: bool) -> list[str]:
    """The other shards of a worker; returns their addresses."""
    ranks = range(1, grid[0] * grid[1])
    return [followers[rank - 1].ask("serve", layout, grid, rank, inline, False) for rank in ranks]


def check(worker: LeadSide, exact: bool, count: int) -> None:
    """Every rank's part of the first blocks is what was written."""
    codec = Int8Codec(worker.layout)
    wanted = []
    for block in WRITTEN[:count]:
        whole = content(block, worker.layout)
        if not exact:
            whole, encoded = np.zeros_like(whole), codec.encode(whole)
            codec.decode(encoded, whole)
        wanted.append(whole)
    found = worker.blocks(TABLE[:count])
    assert len(found) == worker.grid[0] * worker.grid[1]
    for shard, parts in zip(holders(worker.layout, *worker.grid), found, strict=True):
        part = Part(worker.layout, shard.rectangle)
        for position, whole in enumerate(wanted):
            own = np.zeros(part.own.block_bytes, np.uint8)
            part.read(own, whole)
            assert parts[position] == own.tobytes(), f"rank {shard.rank}, block {position}"
    worker.wipe(TABLE)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("inline", [False, True])
def test_every_grid_reads_what_every_grid_wrote(followers: list[Follower], name: str, inline: bool) -> None:
    layout = LAYOUTS[name]
    addresses = {grid: serve(followers, layout, grid, inline) for grid in GRIDS}

    async def body() -> None:
        stored = Int8Codec(layout).stored
        async with store(400, layout) as (near, _), store(400, stored) as (tier, _):
            for chain, grid in enumerate(GRIDS):
                async with lead(layout, grid, followers, addresses[grid], inline=inline) as writer:
                    handoff = await hand_over(near, writer, chain)
                    await keep(tier, writer, chain)
                for reader_grid in GRIDS:
                    reading = lead(layout, reader_grid, followers, addresses[reader_grid], inline=inline)
                    async with reading as reader:
                        await read_all(reader, handoff, tier, chain, inline)

    asyncio.run(asyncio.wait_for(body(), 120))


async def hand_over(address: str, worker: LeadSide, chain: int) -> Handoff:
    """A handoff of the whole sequence, which stays to be read."""
    async with writing(address, worker.movers[True]) as writer:
        handoff = await writer.reserve(f"t{chain}", keys_for(COUNT, chain), COUNT, 60_000)
        await writer.send(f"t{chain}", list(enumerate(WRITTEN[:2])))
        await writer.send(f"t{chain}", list(enumerate(WRITTEN))[2:])
        await writer.finish(f"t{chain}", 99)
    assert worker.failures == []
    return handoff


async def keep(address: str, worker: LeadSide, chain: int) -> None:
    """The full blocks in the int8 store."""
    async with writing(address, worker.movers[False]) as writer:
        assert await writer.store(keys_for(COUNT, chain), WRITTEN[:-1], "") == len(WRITTEN) - 1


async def read_all(reader: LeadSide, handoff: Handoff, tier: str, chain: int, inline: bool) -> None:
    received = await reader.movers[True].follow(handoff, 0, COUNT, TABLE, WAIT_S)
    assert (received.valid_blocks, received.first_token, received.error) == (len(WRITTEN), 99, None)
    check(reader, True, len(WRITTEN))
    hashes = [key.hash for key in keys_for(COUNT, chain)]
    for exact, address in ((True, handoff.store), (False, tier)):
        epoch = handoff.epoch if exact else (await stat(tier)).epoch
        runs = [Source(address, epoch, 0, 3, "memory"), Source(address, epoch, 3, 4, "memory")]
        fetched = await reader.movers[exact].fetch(runs, hashes, TABLE, WAIT_S)
        path = "remote" if inline else "memory"
        assert [(p[0].path, p[1]) for p in fetched.parts] == [(path, 3), (path, 1)], fetched.error
        assert (fetched.valid_blocks, fetched.error) == (4, None)
        check(reader, exact, 4)
    assert reader.failures == []


# --------------------------------------------------------------------------------------------------------- pure rules
def test_less_than_everything_is_what_all_have() -> None:
    late = Corrupt("block 2")
    merged = merged_receipt([Received(5, 9, 100, 1.0, None), Received(2, None, 40, 3.0, late)])
    assert merged == Received(2, None, 140, 3.0, late)
    both = merged_receipt([Received(5, 9, 100, 1.0, None), Received(5, 9, 90, 0.5, None)])
    assert both == Received(5, 9, 190, 1.0, None)
    tail = merged_receipt([Received(5, 9, 1, 1.0, None), Received(5, None, 1, 1.0, late)])
    assert (tail.first_token, tail.error) == (None, late), "the end of the transfer did not come everywhere"


def test_a_source_gave_what_it_gave_to_all() -> None:
    first, second = Source("a", 1, 0, 3, "memory"), Source("b", 1, 3, 5, "disk")
    away = Source("a", 1, 0, 3, "remote")
    mine = Fetched(5, ((first, 3, 0.1), (second, 2, 0.2)), None)
    theirs = Fetched(2, ((away, 2, 0.3),), Corrupt("block 2"))
    merged = merged_fetch([first, second], [mine, theirs])
    assert merged.parts == ((away, 2, 0.3), (second, 0, 0.2))
    assert (merged.valid_blocks, merged.error) == (2, theirs.error)
    assert merged_fetch([first, second], [mine, mine]) == mine


def test_parts_that_are_not_the_whole_are_refused() -> None:
    for layout in LAYOUTS.values():
        for tp, pp in GRIDS:
            ranks = holders(layout, tp, pp)
            prove_tiling(layout, ranks)
            if tp * pp > 1:
                with pytest.raises(ModelError):
                    prove_tiling(layout, ranks[1:])
    with pytest.raises(ModelError):
        prove_tiling(LAYOUTS["MQA"], [*holders(LAYOUTS["MQA"], 1, 1), *holders(LAYOUTS["MQA"], 1, 3)])


def test_who_holds_which_part_follows_from_the_block_alone() -> None:
    """Rank 0 knows the other shards of a real model without being told its sizes."""
    for kv_heads, group, layers in itertools.product((1, 2, 3, 4), (1, 3, 4), (3, 4, 5)):
        layout = Layout(kv_heads, layers, TOKENS, 4, "float32", 4)
        for tp, pp in GRIDS:
            if tp <= kv_heads * group:
                real = shards(Sizes(kv_heads * group, kv_heads, layers, 11, 101), tp, pp)
                known = holders(layout, tp, pp)
                assert [(s.rectangle, s.replica, s.replicas) for s in real] == [
                    (s.rectangle, s.replica, s.replicas) for s in known
                ]


def test_ranks_with_the_same_head_write_by_turns() -> None:
    ranks = holders(LAYOUTS["two heads for three ranks"], 3, 1)
    assert [shard.rectangle for shard in ranks] == [Rectangle(0, 1, 0, 4), Rectangle(0, 1, 0, 4), Rectangle(1, 2, 0, 4)]
    assert [[block for block in range(4) if shard.writes(block)] for shard in ranks] == [[0, 2], [1, 3], [0, 1, 2, 3]]


def test_one_bad_cell_ends_it_for_all(followers: list[Follower]) -> None:
    """Only rank 1's part of block 2 is corrupt: it is reported, and what counts is what comes before it."""
    layout, grid = LAYOUTS["MHA"], (2, 1)
    addresses = serve(followers, layout, grid, True)

    async def body() -> None:
        async with store(40, layout) as (near, server), lead(layout, grid, followers, addresses, inline=True) as worker:
            handoff = await hand_over(near, worker, 0)
            hashes = [key.hash for key in keys_for(COUNT)]
            entry = server._ledger.slabs.find(hashes[2])
            assert entry is not None
            server._arena.slab(entry.index)[-1] ^= 1
            received = await worker.movers[True].follow(handoff, 0, COUNT, TABLE, WAIT_S)
            assert (received.valid_blocks, received.first_token) == (2, None)
            assert isinstance(received.error, Corrupt)
            check(worker, True, 2)
            source = Source(near, handoff.epoch, 1, 4, "memory")
            fetched = await worker.movers[True].fetch([source], hashes, TABLE, WAIT_S)
            assert (fetched.valid_blocks, [part[1] for part in fetched.parts]) == (2, [1])
            assert isinstance(fetched.error, Corrupt)

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_store_that_refuses_one_shard_ends_the_transfer_and_nothing_leaks(followers: list[Follower]) -> None:
    """Rank 1 knows of no such writer: its copy is not begun, the others end, and the slabs come back."""
    layout, grid = LAYOUTS["MHA"], (1, 2)
    addresses = serve(followers, layout, grid, False)

    async def body() -> None:
        async with (
            store(40, layout) as (near, _),
            lead(layout, grid, followers, addresses) as worker,
            writing(near, worker.movers[True]) as writer,
        ):
            await writer.reserve("t", keys_for(COUNT), COUNT, 60_000)
            assert writer._presence is not None
            writer._presence.close()  # as if it had ended
            writer._presence = None
            with pytest.raises(WorkerLost, match="does not write"):
                await writer.send("t", list(enumerate(WRITTEN)))
            assert worker.failures == [], "the shard is well"
            assert (await stat(near)).free == 40

    asyncio.run(asyncio.wait_for(body(), 30))
