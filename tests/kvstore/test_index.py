"""The index on a real Redis: it finds what live stores have, and no failure of it is worse than a miss."""

import asyncio
import contextlib
import hashlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from cluster.errors import Unavailable
from kvstore import index as index_module
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


def test_what_others_wrote_into_the_index_is_passed_over(server: EmbeddedRedis, client: Any) -> None:
    async def body(rig: Rig) -> None:
        a = await rig.store("a", 1)
        await a.publish(changes(CHAIN[:2], 5))
        client.hset("tandem:{ns}:stores", mapping={"x": "nonsense", "y": b"\xff 1 2", "z": "1 99999999999999"})
        client.hset(b"tandem:{ns}:b:" + CHAIN[0], mapping={"x": "1 1", "y": "??", "a2": "", "z": "1 1"})
        assert await rig.find(CHAIN) == [(Owner("a", "a:1", 1, 5),)] * 2
        assert (await a.heartbeat())[0] is Standing.CURRENT
        client.hset("tandem:{ns}:stores", b"\xff", "1 99999999999999 h:1")
        client.hset(b"tandem:{ns}:b:" + CHAIN[0], b"\xff", "1 1")
        assert await rig.index.lookup(CHAIN) == [], "a name that is no text: a miss, not an exception"

    run(server.url, body)


def test_a_redis_that_lost_a_part_says_so(server: EmbeddedRedis, client: Any) -> None:
    """As after a fail-over to a replica that lagged behind, or when others began to reap one that came back."""

    async def body(rig: Rig) -> None:
        a = await rig.store("a", 1)
        await a.publish(changes(CHAIN))
        await a.publish(changes(CHAIN[:3]))  # again: counted once
        await a.unpublish(CHAIN[5:])
        assert (await a.heartbeat())[0] is Standing.CURRENT
        client.srem("tandem:{ns}:own:a", CHAIN[4])
        client.hdel(b"tandem:{ns}:b:" + CHAIN[4], "a")
        assert (await a.heartbeat())[0] is Standing.FORGOTTEN
        assert await a.publish(changes(CHAIN[:5]))
        assert (await a.heartbeat())[0] is Standing.CURRENT
        assert len(await rig.find(CHAIN)) == 5

    run(server.url, body)


def test_a_store_that_leaves_clears_up_behind_itself(server: EmbeddedRedis, client: Any) -> None:
    async def body(rig: Rig) -> None:
        a, b = await rig.store("a", 1), await rig.store("b", 2)
        await a.publish(changes(CHAIN))
        await b.publish(changes(CHAIN[:2]))
        await a.leave()
        assert await rig.find(CHAIN) == [(Owner("b", "b:1", 2, 1),)] * 2
        assert len(client.keys("tandem:{ns}:b:*")) == 2
        assert client.exists("tandem:{ns}:own:a") == 0
        assert client.hkeys("tandem:{ns}:stores") == [b"b"]
        assert (await b.heartbeat()) == (Standing.CURRENT, [])

    run(server.url, body)


def test_what_a_leaving_store_has_no_time_for_is_reaped_by_the_others(
    server: EmbeddedRedis, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "LEAVE_S", 0.0)

    async def body(rig: Rig) -> None:
        a, b = await rig.store("a", 1), await rig.store("b", 2)
        await a.publish(changes(CHAIN))
        await a.leave()
        assert await rig.find(CHAIN) == [], "not found from now on"
        assert client.scard("tandem:{ns}:own:a") == len(CHAIN)
        assert (await b.heartbeat())[1] == ["a"], "at once, not after the grace for one that may come back"
        await b.reap("a")
        assert client.keys("tandem:{ns}:b:*") == []
        assert client.hkeys("tandem:{ns}:stores") == [b"b"]

    run(server.url, body)


def test_an_old_start_that_leaves_does_not_hide_the_new_one(server: EmbeddedRedis) -> None:
    async def body(rig: Rig) -> None:
        old = await rig.store("a", 1)
        new = await rig.store("a", 2)
        await new.publish(changes(CHAIN))
        await old.leave()
        assert len(await rig.find(CHAIN)) == len(CHAIN)

    run(server.url, body)


def test_a_namespace_that_nobody_serves_keeps_no_events(server: EmbeddedRedis, client: Any) -> None:
    async def body(rig: Rig) -> None:
        a = await rig.store("a", 1)
        await a.publish(changes(CHAIN))
        await a.heartbeat()
        for name in ("events", "sequence"):
            assert 0 < client.pttl(f"tandem:{{ns}}:{name}") <= index_module.EVENTS_MS

    run(server.url, body)


def test_a_store_cut_off_from_redis_is_invisible_after_a_while_and_back_after_a_heartbeat(
    server: EmbeddedRedis, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 20, and what is left of it when others have reaped it meanwhile."""
    monkeypatch.setattr(index_module, "TTL_MS", 100)

    async def body(rig: Rig) -> None:
        a = await rig.store("a", 1)
        await a.publish(changes(CHAIN))
        # no heartbeat: as if the way to Redis were cut

        async def invisible() -> bool:
            return await rig.find(CHAIN) == []

        await until(invisible, "its time has run out")
        assert client.scard("tandem:{ns}:own:a") == len(CHAIN), "nothing is removed so soon"
        assert (await a.heartbeat())[0] is Standing.CURRENT
        assert len(await rig.find(CHAIN)) == len(CHAIN), "all of it is back, nothing was published again"

    run(server.url, body)


def test_a_long_chain_that_ends_early_is_asked_for_in_steps(
    server: EmbeddedRedis, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "LOOKUP_S", 5.0)
    chain = [hashlib.sha256(b"%d" % i).digest() for i in range(2_000)]

    async def body(rig: Rig) -> None:
        a = await rig.store("a", 1)
        for length in (0, 31, 32, 33, 160, 161, 672, 1_184, 2_000):
            await rig.find(chain)  # the script is loaded with its first use
            for start in range(0, length, BATCH):
                await a.publish(changes(chain[start : min(start + BATCH, length)]))
            before = calls(client)
            assert len(await rig.find(chain)) == length
            steps = calls(client) - before
            assert steps <= 7, "at most 32 + 128 + 512 + ... at a time"
            assert length >= 32 or steps == 1

    run(server.url, body)


def test_a_lookup_that_runs_out_of_time_keeps_what_it_has(
    server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline is one for all steps, and a long chain that uses it up is no sign of trouble."""

    async def body(rig: Rig) -> None:
        a = await rig.store("a", 1)
        chain = [hashlib.sha256(b"%d" % i).digest() for i in range(600)]
        for start in range(0, len(chain), BATCH):
            await a.publish(changes(chain[start : start + BATCH]))
        assert len(await rig.find(chain)) == len(chain)
        link, answer = rig.index._link, rig.index._link.script
        asked = 0

        async def stops_after_the_first(*arguments: Any) -> Any:
            nonlocal asked
            asked += 1
            if asked > 1:
                os.kill(server.pid, signal.SIGSTOP)
            return await answer(*arguments)

        monkeypatch.setattr(index_module, "LOOKUP_S", 0.5)
        monkeypatch.setattr(link, "script", stops_after_the_first)
        try:
            assert len(await rig.index.lookup(chain)) == 32
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert rig.index._closed_until == 0.0

    run(server.url, body)


def test_a_redis_that_is_slow_to_connect_to_is_used_once_it_is_connected(server: EmbeddedRedis) -> None:
    """As over TLS from another site: no lookup can wait for a connection, so one is made behind its back."""
    port = urlsplit(server.url).port
    assert port

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65_536):
                sink.write(data)
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)  # the handshakes
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

    async def body(rig: Rig) -> None:
        a = await rig.store("a", 1)
        await a.publish(changes(CHAIN))
        assert len(await rig.find(CHAIN)) == len(CHAIN)  # the script is loaded
        slow = await asyncio.start_server(serve, "127.0.0.1", 0)
        own_port = slow.sockets[0].getsockname()[1]
        index = Index(server.url.replace(f":{port}/", f":{own_port}/"), "ns")
        assert await index.lookup(CHAIN) == []

        async def found() -> bool:
            index._closed_until = min(index._closed_until, time.monotonic() + 0.4)  # less than a breaker's second
            return len(await index.lookup(CHAIN)) == len(CHAIN)

        await until(found, "a lookup uses the connection")
        await index.close()
        slow.close()

    run(server.url, body)


def calls(client: Any) -> int:
    return int(client.info("commandstats")["cmdstat_evalsha"]["calls"])


def test_events_tell_what_came_and_went(server: EmbeddedRedis, client: Any) -> None:
    async def body(rig: Rig) -> None:
        a = await rig.store("a", 1)
        await a.publish(changes(CHAIN[:2]))
        await a.unpublish(CHAIN[:1])
        await rig.store("a", 2)
        events = [dict(fields) for _, fields in client.xrange("tandem:{ns}:events")]
        assert [int(event[b"n"]) for event in events] == [1, 2, 3], "numbered without a gap"
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
