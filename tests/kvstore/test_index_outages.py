"""Real stores and a real Redis that loses each other: what is found, what is served, and how it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from cluster.messages import StoreInfo
from kvstore import index as index_module
from kvstore import mirror as mirror_module
from kvstore import publisher as publisher_module
from kvstore.index import Index
from kvstore.mirror import Mirror
from kvstore.prefix_map import PrefixMap
from kvstore.publisher import Publisher
from kvstore.redis_server import EmbeddedRedis
from tests.kvstore.rig import fetched, keep, store, store_process, until


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher_module, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(index_module, "UPDATE_S", 0.3)
    monkeypatch.setattr(mirror_module, "BLOCK_MS", 50)
    monkeypatch.setattr(mirror_module, "RETRY_S", 0.05)


class Eyes:
    """Whoever looks for blocks: a lookup in Redis, and a router's mirror."""

    def __init__(self, url: str) -> None:
        self.index = Index(url, "ns")
        self.map = PrefixMap()
        self.mirror = Mirror(url, "ns", self.map)

    async def lookup(self, hashes: list[bytes]) -> int:
        self.index._closed_until = 0.0
        return len(await self.index.lookup(hashes))

    async def see(self, hashes: list[bytes], count: int) -> None:
        async def seen() -> bool:
            return await self.lookup(hashes) == count

        await until(seen, f"a lookup finds {count}")

    async def mirrored(self, hashes: list[bytes], count: int) -> None:
        await until(lambda: max(self.map.lookup(hashes), default=0) == count, f"the mirror has {count}")

    async def close(self) -> None:
        await self.index.close()
        await self.mirror.close()


class Wire:
    """A TCP way to a port that can be cut and mended."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open: set[asyncio.StreamWriter] = set()
        self.cut = False
        self.port = 0

    @asynccontextmanager
    async def up(self) -> AsyncIterator[Wire]:
        listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listener.close()
            self.sever()

    def sever(self) -> None:
        """Break what is open; with `cut` set, nothing opens again."""
        for writer in self._open:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.cut:
            writer.close()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._open |= {writer, far_writer}
        with contextlib.suppress(OSError):
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        self._open -= {writer, far_writer}

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65_536):
                sink.write(data)
        sink.close()


def run(url: str, test: Callable[[Eyes], Awaitable[None]]) -> None:
    async def body() -> None:
        eyes = Eyes(url)
        try:
            async with asyncio.timeout(60):
                await eyes.mirror.start()
                await test(eyes)
        finally:
            await eyes.close()

    asyncio.run(body())


def test_a_store_cut_off_from_redis_is_not_found_after_its_time_but_serves(
    server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 20."""
    monkeypatch.setattr(index_module, "TTL_MS", 500)
    parts = urlsplit(server.url)
    assert parts.port

    async def body(eyes: Eyes) -> None:
        async with Wire(parts.port).up() as wire:
            url = f"redis://:{parts.password}@127.0.0.1:{wire.port}/0"
            async with store(16, redis_url=url) as (address, _):
                hashes = await keep(address, 1, 5)
                await eyes.see(hashes, 5)
                wire.cut = True
                wire.sever()
                await eyes.see(hashes, 0)
                assert await fetched(address, hashes, 1) == 5, "those who know its address go on"
                more = await keep(address, 2, 3)
                wire.cut = False
                await eyes.see(hashes, 5)
                await eyes.see(more, 3)
                await eyes.mirrored(more, 3)

    run(server.url, body)


def test_a_flushed_redis_is_filled_again_while_the_store_serves(server: EmbeddedRedis) -> None:
    """Row 2."""

    async def body(eyes: Eyes) -> None:
        async with store(16, redis_url=server.url) as (address, _):
            hashes = await keep(address, 1, 5)
            await eyes.see(hashes, 5)
            with redis.Redis.from_url(server.url) as client:
                for _ in range(3):
                    client.flushall()
                    client.script_flush()
                    assert await fetched(address, hashes, 1) == 5
                    await eyes.see(hashes, 5)
                    await eyes.mirrored(hashes, 5)

    run(server.url, body)


def test_what_a_killed_store_had_published_is_removed_by_the_living(server: EmbeddedRedis) -> None:
    """Row 3: at first it is only not found, and after the grace the others clear up."""

    async def body(eyes: Eyes) -> None:
        client: Any
        with redis.Redis.from_url(server.url) as client:
            async with store_process(16, redis_url=server.url) as (address, epoch, process):
                hashes = await keep(address, 1, 5)
                await eyes.see(hashes, 5)
                await eyes.mirrored(hashes, 5)
                process.kill()
            client.hset(
                "tandem:{ns}:stores", f"test-{os.getpid()}", f"{epoch} 1000 {address}"
            )  # as if that were long ago
            await eyes.see(hashes, 0)
            assert len(client.keys("tandem:{ns}:b:*")) == 5
            async with _another(server.url):
                await until(lambda: not client.keys("tandem:{ns}:b:*"), "the living have cleared up")
                assert client.hkeys("tandem:{ns}:stores") == [b"living"]
                await eyes.mirrored(hashes, 0)

    run(server.url, body)


def test_lookups_cost_next_to_nothing_while_redis_hangs(server: EmbeddedRedis) -> None:
    """Row 1: one of them waits for the deadline, the breaker answers the others, and the store serves."""

    async def body(eyes: Eyes) -> None:
        async with store(16, redis_url=server.url) as (address, _):
            hashes = await keep(address, 1, 5)
            await eyes.see(hashes, 5)
            os.kill(server.pid, signal.SIGSTOP)
            try:
                async with asyncio.timeout(10):
                    for _ in range(20_000):  # 400 s at 20 ms each
                        assert await eyes.index.lookup(hashes) == []
                assert await fetched(address, hashes, 1) == 5
            finally:
                os.kill(server.pid, signal.SIGCONT)
            await eyes.see(hashes, 5)

    run(server.url, body)


@asynccontextmanager
async def _another(url: str) -> AsyncIterator[None]:
    """A second living store: its publisher is what reaps."""
    made = Publisher(url, StoreInfo("living", "127.0.0.1:1", "n", 1, "ns", 99), list)
    made.start()
    try:
        yield
    finally:
        await made.stop()
