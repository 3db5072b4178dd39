"""Stores, writers and readers as processes that are killed, stopped and starved: blocks get lost, bytes never lie.

Numbers in brackets are rows of the failure table in the project's notes on the store.
"""

import asyncio
import contextlib
import os
import random
import resource
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import redis

from cluster.errors import NoSpace
from cluster.store_messages import DISK, MEMORY, Count, Drop, Verify
from kvstore.fetcher import BlockFetcher, Source
from kvstore.index import Index
from kvstore.redis_server import EmbeddedRedis
from tests.kvstore.rig import (
    LAYOUT,
    PATIENCE_S,
    Target,
    ask,
    block_id,
    block_of,
    connections,
    fetched,
    find,
    hashes_for,
    keep,
    keys_for,
    process,
    stat,
    store,
    store_process,
    until,
    writer,
)

BLOCKS = 6


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(bounded())


async def on_disk(address: str, blocks: int) -> None:
    async def written() -> bool:
        return (await stat(address)).disk_blocks >= blocks

    await until(written, f"{blocks} blocks are on the disk")


async def quiet(address: str) -> bool:
    s = await stat(address)
    return s.free + s.cached == s.slabs


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if len(path.name) == 64)


def fill(folder: Path, name: str) -> None:
    """As if a writer had been killed in the middle."""
    (writing,) = folder.rglob("writing")
    (writing / name).write_bytes(b"half of a block")


# ------------------------------------------------------------------------------------------------------ the store dies
def test_a_killed_store_has_its_blocks_again_after_a_restart_and_nothing_half_written(tmp_path: Path) -> None:
    """[5] The same for a whole cluster: nothing else knows of the blocks."""

    async def body() -> None:
        async with store_process(16, disk=tmp_path) as (address, epoch, first):
            hashes = await keep(address, 0, BLOCKS)
            await on_disk(address, BLOCKS)
            first.kill()
            fill(tmp_path, hashes_for(4, chain=9)[0].hex())
        async with store_process(16, disk=tmp_path) as (address, again, _):
            assert again != epoch
            assert await find(address, hashes) == [DISK] * BLOCKS
            assert await ask(address, "Verify", Verify(tuple(hashes))) == Count(0)
            assert await fetched(address, hashes, 0) == BLOCKS
            s = await stat(address)
            assert (s.disk_blocks, s.disk_errors_total) == (BLOCKS, 0)
            assert len(files_in(tmp_path)) == BLOCKS, "the half file is gone"

    run(body())


def test_a_terminated_store_flushes_first(tmp_path: Path) -> None:
    async def body() -> None:
        async with store_process(40, disk=tmp_path) as (address, _, first):
            hashes = await keep(address, 0, 30)
            assert await asyncio.to_thread(first.terminate) == 0
        async with store_process(40, disk=tmp_path) as (address, _, _):
            assert await fetched(address, hashes, 0) == 30

    run(body())


@pytest.mark.parametrize("seed", range(4))
def test_a_store_killed_while_it_writes_leaves_whole_blocks_or_none(tmp_path: Path, seed: int) -> None:
    async def body() -> None:
        rng = random.Random(seed)
        async with store_process(200, disk=tmp_path) as (address, _, first):
            for chain in range(10):
                await keep(address, chain, 16)
            await on_disk(address, rng.randrange(1, 140))
            first.kill()
        async with store_process(200, disk=tmp_path) as (address, _, _):
            s = await stat(address)
            assert s.disk_blocks >= 1
            assert s.disk_errors_total == 0, "every file with a name was whole"
            everything = [name for chain in range(10) for name in hashes_for(64, chain)]
            assert await ask(address, "Verify", Verify(tuple(everything))) == Count(0)
            for chain in range(10):
                hashes = hashes_for(64, chain)
                assert await fetched(address, hashes, chain) == len(await find(address, hashes))
            assert (await stat(address)).corrupt_total == 0

    run(body())


@pytest.mark.parametrize("harm", ["short", "flipped", "foreign"])
def test_files_that_went_bad_while_the_store_was_down_are_misses(tmp_path: Path, harm: str) -> None:
    """[7]"""

    async def body() -> None:
        async with store_process(16, disk=tmp_path) as (address, _, first):
            hashes = await keep(address, 0, BLOCKS)
            await on_disk(address, BLOCKS)
            first.kill()
        (bad,) = [path for path in files_in(tmp_path) if path.name == hashes[2].hex()]
        (other,) = [path for path in files_in(tmp_path) if path.name == hashes[5].hex()]
        damage(bad, other, harm)
        async with store_process(16, disk=tmp_path) as (address, _, _):
            assert await fetched(address, hashes, 0) == 2
            assert not bad.exists()
            s = await stat(address)
            assert (s.corrupt_total, s.disk_errors_total, s.disk_blocks) == (1, 1, BLOCKS - 1)
            await keep(address, 0, BLOCKS)  # computed again, and written again
            assert await fetched(address, hashes, 0) == BLOCKS
            await on_disk(address, BLOCKS)

    run(body())


def damage(bad: Path, other: Path, harm: str) -> None:
    data = bytearray(bad.read_bytes())
    match harm:
        case "short":
            del data[-1:]
        case "flipped":
            data[-100] ^= 4
        case "foreign":
            data = bytearray(other.read_bytes())
    bad.write_bytes(data)


# -------------------------------------------------------------------------------------------------- the disk is full
def test_a_full_disk_costs_the_disk_tier_and_nothing_else(tmp_path: Path) -> None:
    """[18] The kernel refuses to let the store's files grow; what is in memory does not notice."""

    async def body() -> None:
        async with store_process(64, disk=tmp_path) as (address, _, made):
            first = await keep(address, 0, BLOCKS)
            await on_disk(address, BLOCKS)
            soft, hard = resource.prlimit(made.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(made.pid, resource.RLIMIT_FSIZE, (4000, hard))
            for chain in range(1, 5):
                await keep(address, chain, BLOCKS)
            await until(lambda: failed(address), "a write has failed")
            for chain in range(5):
                assert await fetched(address, hashes_for(24, chain), chain) == BLOCKS
            s = await stat(address)
            assert (s.disk_blocks, s.cached) == (BLOCKS, 5 * BLOCKS)
            resource.prlimit(made.pid, resource.RLIMIT_FSIZE, (soft, hard))
            made.kill()
        async with store_process(64, disk=tmp_path) as (address, _, _):
            assert len(files_in(tmp_path)) == BLOCKS, "nothing half written is left"
            assert await fetched(address, first, 0) == BLOCKS

    async def failed(address: str) -> bool:
        return (await stat(address)).disk_errors_total > 0

    run(body())


def test_a_small_disk_never_holds_more_than_it_may(tmp_path: Path) -> None:
    async def body() -> None:
        async with store_process(8, disk=tmp_path, disk_blocks=10) as (address, _, _):
            for chain in range(8):
                await keep(address, chain, BLOCKS)
                await until(lambda: quiet(address), "written")
                assert len(files_in(tmp_path)) <= 10
            s = await stat(address)
            assert s.disk_bytes <= s.disk_limit_bytes
            last = hashes_for(24, chain=7)
            assert await fetched(address, last, 7) == BLOCKS

    run(body())


# -------------------------------------------------------------------------------------------------- readers, writers
@pytest.mark.parametrize("inline", [False, True], ids=["mapped", "inline"])
def test_eviction_under_readers_never_gives_wrong_bytes(tmp_path: Path, inline: bool) -> None:
    """[4] An arena for three chains, a disk for six, ten in use, by several readers and two writing processes."""

    async def body() -> None:
        rng = random.Random(3)
        async with (
            store_process(26, disk=tmp_path, disk_blocks=50) as (address, epoch, _),
            process("churn", address=address, first_chain=100, blocks=4),
            process("churn", address=address, first_chain=200, blocks=4),
            connections(inline) as shared,
        ):
            fetcher = BlockFetcher(shared)
            arrived = 0

            async def reader_of(chain: int) -> None:
                nonlocal arrived
                hashes = hashes_for(32, chain)
                for _ in range(12):
                    if rng.random() < 0.5:
                        with contextlib.suppress(NoSpace):  # the others hold everything just now
                            await keep(address, chain, 8)
                    target = Target()
                    source = Source(address, epoch, 0, 8, "memory")
                    result = await fetcher.fetch([source], hashes, target, PATIENCE_S)
                    for position in range(result.valid_blocks):
                        assert (target.blocks[position] == block_of(block_id(chain, position))).all()
                    arrived += result.valid_blocks

            await asyncio.gather(*(reader_of(chain) for chain in range(5)))
            await fetcher.close()
            s = await stat(address)
            assert arrived > 50
            assert s.evictions_total > 20
            assert s.corrupt_total == 0

    run(body())


@pytest.mark.parametrize("end", ["killed", "deadline"])
def test_a_reader_that_is_stopped_in_the_middle_of_a_fetch_and_never_goes_on_holds_nothing_for_ever(
    tmp_path: Path, end: str
) -> None:
    """[8, 9] Its pins end with its process, or with the deadline that every stream has."""

    async def body() -> None:
        timeout_s = 6.0 if end == "deadline" else None  # more than what follows takes on a busy machine
        settings = {"tokens": 8000, "timeout_s": timeout_s}
        async with store_process(2300, disk=tmp_path, disk_blocks=4000) as (address, epoch, _):
            await keep(address, 0, 2000)
            async with process("stall", address=address, epoch=epoch, **settings) as reader:
                assert await reader.line() == "one"
                os.kill(reader.pid, signal.SIGSTOP)
                assert (await stat(address)).held >= 2000
                assert await ask(address, "Drop", Drop(tuple(hashes_for(400)))) == Count(0)
                if end == "killed":
                    reader.kill()
                await until(lambda: pinless(address), "its pins are gone")

    async def pinless(address: str) -> bool:
        return (await stat(address)).held <= 1  # one may be on its way to the disk

    run(body())


def test_what_a_killed_writer_had_not_sealed_is_nobodys_block_and_what_it_had_outlives_it(tmp_path: Path) -> None:
    """[10] Its sealed blocks are fetched after its death, from memory and, after the store's, from the disk."""

    async def body() -> None:
        hashes = hashes_for(32)
        async with store_process(16, disk=tmp_path) as (address, _, first):
            settings = {"address": address, "tokens": 32, "transfer": "t", "hold_ms": 300, "sealed": 5}
            async with process("write", **settings) as dying:
                await dying.line()
                dying.kill()
            await until(lambda: quiet(address), "its slabs are free")
            assert await find(address, hashes) == [MEMORY] * 5
            assert (await stat(address)).expired_total == 1, "the hold of what it never finished ran out"
            await on_disk(address, 5)
            first.kill()
        async with store_process(16, disk=tmp_path) as (address, _, _):
            assert await find(address, hashes) == [DISK] * 5

    run(body())


def test_a_writer_that_was_stopped_and_goes_on_too_late_touches_nobodys_block() -> None:
    """[11] Its hold runs out while it is stopped; what it may still write to is given to nobody until it says so."""

    async def body() -> None:
        async with store_process(8) as (address, _, _):
            async with process("oversleep", address=address, tokens=12, transfer="t", hold_ms=200) as late:
                assert await late.line() == "reserved"
                await until(lambda: quarantined(address, 3), "its hold has run out")
                others = await keep(address, 1, 5)
                with pytest.raises(NoSpace):
                    async with writer(address) as w:
                        await w.reserve("u", hashes_for(24, chain=2), 24, 1000)
                os.kill(late.pid, signal.SIGCONT)
                assert await late.line() == "Expired"
                await until(lambda: quarantined(address, 0), "it has let go")
            assert await ask(address, "Verify", Verify(tuple(others))) == Count(0)
            assert await fetched(address, others, 1) == 5
            assert await find(address, hashes_for(12)) == []
            assert await quiet(address)

    async def quarantined(address: str, count: int) -> bool:
        return (await stat(address)).quarantined == count

    run(body())


# --------------------------------------------------------------------------------------------------------- the index
async def indexed(url: str, hashes: list[bytes], count: int) -> None:
    index = Index(url, "ns")

    async def there() -> bool:
        index._closed_until = 0.0
        return len(await index.lookup(hashes)) == count

    await until(there, f"{count} of {len(hashes)} blocks are in the index")
    await index.close()


def test_the_index_knows_a_block_as_long_as_any_tier_has_it(tmp_path: Path) -> None:
    """[2, 3] Evicted from memory, after a restart, after Redis lost its data, and no longer once it is dropped."""

    async def body(url: str) -> None:
        async with store_process(8, redis_url=url, disk=tmp_path) as (address, _, made):
            first = await keep(address, 0, BLOCKS)
            await on_disk(address, BLOCKS)
            await keep(address, 1, 8)
            assert await find(address, first) == [DISK] * BLOCKS
            await on_disk(address, BLOCKS + 8)
            await indexed(url, first, BLOCKS)
            made.kill()
        async with store_process(8, redis_url=url, disk=tmp_path) as (address, _, _):
            await indexed(url, first, BLOCKS)
            await indexed(url, hashes_for(32, chain=1), 8)
            with redis.Redis.from_url(url) as client:
                client.flushall()
            await indexed(url, first, BLOCKS)
            assert await ask(address, "Drop", Drop(tuple(first[3:]))) == Count(3)
            await indexed(url, first, 3)

    server = EmbeddedRedis()
    try:
        run(body(server.url))
    finally:
        server.close()


def test_a_block_that_is_evicted_everywhere_leaves_the_index(tmp_path: Path) -> None:
    async def body(url: str) -> None:
        async with store(8, redis_url=url, disk=tmp_path, disk_blocks=10) as (address, _):
            first = await keep(address, 0, BLOCKS)
            await on_disk(address, BLOCKS)
            await indexed(url, first, BLOCKS)
            for chain in (1, 2):
                await keep(address, chain, BLOCKS)
                await until(lambda n=chain + 1: written(address, n * BLOCKS), "written")
            await until(lambda: empty(address, first), "gone from both tiers")
            await indexed(url, first, 0)

    async def written(address: str, blocks: int) -> bool:
        return (await stat(address)).disk_writes_total == blocks

    async def empty(address: str, hashes: list[bytes]) -> bool:
        return await find(address, hashes) == []

    server = EmbeddedRedis()
    try:
        run(body(server.url))
    finally:
        server.close()


def test_two_writers_of_one_block_leave_one_block_in_each_tier(tmp_path: Path) -> None:
    """[23]"""

    async def body() -> None:
        async with (
            store_process(32, disk=tmp_path) as (address, _, _),
            writer(address) as a,
            writer(address) as b,
        ):
            keys, ids = keys_for(24), [block_id(0, position) for position in range(BLOCKS)]
            await asyncio.gather(*(w.store(keys, ids, "") for w in (a, b)))
            await on_disk(address, BLOCKS)
            await until(lambda: quiet(address), "nothing is held")
            s = await stat(address)
            assert (s.cached, s.disk_blocks, len(files_in(tmp_path))) == (BLOCKS, BLOCKS, BLOCKS)
            assert s.cached * LAYOUT.block_bytes == BLOCKS * s.block_bytes

    run(body())
