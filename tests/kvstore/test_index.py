"""The index on a real Redis: it finds what live stores have, and no failure of it is worse than a miss."""

import asyncio
import hashlib
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import redis

from cluster.errors import Unavailable
from kvstore.index import BATCH, Index, IndexWriter, Owner, Standing
from kvstore.redis_server import EmbeddedRedis
from kvstore.slabs import Change
from tests.kvstore.rig import until

CHAIN = [hashlib.sha256(bytes([i])).digest() for i in range(6)]


@pytest.fixture
def server() -> Iterator[EmbeddedRedis]:
    made = EmbeddedRedis()
    yield made
    made.close()


@pytest.fixture
def client(server: EmbeddedRedis) -> Iterator[Any]:
    with redis.Redis.from_url(server.url) as made:
        yield made


def changes(hashes: list[bytes], generation: int = 1) -> list[Change]:
    return [Change(name, generation, True) for name in hashes]


class Rig:
    def __init__(self, url: str) -> None:
        self.url = url
        self.index = Index(url, "ns")
        self.writers: list[IndexWriter] = []

    async def store(self, name: str, epoch: int) -> IndexWriter:
        made = IndexWriter(self.url, "ns", name, epoch, f"{name}:1")
        self.writers.append(made)
        await made.claim()
        return made

    async def find(self, hashes: list[bytes]) -> list[tuple[Owner, ...]]:
        """A lookup that may be slow: this machine is shared, and 20 ms is not what these tests are about."""
        found: list[tuple[Owner, ...]] = []

        async def answered() -> bool:
            self.index._closed_until = 0.0
            found[:] = await self.index.lookup(hashes)
            return self.index._closed_until == 0.0

        await until(answered, "Redis answers a lookup")
        return found

    async def close(self) -> None:
        await self.index.close()
        for made in self.writers:
            await made.close()


def run(url: str, test: Callable[[Rig], Awaitable[None]]) -> None:
    async def body() -> None:
        rig = Rig(url)
        try:
            async with asyncio.timeout(60):
                await test(rig)
        finally:
            await rig.close()

    asyncio.run(body())


def test_the_longest_prefix_that_live_stores_have(server: EmbeddedRedis) -> None:
    async def body(rig: Rig) -> None:
        a, b = await rig.store("a", 2**52 - 1), await rig.store("b", 22)
        assert await rig.find(CHAIN) == []
        assert await a.publish(changes(CHAIN[:2], 5))
        assert await b.publish(changes(CHAIN[1:3] + CHAIN[4:], 6))
        one, two = Owner("a", "a:1", 2**52 - 1, 5), Owner("b", "b:1", 22, 6)
        found = await rig.find(CHAIN)
        assert [set(owners) for owners in found] == [{one}, {one, two}, {two}]
        assert await rig.find(CHAIN[2:]) == [(two,)]
        assert await rig.find([]) == []
        assert await a.unpublish(CHAIN[:1]) == 1
        assert await a.unpublish(CHAIN[:1]) == 0
        assert await rig.find(CHAIN) == []

    run(server.url, body)


def test_more_blocks_than_a_script_takes(server: EmbeddedRedis) -> None:
    async def body(rig: Rig) -> None:
        chain = [hashlib.sha256(b"%d" % i).digest() for i in range(2 * BATCH + 10)]
        a = await rig.store("a", 1)
        for start in range(0, len(chain), BATCH):
            assert await a.publish(changes(chain[start : start + BATCH]))
        assert len(await rig.find(chain)) == len(chain)
        await a.unpublish([chain[BATCH + 3]])
        assert len(await rig.find(chain)) == BATCH + 3

    run(server.url, body)


def test_a_store_that_restarted_has_nothing_until_it_says_so(server: EmbeddedRedis, client: Any) -> None:
    async def body(rig: Rig) -> None:
        old = await rig.store("a", 1)
        await old.publish(changes(CHAIN))
        new = await rig.store("a", 2)
        assert await rig.find(CHAIN) == []
        assert client.keys("tandem:{ns}:b:*") == [], "its old entries are gone, not only hidden"
        assert client.exists("tandem:{ns}:own:a") == 0
        assert not await old.publish(changes(CHAIN)), "the old start is fenced"
        assert (await old.heartbeat())[0] is Standing.REPLACED
        await new.publish(changes(CHAIN[:1], 9))
        assert await old.unpublish(CHAIN[:1]) == 0, "and cannot withdraw what the new one has"
        assert await rig.find(CHAIN) == [(Owner("a", "a:1", 2, 9),)]

    run(server.url, body)


def test_a_lying_entry_is_not_found(server: EmbeddedRedis, client: Any) -> None:
    async def body(rig: Rig) -> None:
        await rig.store("a", 1)
        client.hset(b"tandem:{ns}:b:" + CHAIN[0], mapping={"a": "99 1", "ghost": "1 1"})
        assert await rig.find(CHAIN) == []

    run(server.url, body)


def test_dead_stores_are_invisible_and_then_reaped_by_the_living(server: EmbeddedRedis, client: Any) -> None:
    async def body(rig: Rig) -> None:
        a, b = await rig.store("a", 1), await rig.store("b", 2)
        await a.publish(changes(CHAIN))
        await b.publish(changes(CHAIN[:2]))
        client.hset("tandem:{ns}:stores", "a", "1 1000 a:1")  # as if a had said nothing since 1970
        assert await rig.find(CHAIN) == [(Owner("b", "b:1", 2, 1),)] * 2
        standing, dead = await b.heartbeat()
        assert (standing, dead) == (Standing.CURRENT, ["a"])
        await b.reap("a")
        assert len(client.keys("tandem:{ns}:b:*")) == 2
        assert not client.hexists("tandem:{ns}:stores", "a")
        assert (await a.heartbeat())[0] is Standing.FORGOTTEN, "if it comes back, it knows what to do"

    run(server.url, body)


def test_reaping_spares_a_store_that_is_alive(server: EmbeddedRedis) -> None:
    async def body(rig: Rig) -> None:
        a, b = await rig.store("a", 1), await rig.store("b", 2)
        await a.publish(changes(CHAIN))
        await b.reap("a")
        assert len(await rig.find(CHAIN)) == len(CHAIN)
        assert a is not b

    run(server.url, body)


def test_a_redis_that_lost_its_data_says_so(server: EmbeddedRedis, client: Any) -> None:
    async def body(rig: Rig) -> None:
        a = await rig.store("a", 1)
        assert (await a.heartbeat())[0] is Standing.CURRENT
        client.flushall()
        assert not await a.publish(changes(CHAIN)), "not before Redis knows the store again"
        assert (await a.heartbeat())[0] is Standing.FORGOTTEN
        assert (await a.heartbeat())[0] is Standing.CURRENT
        assert await a.publish(changes(CHAIN))
        await a.leave()
        assert await rig.find(CHAIN) == []

    run(server.url, body)


def test_events_tell_what_came_and_went(server: EmbeddedRedis, client: Any) -> None:
    async def body(rig: Rig) -> None:
        a = await rig.store("a", 1)
        await a.publish(changes(CHAIN[:2]))
        await a.unpublish(CHAIN[:1])
        await rig.store("a", 2)
        events = [dict(fields) for _, fields in client.xrange("tandem:{ns}:events")]
        assert [event.get(b"put") for event in events] == [CHAIN[0] + CHAIN[1], None, None]
        assert [event.get(b"del") for event in events] == [None, CHAIN[0], CHAIN[1]]
        assert all(event[b"store"] == b"a" for event in events)

    run(server.url, body)


def test_a_dead_redis_is_a_miss_for_readers_and_an_error_for_writers(server: EmbeddedRedis) -> None:
    async def body(rig: Rig) -> None:
        a = await rig.store("a", 1)
        await a.publish(changes(CHAIN))
        server.close()
        assert await rig.index.lookup(CHAIN) == []
        for call in (a.heartbeat(), a.publish(changes(CHAIN)), a.unpublish(CHAIN), a.leave(), a.reap("a")):
            with pytest.raises(Unavailable):
                await call

    run(server.url, body)


def test_after_a_slow_answer_the_breaker_spares_the_next_lookups(server: EmbeddedRedis) -> None:
    async def body(rig: Rig) -> None:
        a = await rig.store("a", 1)
        await a.publish(changes(CHAIN))
        assert len(await rig.find(CHAIN)) == len(CHAIN)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            assert await rig.index.lookup(CHAIN) == []
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert await rig.index.lookup(CHAIN) == [], "not asked, though it would answer now"
        assert len(await rig.find(CHAIN)) == len(CHAIN)

    run(server.url, body)
