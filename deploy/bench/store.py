"""The block store: how fast bytes go in, out and across, and what its index costs.

Every rate stands beside what the machine does without us, measured in the same run and interleaved with it: a plain
memcpy of the same blocks for shared memory, a plain loopback socket for gRPC. No model is needed.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from dataclasses import dataclass, field

import redis

from cluster.errors import StartupError
from cluster.messages import Handoff
from deploy.bench.peers import CHUNK, NAMESPACE, SECRET, Peer, blocks, send, serve, write
from deploy.bench.report import Figure, median
from kvstore.connections import Connections
from kvstore.fetcher import BlockFetcher, Source
from kvstore.index import BATCH, BREAKER_S, Index, IndexWriter
from kvstore.layout import Layout
from kvstore.reader import HandoffReader
from kvstore.redis_server import EmbeddedRedis
from kvstore.slabs import Change

LAYOUTS = (
    ("16 tokens of SmolLM2-135M", Layout(heads=3, layers=30, tokens=16, dim=64, dtype="bfloat16", itemsize=2)),
    ("64 tokens of an 8B model", Layout(heads=8, layers=32, tokens=64, dim=128, dtype="bfloat16", itemsize=2)),
)
BYTES = 256 * 2**20  # moved per repetition: no cache holds it
WARM_UP = 2  # every slab of the arena is used once: its first use commits it
REPETITIONS = 7
TIMEOUT_S = 60.0
LOOKUPS = 50
LAGS = 20
INDEXED = 20_000  # blocks whose entries in Redis are weighed


def measure() -> list[Figure]:
    index = EmbeddedRedis()
    try:
        figures = [figure for name, layout in LAYOUTS for figure in asyncio.run(_bytes(name, layout, index.url))]
        return figures + asyncio.run(_index(index.url))
    finally:
        index.close()


@dataclass(slots=True)
class _Rates:
    """GB/s of each repetition; the store's CPU seconds of all."""

    memcpy: list[float] = field(default_factory=list)
    socket: list[float] = field(default_factory=list)
    write: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    handoff: list[float] = field(default_factory=list)
    grpc: list[float] = field(default_factory=list)
    cpu_mapped: float = 0.0
    cpu_inline: float = 0.0


async def _bytes(name: str, layout: Layout, redis_url: str) -> list[Figure]:
    count = BYTES // layout.block_bytes
    rates = _Rates()
    memory = 3 * count * (layout.block_bytes + 128)  # one transfer in use, one cached, and below the watermark
    with Peer(serve, layout, memory, redis_url) as store, _Socket(count * layout.block_bytes) as plain:
        address, _ = store.answer()
        with Peer(write, layout, count, address) as writer:
            writer.answer()
            worker = _Worker(layout, count, writer, store)
            for repetition in range(WARM_UP + REPETITIONS):
                await worker.repeat(_Rates() if repetition < WARM_UP else rates, plain)
            await worker.close()
    memcpy, wire = max(rates.memcpy), max(rates.socket)
    total = REPETITIONS * count * layout.block_bytes / 1e9
    kib = layout.block_bytes / 1024

    def rate(what: str, samples: list[float], limit: float | None) -> Figure:
        # the best, as of the machine's limits: noise only ever slows a run down
        return Figure("store", f"{what}, {name}", max(samples), "GB/s", limit, median(samples)[1])

    return [
        rate(f"memcpy of blocks of {kib:,.0f} KiB", rates.memcpy, None),
        rate("write with checksums", rates.write, memcpy),
        rate("read out of shared memory", rates.read, memcpy),
        rate("same-node handoff, write and read at once", rates.handoff, memcpy),
        rate("plain loopback socket", rates.socket, None),
        rate("gRPC between processes, verified", rates.grpc, wire),
        # each repetition moves the bytes in, out, and in and out at once: three times through
        Figure("store", f"store CPU per GB, same node, {name}", 1e3 * rates.cpu_mapped / total / 3, "ms"),
        Figure("store", f"store CPU per GB, gRPC, {name}", 1e3 * rates.cpu_inline / total, "ms"),
    ]


class _Worker:
    """The reading end, with a KV cache of its own."""

    def __init__(self, layout: Layout, count: int, writer: Peer, store: Peer) -> None:
        self._tokens = count * layout.tokens
        self._writer, self._store = writer, store
        self._cache = blocks(layout, count)
        self._other = blocks(layout, count)
        self._near = Connections(SECRET, layout)
        self._far = Connections(SECRET, layout, force_inline=True)
        self._reader = HandoffReader(self._near)
        self._fetchers = BlockFetcher(self._near), BlockFetcher(self._far)

    async def close(self) -> None:
        await self._reader.close()
        await self._near.close()
        await self._far.close()

    async def repeat(self, rates: _Rates, plain: _Socket) -> None:
        gigabytes = self._cache.nbytes / 1e9
        rates.memcpy.append(gigabytes / self._copy())
        before = self._store.cpu_s()
        handoff, hashes = self._begin()
        rates.write.append(gigabytes / self._writer.answer())
        await self._reader.release(handoff)
        rates.read.append(gigabytes / await self._fetch(0, handoff, hashes))
        handoff, hashes = self._begin()
        began = time.perf_counter()
        received = await self._reader.receive(handoff, 0, self._tokens, self._cache.__getitem__, TIMEOUT_S)
        assert received.error is None, received.error
        rates.handoff.append(gigabytes / (time.perf_counter() - began))
        self._writer.answer()
        between = self._store.cpu_s()
        rates.cpu_mapped += between - before
        rates.socket.append(gigabytes / plain.seconds())
        rates.grpc.append(gigabytes / await self._fetch(1, handoff, hashes))
        rates.cpu_inline += self._store.cpu_s() - between

    def _begin(self) -> tuple[Handoff, list[bytes]]:
        """Let the writer write blocks that the store does not have."""
        hashes = [os.urandom(32) for _ in range(len(self._cache))]
        return self._writer.ask((os.urandom(8).hex(), hashes)), hashes

    async def _fetch(self, path: int, handoff: Handoff, hashes: list[bytes]) -> float:
        source = Source(handoff.store, handoff.epoch, 0, len(hashes), "memory")
        began = time.perf_counter()
        fetched = await self._fetchers[path].fetch([source], hashes, self._cache.__getitem__, TIMEOUT_S)
        assert fetched.error is None, fetched.error
        return time.perf_counter() - began

    def _copy(self) -> float:
        began = time.perf_counter()
        for block, other in zip(self._cache, self._other, strict=True):
            block[:] = other
        return time.perf_counter() - began


class _Socket:
    """What a loopback connection between two processes moves when nobody looks at the bytes."""

    def __init__(self, total: int) -> None:
        self._total = total // CHUNK * CHUNK
        self._share = total / self._total
        with socket.create_server(("127.0.0.1", 0)) as server:
            self._peer = Peer(send, server.getsockname()[1], self._total)
            self._connection, _ = server.accept()
        self._peer.answer()

    def seconds(self) -> float:
        """Time to receive `total` bytes."""
        buffer = bytearray(CHUNK)
        began = time.perf_counter()
        self._peer.tell(())
        left = self._total
        while left:
            left -= self._connection.recv_into(buffer, min(left, CHUNK))
        return (time.perf_counter() - began) * self._share

    def __enter__(self) -> _Socket:
        return self

    def __exit__(self, *error: object) -> None:
        self._peer.__exit__(None, None, None)
        self._connection.close()


async def _index(redis_url: str) -> list[Figure]:
    server = redis.Redis.from_url(redis_url)
    index = Index(redis_url, NAMESPACE)
    owner = IndexWriter(redis_url, NAMESPACE, "weighed", 1, "127.0.0.1:1")
    await owner.claim()
    blocks = [Change(os.urandom(32), 1 + i, True) for i in range(INDEXED)]
    before = server.info("memory")["used_memory"]
    for first in range(0, INDEXED, BATCH):
        await owner.publish(blocks[first : first + BATCH])
    used = server.info("memory")["used_memory"] - before
    figures = [Figure("store", "Redis memory per block, all keys", used / INDEXED, "B", lower_is_better=True)]
    for count in (32, 128, 512):
        hashes = [block.hash for block in blocks[:count]]
        times = [await _lookup(index, hashes) for _ in range(LOOKUPS + 1)][1:]
        middle, spread = median(times)
        figures.append(Figure("store", f"index lookup of {count} blocks", 1e3 * middle, "ms", None, spread, True))
    await owner.leave()
    await owner.close()
    server.close()
    figures.append(await _lag(redis_url, index))
    await index.close()
    return figures


async def _lookup(index: Index, hashes: list[bytes]) -> float:
    for _ in range(LOOKUPS):
        began = time.perf_counter()
        found = await index.lookup(hashes)
        took = time.perf_counter() - began
        if len(found) == len(hashes):
            return took
        await asyncio.sleep(BREAKER_S)  # it was too slow once, and the index leaves Redis alone for a while
    raise StartupError("Redis is too slow for any lookup; measure when the machine is less busy")


async def _lag(redis_url: str, index: Index) -> Figure:
    """From the moment a writer has sealed a block to the moment a lookup finds it."""
    _, layout = LAYOUTS[0]
    lags = []
    with Peer(serve, layout, 100 * layout.block_bytes, redis_url) as store:
        address, _ = store.answer()
        with Peer(write, layout, 1, address) as writer:
            writer.answer()
            for _ in range(LAGS + 1):
                name = os.urandom(32)
                writer.ask((os.urandom(8).hex(), [name]))
                writer.answer()
                began = time.perf_counter()
                while not await index.lookup([name]):
                    assert time.perf_counter() - began < TIMEOUT_S, "the block was never published"
                lags.append(1e3 * (time.perf_counter() - began))
    middle, spread = median(lags[1:])
    return Figure("store", "publish lag, seal to lookup", middle, "ms", None, spread, True)
