"""The routers' copy of the index: equal to it after whatever happened, and harmless while Redis is away."""

import asyncio
import hashlib
import os
import random
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import redis

from kvstore import index as index_module
from kvstore import mirror as mirror_module
from kvstore.index import BATCH, IndexWriter, Standing
from kvstore.mirror import Mirror
from kvstore.prefix_map import PrefixMap
from kvstore.redis_server import EmbeddedRedis
from kvstore.slabs import Change
from tests.kvstore.rig import prefixes, until

CHAIN = [hashlib.sha256(b"%d" % i).digest() for i in range(2_000)]
Truth = dict[bytes, tuple[str, ...]]


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    made = EmbeddedRedis()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "BLOCK_MS", 50)
    monkeypatch.setattr(mirror_module, "LINK_S", 0.5)
    monkeypatch.setattr(mirror_module, "RETRY_S", 0.02)


class Rig:
    """Stores that publish, and a mirror that follows."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client: Any = redis.Redis.from_url(url)
        self.client.flushall()
        self.map = PrefixMap()
        self.worker = self.map.join()  # somebody else who feeds the same map
        self.mirror = Mirror(url, "ns", self.map)
        self.stores: dict[str, IndexWriter] = {}
        self.published: dict[str, set[bytes]] = {}  # store -> what it would say that it has
        self._epochs = iter(range(1, 10_000))

    async def store(self, name: str) -> None:
        """A new start of a store."""
        if name in self.stores:
            await self.stores[name].close()
        self.stores[name] = IndexWriter(self.url, "ns", name, next(self._epochs), f"{name}:1")
        self.published[name] = set()
        await self.stores[name].claim()

    async def publish(self, name: str, hashes: list[bytes]) -> None:
        for start in range(0, len(hashes), BATCH):
            assert await self.stores[name].publish([Change(h, 1, True) for h in hashes[start : start + BATCH]])
        self.published[name] |= set(hashes)

    async def unpublish(self, name: str, hashes: list[bytes]) -> None:
        await self.stores[name].unpublish(hashes)
        self.published[name] -= set(hashes)

    async def beat(self) -> None:
        """As the publishers do: whoever was forgotten publishes again."""
        for name, writer in self.stores.items():
            standing, dead = await writer.heartbeat()
            if standing is Standing.FORGOTTEN:
                await self.publish(name, sorted(self.published[name]))
            for gone in dead:
                await writer.reap(gone)

    def truth(self) -> Truth:
        prefix = b"tandem:{ns}:b:"
        keys = list(self.client.scan_iter(match=prefix + b"*"))
        return {k.removeprefix(prefix): tuple(sorted(f.decode() for f in self.client.hkeys(k))) for k in keys}

    async def level(self) -> None:
        """Wait until the mirror says what Redis says."""
        truth = self.truth()
        known = set(truth) | set(CHAIN)
        await until(
            lambda: (
                {h: o for h in known if (o := self.mirror.owners(h))} == truth
                and self.mirror.stat().blocks == sum(map(len, truth.values()))
            ),
            "the mirror equals the index",
        )

    def prefix(self, hashes: list[bytes]) -> dict[str, int]:
        return prefixes(self.mirror, self.map, hashes)

    async def snapshots(self, count: int) -> None:
        await until(lambda: self.mirror.stat().snapshots_total >= count, f"snapshot {count}")

    async def close(self) -> None:
        await self.mirror.close()
        for writer in self.stores.values():
            await writer.close()
        self.client.close()


def run(url: str, test: Callable[[Rig], Awaitable[None]]) -> None:
    async def body() -> None:
        rig = Rig(url)
        try:
            async with asyncio.timeout(60):
                await test(rig)
        finally:
            await rig.close()

    asyncio.run(body())


# ----------------------------------------------------------------------------------------------------------- following
def test_snapshot_then_events(server: EmbeddedRedis) -> None:
    async def body(rig: Rig) -> None:
        await rig.store("a")
        await rig.publish("a", CHAIN)  # several pages of the own-set
        await rig.mirror.start()
        await rig.snapshots(1)
        await rig.level()
        assert rig.prefix(CHAIN) == {"a": 2000}
        await rig.store("b")
        await rig.publish("b", CHAIN[:10])
        await rig.unpublish("a", CHAIN[5:6])
        await rig.level()
        assert rig.prefix(CHAIN) == {"a": 5, "b": 10}
        stat = rig.mirror.stat()
        assert (stat.snapshots_total, stat.gaps_total, stat.events_total) == (1, 0, 2)
        await until(lambda: rig.mirror.stat().behind_s < 0.5, "it knows that it has seen everything")

    run(server.url, body)


def test_a_store_is_an_owner_for_as_long_as_it_has_blocks(server: EmbeddedRedis) -> None:
    async def body(rig: Rig) -> None:
        await rig.mirror.start()
        await rig.snapshots(1)
        await rig.store("a")
        assert rig.mirror.stores() == ()
        await rig.publish("a", CHAIN[:3])
        await rig.level()
        ((store, owner),) = rig.mirror.stores()
        assert store == "a"
        assert rig.map.owners(CHAIN[2]) == (owner,)
        await rig.unpublish("a", CHAIN[:3])
        await rig.level()
        assert rig.mirror.stores() == ()

    run(server.url, body)


def test_a_snapshot_that_fails_leaves_nothing_behind(server: EmbeddedRedis) -> None:
    """What was known before stands meanwhile."""

    async def body(rig: Rig) -> None:
        for name in ("a", "b"):
            await rig.store(name)
            await rig.publish(name, CHAIN[:3])
        rig.client.rename("tandem:{ns}:own:b", "aside")
        rig.client.set("tandem:{ns}:own:b", "no set")
        await rig.mirror.start()

        def failures() -> int:
            return int(rig.client.info("errorstats").get("errorstat_WRONGTYPE", {"count": 0})["count"])

        before = failures()
        await until(lambda: failures() > before + 1, "the second attempt has failed too")
        assert rig.map.owners(CHAIN[0]) == ()
        assert rig.mirror.stores() == ()
        rig.client.rename("aside", "tandem:{ns}:own:b")
        await rig.level()

    run(server.url, body)


def test_an_empty_index_is_no_gap_when_it_fills(server: EmbeddedRedis) -> None:
    async def body(rig: Rig) -> None:
        await rig.mirror.start()
        await rig.snapshots(1)
        await rig.store("a")
        await rig.publish("a", CHAIN[:3])
        await rig.level()
        assert rig.mirror.stat().gaps_total == 0

    run(server.url, body)


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_the_truth_after_anything(server: EmbeddedRedis, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores publish, withdraw, restart, die and are reaped, Redis is flushed and its stream trimmed, at random."""
    monkeypatch.setattr(index_module, "GRACE_MS", -100_000)  # whoever left is reaped by the next to beat
    monkeypatch.setattr(mirror_module, "PAGE", 7)
    monkeypatch.setattr(mirror_module, "EVENTS", 5)
    chance = random.Random(seed)

    async def body(rig: Rig) -> None:
        names = ["a", "b", "c"]
        rig.map.put(rig.worker, CHAIN[:30])
        for name in names:
            await rig.store(name)
        await rig.mirror.start()
        for step in range(120):
            name, hashes = chance.choice(names), chance.sample(CHAIN[:60], chance.randrange(1, 30))
            event = chance.random()
            if event < 0.45:
                await rig.publish(name, hashes)
            elif event < 0.8:
                await rig.unpublish(name, hashes)
            elif event < 0.9:
                await rig.store(name)
            elif event < 0.94:
                rig.client.hset("tandem:{ns}:stores", name, "1 1000 x")  # dead since 1970, and of another epoch
                await rig.stores[chance.choice([n for n in names if n != name])].reap(name)
                await rig.store(name)
            elif event < 0.97:
                rig.client.flushall()
                await rig.beat()
            else:
                rig.client.xtrim("tandem:{ns}:events", maxlen=chance.randrange(3), approximate=False)
            if step % 10 == 0:
                await asyncio.sleep(0)  # let the mirror have a look in between
            if step % 40 == 39:
                await rig.level()
        assert rig.map.count(rig.worker) == rig.map.lookup(CHAIN)[rig.worker] == 30, "others' owners stay as they were"

    run(server.url, body)


def test_a_stream_that_was_trimmed_too_soon_is_a_gap(server: EmbeddedRedis) -> None:
    async def body(rig: Rig) -> None:
        await rig.store("a")
        await rig.mirror.start()
        await rig.snapshots(1)
        pipeline = rig.client.pipeline(transaction=True)  # as if the mirror had been slow: both at once
        pipeline.sadd("tandem:{ns}:own:a", *CHAIN[:9])
        for name in CHAIN[:9]:
            pipeline.hset(b"tandem:{ns}:b:" + name, "a", "1 1")
            pipeline.incr("tandem:{ns}:sequence")
        last = {"n": 9, "put": CHAIN[8], "store": "a"}
        pipeline.xadd("tandem:{ns}:events", last, maxlen=1, approximate=False)
        pipeline.execute()
        await rig.level()
        assert rig.mirror.stat().gaps_total == 1
        assert rig.mirror.stat().snapshots_total == 2

    run(server.url, body)


def test_a_flushed_redis_is_noticed_even_if_nothing_follows(server: EmbeddedRedis) -> None:
    async def body(rig: Rig) -> None:
        await rig.store("a")
        await rig.publish("a", CHAIN[:3])
        await rig.mirror.start()
        await rig.level()
        rig.client.flushall()
        await rig.level()
        assert rig.mirror.owners(CHAIN[0]) == ()
        await rig.beat()
        await rig.level()
        assert rig.prefix(CHAIN[:3]) == {"a": 3}

    run(server.url, body)


def test_a_foreign_event_starts_it_over_and_does_not_stop_it(server: EmbeddedRedis) -> None:
    async def body(rig: Rig) -> None:
        await rig.store("a")
        await rig.mirror.start()
        await rig.snapshots(1)
        rig.client.xadd("tandem:{ns}:events", {"what": "ever"})
        await until(lambda: rig.mirror.stat().gaps_total > 0, "the gap is seen")
        await rig.publish("a", CHAIN[:3])
        await rig.level()

    run(server.url, body)


def test_it_stays_as_it_was_while_redis_is_away_and_then_catches_up() -> None:
    server = EmbeddedRedis()

    async def body(rig: Rig) -> None:
        await rig.store("a")
        await rig.publish("a", CHAIN[:3])
        await rig.mirror.start()
        await rig.level()
        os.kill(server.pid, signal.SIGSTOP)
        try:
            await until(lambda: rig.mirror.stat().behind_s > 1.0, "it does not know any more")
            assert rig.prefix(CHAIN[:3]) == {"a": 3}
        finally:
            os.kill(server.pid, signal.SIGCONT)
        await rig.publish("a", CHAIN[3:5])
        await rig.level()
        os.kill(server.pid, signal.SIGKILL)

        def revived() -> bool:
            server.revive()
            try:
                return bool(rig.client.ping())
            except redis.RedisError:
                return False

        await until(lambda: rig.mirror.stat().behind_s > 0.5, "it does not know any more")
        assert rig.prefix(CHAIN[:5]) == {"a": 5}
        await until(revived, "Redis is back, empty")
        await rig.level()
        assert rig.mirror.stat().blocks == 0
        await rig.beat()
        await rig.level()
        assert rig.prefix(CHAIN[:5]) == {"a": 5}

    try:
        run(server.url, body)
    finally:
        server.close()
