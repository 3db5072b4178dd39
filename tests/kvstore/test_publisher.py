"""A store and its index together: what is sealed can be found, whatever happens to Redis meanwhile."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from cluster.membership import Membership
from kvstore import publisher
from kvstore.index import Index
from kvstore.redis_server import EmbeddedRedis
from tests.kvstore.rig import Target, hashes_for, keep, reader, store, until, writer


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "HEARTBEAT_S", 0.1)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


async def found(url: str, hashes: list[bytes], count: int) -> None:
    """Wait until that many blocks of the chain are found."""
    index = Index(url, "ns")

    async def there() -> bool:
        index._closed_until = 0.0
        return len(await index.lookup(hashes)) == count

    await until(there, f"{count} of {len(hashes)} blocks are found")
    await index.close()


async def hand_over(address: str, name: str, tokens: int, chain: int) -> None:
    async with writer(address) as w, reader() as r:
        handoff = await w.reserve(name, hashes_for(tokens, chain), tokens, 30_000)
        await w.send(name, [(i, i) for i in range(-(-tokens // 4))])
        await w.finish(name, 1)
        assert (await r.receive(handoff, 0, tokens, Target(), 20)).error is None


def test_sealed_blocks_are_published_and_evicted_ones_withdrawn(server: EmbeddedRedis) -> None:
    async def body() -> None:
        async with store(6, redis_url=server.url) as (address, _):
            await hand_over(address, "a", 18, 0)
            await found(server.url, hashes_for(16), 4)
            index = Index(server.url, "ns")
            await until(lambda: named(index, address), "with the store's address")
            await index.close()
            await hand_over(address, "b", 18, 1)
            await found(server.url, hashes_for(16, 1), 4)
            await found(server.url, hashes_for(16), 1)
            members = Membership(server.url)
            _, stores = await members.members("ns")
            assert [s.address for s in stores] == [address]
        await found(server.url, hashes_for(16, 1), 0)
        assert await members.members("ns") == ([], [])
        await members.close()

    async def named(index: Index, address: str) -> bool:
        index._closed_until = 0.0
        owners = await index.lookup(hashes_for(4))
        return bool(owners) and owners[0][0].address == address

    run(body)


def test_a_redis_that_lost_its_data_is_told_everything_again(server: EmbeddedRedis) -> None:
    async def body() -> None:
        async with store(8, redis_url=server.url) as (address, _):
            await hand_over(address, "a", 16, 0)
            await found(server.url, hashes_for(16), 4)
            with redis.Redis.from_url(server.url) as client:
                client.flushall()
            await found(server.url, hashes_for(16), 4)

    run(body)


def test_the_store_serves_without_redis_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        with caplog.at_level(logging.INFO):
            async with store(8, redis_url="redis://127.0.0.1:1/0") as (address, server):
                await hand_over(address, "a", 16, 0)
                task: Any = server._publisher and server._publisher._task
                await until(lambda: bool(warnings()), "it has noticed")
                await hand_over(address, "b", 16, 1)
                await asyncio.wait([task], timeout=0.5)  # several heartbeats fail
                assert not task.done()
        assert len(warnings()) == 1

    def warnings() -> list[str]:
        return [r.message for r in caplog.records if "goes on without its index" in r.message]

    run(body)


def test_changes_during_an_outage_are_made_up_for(server: EmbeddedRedis) -> None:
    async def body() -> None:
        async with store(8, redis_url=server.url) as (address, _):
            await hand_over(address, "a", 16, 0)
            await found(server.url, hashes_for(16), 4)
            with redis.Redis.from_url(server.url) as client:
                client.execute_command("CLIENT", "PAUSE", 2500)  # longer than the publisher waits for an answer
            await hand_over(address, "b", 16, 1)
            await hand_over(address, "c", 16, 2)
            await found(server.url, hashes_for(16, 2), 4)
            await found(server.url, hashes_for(16, 1), 4)
            await found(server.url, hashes_for(16), 0)

    run(body)


def test_a_store_that_starts_with_a_full_disk_publishes_all_of_it(
    server: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little may wait for Redis otherwise."""
    monkeypatch.setattr(publisher, "MAX_PENDING", 4)
    monkeypatch.setattr(publisher, "BATCH", 8)

    async def body() -> None:
        async with store(40, disk=tmp_path) as (address, _):
            await keep(address, 0, 30)
        async with store(40, redis_url=server.url, disk=tmp_path):
            await found(server.url, hashes_for(120), 30)

    run(body)
