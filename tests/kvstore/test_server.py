"""A store and its tiers over real gRPC: what it has can be found and fetched, wherever it lies, and nothing leaks."""

import asyncio
import os
import random
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import DeadlineExceeded, EpochMismatch, ProtocolError, StartupError
from cluster.identity import Identity
from cluster.rpc import Client
from cluster.store_messages import (
    DISK,
    MEMORY,
    BlockInfo,
    BlockKey,
    Count,
    Drop,
    Fetch,
    Find,
    Fragments,
    List,
    Listing,
    Pin,
    Reserve,
    Verify,
)
from kvstore.fetcher import BlockFetcher, Source
from kvstore.server import StoreServer
from tests.kvstore.rig import (
    LAYOUT,
    SECRET,
    Target,
    ask,
    block_of,
    connections,
    fetched,
    find,
    hashes_for,
    keep,
    keys_for,
    memory_for,
    stat,
    store,
    until,
    writer,
)


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(bounded())


async def on_disk(address: str, blocks: int) -> None:
    """Wait until everything that is to be written is."""

    async def written() -> bool:
        s = await stat(address)
        return s.disk_blocks == blocks and s.held == 0

    await until(written, f"{blocks} blocks are on the disk")


async def quiet(address: str) -> bool:
    s = await stat(address)
    return s.free + s.cached == s.slabs


def only_on_disk(server: StoreServer, hashes: Sequence[bytes]) -> None:
    for name in hashes:
        assert server._ledger.slabs.forget(name)
    server._tiers.settle()


def file_of(folder: Path, name: bytes) -> Path:
    (path,) = folder.rglob(name.hex())
    return path


def names_in(folder: Path) -> set[str]:
    """Of all block files."""
    return {path.name for path in folder.rglob("*") if len(path.name) == 64}


# ------------------------------------------------------------------------------------------------------- find and fetch
def test_what_is_in_memory_is_found_and_fetched_up_to_the_first_block_that_is_not_there() -> None:
    async def body() -> None:
        async with store(8) as (address, _):
            hashes = await keep(address, 0, 4)
            longer = hashes_for(24)
            assert await find(address, longer) == [MEMORY] * 4
            assert await find(address, longer[1:]) == [MEMORY] * 3
            assert await fetched(address, longer, 0) == 4
            s = await stat(address)
            assert (s.found_blocks_total, s.missed_blocks_total, s.fetched_blocks_total) == (7, 4, 4)
            assert hashes == longer[:4]
            await until(lambda: quiet(address), "pins end with the stream")

    run(body())


def test_what_memory_has_no_room_for_is_found_and_fetched_from_the_disk(tmp_path: Path) -> None:
    async def body() -> None:
        async with store(8, disk=tmp_path) as (address, server):
            first = await keep(address, 0, 6)
            await on_disk(address, 6)
            second = await keep(address, 1, 8)
            await on_disk(address, 14)
            assert await find(address, first) == [DISK] * 6
            assert await find(address, second) == [MEMORY] * 8
            assert await fetched(address, first, 0) == 6
            assert await find(address, first) == [MEMORY] * 6
            s = await stat(address)
            assert (s.disk_reads_total, s.disk_writes_total, s.disk_errors_total) == (6, 14, 0)
            assert await fetched(address, second, 1) == 8
            await until(lambda: quiet(address), "pins end with the stream")
            server._ledger.slabs.check()

    run(body())


@pytest.mark.parametrize("inline", [False, True], ids=["mapped", "inline"])
def test_a_worker_fetches_from_the_disk_as_from_memory(tmp_path: Path, inline: bool) -> None:
    async def body() -> None:
        async with store(8, disk=tmp_path) as (address, server), connections(inline) as shared:
            hashes = await keep(address, 0, 6)
            await on_disk(address, 6)
            only_on_disk(server, hashes)
            fetcher, target = BlockFetcher(shared), Target()
            source = Source(address, (await stat(address)).epoch, 0, 6, "disk")
            result = await fetcher.fetch([source], hashes, target, 10)
            assert (result.valid_blocks, result.error) == (6, None)
            assert all((target.blocks[i] == block_of(i)).all() for i in range(6))
            await fetcher.close()

    run(body())


def test_a_promotion_does_not_evict_the_chain_it_is_for(tmp_path: Path) -> None:
    async def body() -> None:
        async with store(8, disk=tmp_path) as (address, server):
            first = await keep(address, 0, 6)
            await on_disk(address, 6)
            await keep(address, 1, 5)
            await on_disk(address, 11)
            assert await find(address, first) == [MEMORY] * 3 + [DISK] * 3
            only_on_disk(server, first[:1])
            await keep(address, 2, 1)  # no slab is free, and blocks 2 and 1 are the first to go
            await on_disk(address, 12)
            assert await find(address, first) == [DISK, MEMORY, MEMORY, DISK, DISK, DISK]
            assert await fetched(address, first, 0) == 6
            assert (await stat(address)).disk_reads_total == 4, "those in memory were not read again"

    run(body())


def test_a_chain_that_memory_cannot_hold_comes_as_far_as_it_can(tmp_path: Path) -> None:
    async def body() -> None:
        async with store(12, disk=tmp_path) as (address, _):
            hashes = await keep(address, 0, 12)
            await on_disk(address, 12)
        async with store(5, disk=tmp_path) as (address, _), writer(address) as w:
            assert await find(address, hashes) == [DISK] * 12
            assert await fetched(address, hashes, 0) == 5
            await w.reserve("t", hashes_for(16, chain=2), 16, 30_000)
            await until(lambda: one_left(address), "four of five slabs are somebody's")
            assert await fetched(address, hashes, 0) == 1
            await w.revoke("t", "test")
            assert await fetched(address, hashes, 0) == 5

    async def one_left(address: str) -> bool:
        return (await stat(address)).reserved == 4

    run(body())


def test_without_a_slab_nothing_comes_from_the_disk_and_nothing_hangs(tmp_path: Path) -> None:
    async def body() -> None:
        async with store(4, disk=tmp_path) as (address, _), writer(address) as w:
            hashes = await keep(address, 0, 4)
            await on_disk(address, 4)
            await w.reserve("t", hashes_for(16, chain=2), 16, 30_000)
            assert await find(address, hashes) == [DISK] * 4
            assert await fetched(address, hashes, 0) == 0

    run(body())


def test_a_file_that_goes_bad_ends_the_chain_there_and_is_gone(tmp_path: Path) -> None:
    async def body() -> None:
        async with store(8, disk=tmp_path) as (address, server):
            hashes = await keep(address, 0, 6)
            await on_disk(address, 6)
            only_on_disk(server, hashes)
            path = file_of(tmp_path, hashes[3])
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
            assert await fetched(address, hashes, 0) == 3
            assert not path.exists()
            assert await find(address, hashes) == [MEMORY] * 3
            s = await stat(address)
            assert (s.corrupt_total, s.disk_errors_total, s.disk_blocks) == (1, 1, 5)
            await until(lambda: quiet(address), "no slab is lost")

    run(body())


def test_a_block_that_is_asked_for_twice_comes_twice_and_costs_one_slab(tmp_path: Path) -> None:
    async def body() -> None:
        async with store(8, disk=tmp_path) as (address, server):
            (name,) = await keep(address, 0, 1)
            await on_disk(address, 1)
            only_on_disk(server, [name])
            client = Client(address, SECRET)
            fetch, data = Fetch((name, name), (await stat(address)).epoch, True), b""
            async for message in client.stream("Fetch", fetch, 10):
                if isinstance(message, Fragments):
                    data += b"".join(part.data for part in message.fragments)
            assert data == 2 * block_of(0).tobytes()
            await client.close()
            await until(lambda: quiet(address), "pins end with the stream")
            assert (await stat(address)).cached == 1
            server._ledger.slabs.check()

    run(body())


def test_requests_beyond_the_limits_are_refused() -> None:
    async def body() -> None:
        async with store(4) as (address, server), writer(address) as w:
            epoch, client_id = (await stat(address)).epoch, w._client.client_id
            many = tuple(n.to_bytes(32, "big") for n in range(4097))
            for method, message in (
                ("Find", Find(many)),
                ("Find", Find((b"short",))),
                ("Pin", Pin(many, True)),
                ("Drop", Drop(many)),
                ("Verify", Verify(many)),
                ("List", List(b"", b"", 5000)),
                ("Reserve", Reserve("t", client_id, (BlockKey(b"x", 4),), 1000)),
                ("Reserve", Reserve("t", client_id, (BlockKey(b"", 5),), 1000)),
                ("Reserve", Reserve("t", client_id, (BlockKey(many[0], 3),), 1000)),
                ("Reserve", Reserve("t", client_id, (BlockKey(b"", 4, b"", b"ids"),), 1000)),
                ("Reserve", Reserve("t", client_id, (BlockKey(b"", 4),), 1000, "t" * 65)),
            ):
                with pytest.raises(ProtocolError):
                    await ask(address, method, message)
            assert await find(address, many[:4096]) == []
            client = Client(address, SECRET)
            with pytest.raises(ProtocolError):
                async for _ in client.stream("Fetch", Fetch(many, epoch, True), 10):
                    pass
            with pytest.raises(EpochMismatch):
                async for _ in client.stream("Fetch", Fetch(many[:1], epoch + 1, True), 10):
                    pass
            await client.close()
            server._ledger.slabs.check()

    run(body())


@pytest.mark.parametrize("tier", [MEMORY, DISK], ids=["memory", "disk"])
def test_readers_that_leave_at_any_moment_leave_no_pins(tmp_path: Path, tier: int) -> None:
    async def body() -> None:
        rng = random.Random(5)
        async with store(80, disk=tmp_path) as (address, server):
            hashes = await keep(address, 0, 60)
            await on_disk(address, 60)
            epoch = (await stat(address)).epoch

            async def leave(after_s: float) -> None:
                client = Client(address, SECRET)
                try:
                    async with asyncio.timeout(after_s):
                        async for _ in client.stream("Fetch", Fetch(tuple(hashes), epoch, True), 10):
                            pass
                except TimeoutError:
                    pass
                finally:
                    await client.close()

            for _ in range(6):
                if tier == DISK:
                    await until(lambda: quiet(address), "nobody holds anything")
                    only_on_disk(server, server._ledger.slabs.names())
                await asyncio.gather(*(leave(rng.random() * 0.03) for _ in range(5)))
            await until(lambda: quiet(address), "all pins are gone")
            server._ledger.slabs.check()
            assert await fetched(address, hashes, 0) == 60

    run(body())


def test_a_disk_that_hangs_delays_only_who_waits_for_it(tmp_path: Path) -> None:
    """Its files are pipes that nobody writes to, so that opening them blocks as a dead network disk does."""

    async def body() -> None:
        async with store(40, disk=tmp_path) as (address, server):
            chains = [await keep(address, chain, 4) for chain in range(6)]
            await on_disk(address, 24)
            only_on_disk(server, [name for hashes in chains for name in hashes])
            pipes = [tmp_path / f"pipe{chain}" for chain in range(6)]
            for pipe, hashes in zip(pipes, chains, strict=True):
                file = file_of(tmp_path, hashes[0])
                file.unlink()
                os.mkfifo(pipe)
                os.link(pipe, file)  # so that it can be opened here whatever the store does to the file
            epoch = (await stat(address)).epoch
            client = Client(address, SECRET)

            async def wait_in_vain(hashes: list[bytes]) -> None:
                with pytest.raises(DeadlineExceeded):
                    async for _ in client.stream("Fetch", Fetch(tuple(hashes), epoch, True), 0.5):
                        pass

            try:
                readers = [asyncio.create_task(wait_in_vain(hashes)) for hashes in chains]
                await until(lambda: reading(address), "three of them are reading")
                other = await keep(address, 9, 20)
                assert await fetched(address, other, 9) == 20
                everything = tuple(name for hashes in chains for name in hashes)
                assert await ask(address, "Drop", Drop(everything)) == Count(12), "the others are being read"
                await asyncio.gather(*readers)
                assert (await stat(address)).reserved == 12, "no more slabs than those of three"
            finally:
                ends = [os.open(pipe, os.O_RDWR) for pipe in pipes]  # now opening them ends
            await until(lambda: quiet(address), "the disk is back")
            assert [await find(address, hashes) for hashes in chains] == [[]] * 6
            for end in ends:
                os.close(end)
            await client.close()
            server._ledger.slabs.check()

    async def reading(address: str) -> bool:
        return (await stat(address)).reserved == 12

    run(body())


# ------------------------------------------------------------------------------------------------------ operators
async def listing(address: str, prefix: bytes = b"", after: bytes = b"", limit: int = 100) -> Listing:
    found: Listing = await ask(address, "List", List(prefix, after, limit))
    return found


def test_a_list_has_every_block_once_in_order_page_by_page(tmp_path: Path) -> None:
    async def body() -> None:
        async with store(20, disk=tmp_path) as (address, server):
            hashes = await keep(address, 0, 12, tenant="me")
            await on_disk(address, 12)
            only_on_disk(server, hashes[6:])
            await ask(address, "Pin", Pin((hashes[1],), True))
            pages: list[BlockInfo] = []
            while page := (await listing(address, after=pages[-1].hash if pages else b"", limit=5)).blocks:
                assert len(page) <= 5
                pages += page
            assert [block.hash for block in pages] == sorted(hashes)
            keys = {key.hash: key for key in keys_for(48)}
            for block in pages:
                position = hashes.index(block.hash)
                tier = MEMORY if position < 6 else DISK
                parent = keys[block.hash].parent
                assert block == BlockInfo(block.hash, parent, 4, tier, 0, position == 1, "me")
            some = await listing(address, prefix=hashes[3][:2])
            assert hashes[3] in [block.hash for block in some.blocks]
            assert all(block.hash.startswith(hashes[3][:2]) for block in some.blocks)
            assert some.total == 12
            assert (await listing(address, limit=0)).blocks == ()

    run(body())


def test_a_page_of_nothing_but_bad_files_is_not_taken_for_the_end(tmp_path: Path) -> None:
    async def body() -> None:
        async with store(8, disk=tmp_path) as (address, server):
            hashes = await keep(address, 0, 6)
            await on_disk(address, 6)
            only_on_disk(server, hashes)
            for name in sorted(hashes)[:4]:
                path = file_of(tmp_path, name)
                path.write_bytes(b"\0" * path.stat().st_size)
            page = await listing(address, limit=2)
            assert [block.hash for block in page.blocks] == sorted(hashes)[4:]
            assert (await listing(address)).total == 2

    run(body())


def test_pinned_blocks_survive_pressure_and_the_answer_says_how_many_took() -> None:
    async def body() -> None:
        async with store(16) as (address, _):
            hashes = await keep(address, 0, 6)
            coming = hashes_for(8, chain=5)
            assert await ask(address, "Pin", Pin(tuple(hashes[:2]), True)) == Count(2)
            assert await ask(address, "Pin", Pin((*coming, *hashes), True)) == Count(4), "a quarter of the slabs"
            await keep(address, 5, 2)
            for chain in range(10, 20):
                await keep(address, chain, 10)
            assert await find(address, hashes) == [MEMORY] * 2
            assert await find(address, coming) == [MEMORY] * 2, "pinned before it came"
            assert (await stat(address)).pinned == 4
            assert await ask(address, "Pin", Pin((*coming, *hashes), False)) == Count(8)
            for chain in range(20, 24):
                await keep(address, chain, 10)
            assert await find(address, hashes) == await find(address, coming) == []

    run(body())


def test_dropping_forgets_in_every_tier_but_not_what_is_in_use(tmp_path: Path) -> None:
    async def body() -> None:
        async with store(12, disk=tmp_path) as (address, server), writer(address) as w:
            hashes = await keep(address, 0, 8)
            await on_disk(address, 8)
            only_on_disk(server, hashes[4:])
            await w.reserve("t", keys_for(8), 8, 30_000)  # blocks 0 and 1 are in use
            assert await ask(address, "Drop", Drop((*hashes, *hashes_for(4, chain=9)))) == Count(6)
            assert await find(address, hashes) == [MEMORY] * 2
            s = await stat(address)
            assert (s.held, s.disk_blocks) == (2, 2)
            assert names_in(tmp_path) == {name.hex() for name in hashes[:2]}
            await w.revoke("t", "test")
            assert await ask(address, "Drop", Drop(tuple(hashes))) == Count(2)
            assert (await listing(address)).total == 0
            assert (await stat(address)).free == 12

    run(body())


def test_verifying_finds_what_is_wrong_in_either_tier_and_drops_just_that(tmp_path: Path) -> None:
    async def body() -> None:
        async with store(24, disk=tmp_path) as (address, server):
            hashes = await keep(address, 0, 20)
            await on_disk(address, 20)
            assert await ask(address, "Verify", Verify((*hashes, *hashes_for(8, chain=3)))) == Count(0)
            only_on_disk(server, hashes[10:])
            arena = server._arena
            (slab,) = [i for i in range(arena.slabs) if (arena.slab(i) == block_of(3)).all()]
            arena.slab(slab)[0] ^= 1
            path = file_of(tmp_path, hashes[12])
            path.write_bytes(path.read_bytes()[:-1])
            assert await ask(address, "Verify", Verify(tuple(hashes))) == Count(2)
            assert await find(address, hashes) == [MEMORY] * 3 + [DISK] + [MEMORY] * 6 + [DISK] * 2
            assert (await stat(address)).corrupt_total == 2
            assert await fetched(address, hashes[:12], 0) == 12, "the good copy of block 3 is on the disk"
            await until(lambda: quiet(address), "nothing is held")

    run(body())


def test_a_block_under_a_wrong_name_is_found_by_verifying() -> None:
    async def body() -> None:
        async with store(8) as (address, _), writer(address) as w:
            right, other = keys_for(8)
            wrong = BlockKey(right.hash, 4, right.parent, other.ids)
            await w.store([wrong, BlockKey(other.hash, 4)], [0, 1], "")
            names = (right.hash, other.hash)
            assert await ask(address, "Verify", Verify(names)) == Count(1), "without ids there is nothing to check"
            assert await find(address, names) == []
            assert await find(address, names[1:]) == [MEMORY]

    run(body())


def test_operators_and_readers_at_once_agree_in_the_end(tmp_path: Path) -> None:
    """List, Verify, Drop, Pin, Find, Fetch and writers, at random and at once: answers stay right, slabs add up."""

    async def body() -> None:
        rng = random.Random(11)
        async with store(24, disk=tmp_path, disk_blocks=40) as (address, server):
            chains = {chain: hashes_for(32, chain) for chain in range(8)}

            async def act(step: int) -> None:
                chain = rng.randrange(8)
                hashes = chains[chain]
                match step % 7:
                    case 0 | 1:
                        await keep(address, chain, 8)
                    case 2 | 3:
                        await fetched(address, hashes, chain)
                    case 4:
                        assert await ask(address, "Verify", Verify(tuple(hashes))) == Count(0)
                    case 5:
                        names = [block.hash for block in (await listing(address)).blocks]
                        assert names == sorted(set(names))
                    case 6:
                        await ask(address, "Drop", Drop(tuple(rng.sample(hashes, 3))))
                        await ask(address, "Pin", Pin(tuple(hashes[:1]), rng.random() < 0.5))

            for start in range(0, 140, 7):
                results = await asyncio.gather(*(act(step) for step in range(start, start + 7)), return_exceptions=True)
                for error in results:
                    assert error is None or type(error).__name__ == "NoSpace", repr(error)
                server._ledger.slabs.check()
            await until(lambda: quiet(address), "nothing is held")
            s = await stat(address)
            assert s.disk_blocks <= 40
            assert s.corrupt_total == 0
            assert server._tiers.disk is not None
            assert names_in(tmp_path) == {name.hex() for name in server._tiers.disk.names()}

    run(body())


# ---------------------------------------------------------------------------------------------- tenants, restarts
def test_a_tenant_fills_only_its_share_and_evicts_only_itself() -> None:
    async def body() -> None:
        async with store(16, tenant_share=0.25) as (address, _):
            modest = await keep(address, 0, 3, tenant="modest")
            for chain in range(1, 9):
                await keep(address, chain, 4, tenant="greedy")
            assert await find(address, modest) == [MEMORY] * 3
            assert await find(address, hashes_for(16, chain=8)) == [MEMORY] * 4
            s = await stat(address)
            assert (s.cached, s.evictions_total) == (7, 28)

    run(body())


def test_a_stop_writes_what_is_only_in_memory(tmp_path: Path) -> None:
    async def body() -> None:
        async with store(16, disk=tmp_path) as (address, _), writer(address) as w:
            hashes = await keep(address, 0, 12)
            await w.reserve("t", keys_for(8, chain=1), 8, 30_000)
            await w.send("t", [(0, 1000), (1, 1001)])  # in use until the end
        async with store(16, disk=tmp_path) as (address, _):
            assert await find(address, hashes) == [DISK] * 12
            assert await fetched(address, hashes, 0) == 12
            assert await fetched(address, hashes_for(8, chain=1), 1) == 2

    run(body())


def test_a_store_whose_disk_folder_is_taken_does_not_start_and_leaves_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        async with store(4, disk=tmp_path):
            second = StoreServer(
                "second", LAYOUT, memory_for(4), Identity("ns", "", SECRET, "127.0.0.1"), tmp_path, 2**20
            )
            with pytest.raises(StartupError, match="folder of its own"):
                await second.start()
            assert not second._arena.path.exists()

    run(body())


def test_the_store_makes_room_by_itself_before_writers_need_it() -> None:
    async def body() -> None:
        async with store(100) as (address, _):
            for chain in range(12):
                await keep(address, chain, 8)
            await until(lambda: roomy(address), "a tenth is free")
            assert await find(address, hashes_for(32, chain=11)) == [MEMORY] * 8

    async def roomy(address: str) -> bool:
        s = await stat(address)
        return s.free >= 10 and s.evictions_total > 0

    run(body())
