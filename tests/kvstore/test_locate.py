"""Where a chain's blocks are: the pure choice among owners, and real stores with a real index."""

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.store_messages import DISK, MEMORY
from kvstore.fetcher import BlockFetcher, Source
from kvstore.index import Index, IndexWriter, Owner
from kvstore.locate import Locator, far_sources, near_sources
from kvstore.redis_server import EmbeddedRedis
from kvstore.slabs import Change
from tests.kvstore.rig import Target, block_of, connections, hashes_for, store, store_process, until, writer

HOLD_MS = 30_000


def owner(name: str) -> Owner:
    return Owner(name, name, 1, 1)


def far(*blocks: str, mapped: str = "") -> list[tuple[str, int, int, str]]:
    """Runs for blocks whose owners are single letters, those in `mapped` on this machine."""
    owners = [[owner(name) for name in block] for block in blocks]
    return [(s.store, s.start, s.stop, s.path) for s in far_sources(10, owners, lambda o: o.address in mapped)]


def test_the_own_store_is_divided_by_tier() -> None:
    tiers = bytes([MEMORY, MEMORY, DISK, MEMORY])
    runs = [("memory", 0, 2), ("disk", 2, 3), ("memory", 3, 4)]
    assert near_sources("s", 7, tiers, mapped=True) == [Source("s", 7, a, b, path) for path, a, b in runs]
    assert [s.path for s in near_sources("s", 7, tiers, mapped=False)] == ["remote", "disk", "remote"]
    assert near_sources("s", 7, b"", mapped=True) == []


def test_the_owner_of_most_of_what_follows_is_chosen() -> None:
    assert far("ab", "ab", "b") == [("b", 10, 13, "remote")]
    assert far("ab", "a", "b") == [("a", 10, 12, "remote"), ("b", 12, 13, "remote")]


def test_an_owner_on_this_machine_goes_first_block_by_block() -> None:
    assert far("ab", "a", "a", mapped="b") == [("b", 10, 11, "memory"), ("a", 11, 13, "remote")]
    assert far("a", "ab", "a", mapped="b") == [
        ("a", 10, 11, "remote"),
        ("b", 11, 12, "memory"),
        ("a", 12, 13, "remote"),
    ]


def test_a_block_that_nobody_has_ends_it() -> None:
    assert far("a", "", "a") == [("a", 10, 11, "remote")]
    assert far("", "a") == []
    assert far() == []


@given(
    st.lists(st.sets(st.sampled_from("abcd")).map(sorted).map("".join), max_size=12), st.sets(st.sampled_from("abcd"))
)
def test_runs_are_consecutive_and_say_what_the_index_says(blocks: list[str], mapped: set[str]) -> None:
    runs = far(*blocks, mapped="".join(mapped))
    covered = [(name, block, path) for name, start, stop, path in runs for block in range(start, stop)]
    length = next((i for i, block in enumerate(blocks) if not block), len(blocks))
    assert [block for _, block, _ in covered] == list(range(10, 10 + length))
    for name, block, path in covered:
        assert name in blocks[block - 10]
        assert (path == "memory") == (name in mapped) == bool(set(blocks[block - 10]) & mapped)


# ------------------------------------------------------------------------------------------- real stores, a real Redis
def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(bounded())


@pytest.fixture
def redis_url() -> Iterator[str]:
    server = EmbeddedRedis()
    try:
        yield server.url
    finally:
        server.close()


async def put(address: str, blocks: int, first: int = 0) -> int:
    async with writer(address) as w:
        handoff = await w.reserve("put", hashes_for(4 * blocks)[first:], 4 * (blocks - first), HOLD_MS)
        await w.send("put", [(i, first + i) for i in range(blocks - first)])
        await w.finish("put", None)
        await w.revoke("put", "it is in the cache")
        return handoff.epoch


async def located(locator: Locator, near: str, epoch: int | None, blocks: int = 8) -> list[tuple[str, int, int, str]]:
    return [(s.store, s.start, s.stop, s.path) for s in await locator.locate(hashes_for(4 * blocks), near, epoch)]


def test_the_own_store_is_asked_without_an_index() -> None:
    async def body() -> None:
        async with store(8) as (near, _), connections() as shared:
            epoch = await put(near, 3)
            locator = Locator(None, shared)
            for known in (epoch, None):
                await until(lambda k=known: at_last(locator, near, k), "the handshake is over")
            assert await located(locator, near, epoch + 1) == []
            assert await located(locator, "", None) == []
            assert await locator.locate([], near, epoch) == []
            assert await located(locator, "127.0.0.1:1", None) == []

    async def at_last(locator: Locator, near: str, epoch: int | None) -> bool:
        return await located(locator, near, epoch) == [(near, 0, 3, "memory")]

    run(body())


def test_what_the_own_store_lacks_is_looked_up_and_can_be_fetched(redis_url: str) -> None:
    async def body() -> None:
        async with (
            store(8) as (near, _),
            store_process(8, redis_url=redis_url) as (other, _, _),
            connections() as shared,
        ):
            epoch = await put(near, 3)
            await put(other, 8, first=2)
            index = Index(redis_url, "ns")
            locator = Locator(index, shared)
            expected = [(near, 0, 3, "memory"), (other, 3, 8, "remote")]
            await until(lambda: at_last(locator, near, epoch, expected), "published")
            sources = await locator.locate(hashes_for(32), near, epoch)
            fetcher, target = BlockFetcher(shared), Target()
            fetched = await fetcher.fetch(sources, hashes_for(32), target, 20)
            assert (fetched.valid_blocks, fetched.error) == (8, None)
            assert all((target.blocks[i] == block_of(i)).all() for i in range(8))
            # connected by now, so known to be on this machine
            assert await located(locator, near, epoch) == [expected[0], (*expected[1][:3], "memory")]
            await index.close()

    async def at_last(locator: Locator, near: str, epoch: int, expected: list[tuple[str, int, int, str]]) -> bool:
        return await located(locator, near, epoch) == expected

    run(body())


def test_an_index_that_lies_or_is_dead_costs_misses(redis_url: str) -> None:
    async def body() -> None:
        async with store(8) as (near, _), connections() as shared:
            epoch = await put(near, 3)
            index, hashes = Index(redis_url, "ns"), hashes_for(32)
            liar = IndexWriter(redis_url, "ns", "liar", 5, near)  # a living store's address, another epoch
            await liar.claim()
            assert await liar.publish([Change(name, 1, True) for name in hashes])
            locator, fetcher, target = Locator(index, shared), BlockFetcher(shared), Target()
            expected = [(near, 0, 3, "memory"), (near, 3, 8, "remote")]
            await until(lambda: at_last(locator, near, epoch, expected), "the lie is told")
            fetched = await fetcher.fetch(await locator.locate(hashes, near, epoch), hashes, target, 20)
            assert fetched.valid_blocks == 3
            assert all((target.blocks[i] == block_of(i)).all() for i in range(3))
            await liar.close()
            await index.close()
            dead = Index("redis://127.0.0.1:1/0", "ns")
            assert await located(Locator(dead, shared), near, epoch) == expected[:1]
            await dead.close()

    async def at_last(locator: Locator, near: str, epoch: int, expected: list[tuple[str, int, int, str]]) -> bool:
        return await located(locator, near, epoch) == expected

    run(body())


def test_a_store_that_is_avoided_is_not_named(redis_url: str) -> None:
    async def body() -> None:
        async with connections() as shared:
            hashes = hashes_for(16)
            for name in ("one", "two"):
                w = IndexWriter(redis_url, "ns", name, 5, f"{name}:1")
                await w.claim()
                assert await w.publish([Change(h, 1, True) for h in hashes[: 4 if name == "one" else 2]])
                await w.close()
            index = Index(redis_url, "ns")
            locator = Locator(index, shared)
            await until(lambda: at_last(locator, [("one:1", 0, 4, "remote")]), "both are published")
            for _ in range(3):
                shared.reputation.corrupt("one:1", asyncio.get_running_loop().time())
            assert await located(locator, "", None, 4) == [("two:1", 0, 2, "remote")]
            await index.close()

    async def at_last(locator: Locator, expected: list[tuple[str, int, int, str]]) -> bool:
        return await located(locator, "", None, 4) == expected

    run(body())
