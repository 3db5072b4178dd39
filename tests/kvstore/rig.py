"""What the store tests share: a small layout, blocks with known bytes, and real processes."""

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.identity import Identity
from cluster.rpc import Client
from cluster.store_messages import BlockKey, Fetch, Find, FollowEnd, Found, StatRequest, StoreStat
from kvstore.block_file import file_bytes
from kvstore.client import StoreClient
from kvstore.connections import Connections
from kvstore.copying import checksums
from kvstore.hashing import ModelKey, block_keys, extend
from kvstore.layout import Layout
from kvstore.mirror import Mirror
from kvstore.part import Part
from kvstore.prefix_map import PrefixMap
from kvstore.reader import HandoffReader
from kvstore.server import StoreServer
from kvstore.slab_writer import SlabWriter
from kvstore.writer import HandoffWriter

SECRET = "a cluster secret"
LAYOUT = Layout(heads=2, layers=3, tokens=4, dim=8, dtype="float32", itemsize=4)
KEY = ModelKey(b"model", b"tokenizer", "float32", LAYOUT.tokens)
ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 20.0
Block = npt.NDArray[np.uint8]


def block_of(block_id: int, layout: Layout = LAYOUT) -> Block:
    """The bytes of a block, different for every id."""
    return np.random.default_rng(block_id).integers(0, 256, layout.block_bytes, np.uint8)


def tokens_of(count: int, chain: int = 0) -> list[int]:
    return [chain * 100_003 + i for i in range(count)]


def hashes_for(count: int, chain: int = 0, layout: Layout = LAYOUT) -> list[bytes]:
    hashes: list[bytes] = []
    extend(hashes, KEY.root(b""), tokens_of(count, chain), layout.tokens)
    return hashes


def keys_for(count: int, chain: int = 0, layout: Layout = LAYOUT) -> list[BlockKey]:
    """The full blocks of a chain, with what their names were made of."""
    hashes = hashes_for(count, chain, layout)
    return block_keys(hashes, KEY.root(b""), tokens_of(count, chain), layout.tokens, 0, len(hashes))


def memory_for(slabs: int, layout: Layout = LAYOUT) -> int:
    return 2 * 4096 + slabs * (-(-layout.block_bytes // 64) * 64 + 8)


async def until(condition: Callable[[], Awaitable[bool]] | Callable[[], bool], what: str) -> None:
    """Wait for a condition that is bound to come true."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        result = condition()
        if await result if isinstance(result, Awaitable) else result:
            return
        assert time.monotonic() < deadline, f"still not: {what}"
        await asyncio.sleep(0.01)


async def stat(address: str) -> StoreStat:
    """The store's account; fails the test when its states do not add up."""
    client = Client(address, SECRET)
    try:
        s: StoreStat = await client.call("Stat", StatRequest(), PATIENCE_S)
    finally:
        await client.close()
    assert s.free + s.reserved + s.held + s.cached + s.quarantined == s.slabs
    return s


@asynccontextmanager
async def store(
    slabs: int,
    layout: Layout = LAYOUT,
    redis_url: str = "",
    disk: Path | None = None,
    disk_blocks: int = 1000,
    tenant_share: float = 1.0,
) -> AsyncIterator[tuple[str, StoreServer]]:
    """A store in this process, of exactly that many slabs."""
    identity = Identity("ns", redis_url, SECRET, "127.0.0.1")
    disk_memory = disk_blocks * file_bytes(layout)
    server = StoreServer("test", layout, memory_for(slabs, layout), identity, disk, disk_memory, tenant_share)
    info = await server.start()
    try:
        yield info.address, server
    finally:
        await server.stop()


@asynccontextmanager
async def writer(address: str, layout: Layout = LAYOUT) -> AsyncIterator[HandoffWriter]:
    source = SlabWriter(Part(layout), lambda b: block_of(b, layout))
    made = HandoffWriter(StoreClient(address, SECRET, "writer", layout), layout, source)
    await made.connect()
    try:
        yield made
    finally:
        await made.close()


class Target:
    """A worker's blocks, as a reader sees them."""

    def __init__(self, layout: Layout = LAYOUT) -> None:
        self.layout = layout
        self.blocks: dict[int, Block] = {}

    def __call__(self, position: int) -> Block:
        return self.blocks.setdefault(position, np.zeros(self.layout.block_bytes, np.uint8))


@asynccontextmanager
async def connections(force_inline: bool = False, layout: Layout = LAYOUT) -> AsyncIterator[Connections]:
    made = Connections(SECRET, layout, force_inline=force_inline)
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def reader(force_inline: bool = False, layout: Layout = LAYOUT) -> AsyncIterator[HandoffReader]:
    async with connections(force_inline, layout) as shared:
        made = HandoffReader(shared)
        try:
            yield made
        finally:
            await made.close()


class Process:
    """A child running one of `store_process`'s mains."""

    def __init__(self, what: str, **settings: Any) -> None:
        command = [sys.executable, "-m", "tests.kvstore.store_process", what]
        self._popen = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps({"secret": SECRET, **settings}) + "\n")
        self._popen.stdin.close()

    async def line(self) -> str:
        """Its next line of output."""
        assert self._popen.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(self._popen.stdout.readline), PATIENCE_S)
        assert line, f"the process ended with {self._popen.poll()}"
        return line.strip()

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._popen.kill()
        self._popen.wait(PATIENCE_S)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def terminate(self) -> int:
        self._popen.terminate()
        return self._popen.wait(PATIENCE_S)


@asynccontextmanager
async def process(what: str, **settings: Any) -> AsyncIterator[Process]:
    made = Process(what, **settings)
    try:
        yield made
    finally:
        made.kill()


@asynccontextmanager
async def store_process(
    slabs: int,
    port: int = 0,
    redis_url: str = "",
    disk: Path | None = None,
    disk_blocks: int = 1000,
    layout: Layout = LAYOUT,
) -> AsyncIterator[tuple[str, int, Process]]:
    sizes = {"layout": dataclasses.asdict(layout), "memory": memory_for(slabs, layout)}
    settings = {"store_id": f"test-{os.getpid()}", "port": port, **sizes}
    tier = {"disk": str(disk or ""), "disk_memory": disk_blocks * file_bytes(layout)}
    async with process("serve", redis_url=redis_url, **settings, **tier) as made:
        address, epoch = (await made.line()).split()
        yield address, int(epoch), made


# ------------------------------------------------------------------------------------- blocks that outlive a handoff
def block_id(chain: int, position: int) -> int:
    return 1000 * chain + position


async def ask(address: str, method: str, message: Any) -> Any:
    """One call to a store."""
    client = Client(address, SECRET)
    try:
        return await client.call(method, message, PATIENCE_S)
    finally:
        await client.close()


async def keep(address: str, chain: int, blocks: int, tenant: str = "", layout: Layout = LAYOUT) -> list[bytes]:
    """Have the store hold the first blocks of a chain; returns their hashes."""
    keys = keys_for(blocks * layout.tokens, chain, layout)
    async with writer(address, layout) as w:
        await w.store(keys, [block_id(chain, position) for position in range(blocks)], tenant)
    return [key.hash for key in keys]


async def find(address: str, hashes: Sequence[bytes]) -> list[int]:
    """The tier of each block of the longest prefix that is there."""
    found: Found = await ask(address, "Find", Find(tuple(hashes)))
    return list(found.tiers)


async def fetched(address: str, hashes: Sequence[bytes], chain: int, layout: Layout = LAYOUT) -> int:
    """Fetch blocks inline and check every byte. Returns how many came."""
    epoch = (await stat(address)).epoch
    client = Client(address, SECRET)
    data, count = b"", 0
    try:
        async for message in client.stream("Fetch", Fetch(tuple(hashes), epoch, inline=True), PATIENCE_S):
            if isinstance(message, FollowEnd):
                assert (message.code == "store_expired") == (count < len(hashes))
                return count
            for part in message.fragments:
                assert (part.position, part.offset) == (count, len(data))
                data += part.data
                if part.last:
                    block = np.frombuffer(data, np.uint8)
                    assert (block == block_of(block_id(chain, count), layout)).all(), f"block {count}"
                    assert checksums(block, layout) == part.checksums
                    data, count = b"", count + 1
    finally:
        await client.close()
    raise AssertionError("the stream ended without a word")


def prefixes(mirror: Mirror, prefix_map: PrefixMap, hashes: list[bytes]) -> dict[str, int]:
    """store -> how many leading blocks of the chain it has, as a router would see it."""
    depths = prefix_map.lookup(hashes)
    return {store: int(depths[owner]) for store, owner in mirror.stores() if depths[owner]}
