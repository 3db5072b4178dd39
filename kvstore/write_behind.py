"""Copies blocks from memory to the disk, one at a time, some time after nobody uses them any more.

A block is held while it is written, so its slab has no other owner meanwhile. What is evicted before its turn is lost
to the disk, as is the oldest of more than the queue holds; both come again when they are used again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

from kvstore.arena import Arena
from kvstore.block_file import Header
from kvstore.disk import DiskTier
from kvstore.slabs import Slabs

QUEUE = 8192  # blocks that wait; their names only
GRACE_S = 1.0  # for the last write to end
RETRY_S = 0.5  # how often a disk that cannot be written is looked at
log = logging.getLogger(__name__)


class WriteBehind:
    def __init__(self, arena: Arena, slabs: Slabs, disk: DiskTier) -> None:
        self._arena = arena
        self._slabs = slabs
        self._disk = disk
        self._queue: dict[bytes, None] = {}  # hashes, the first comes first
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="write behind")

    async def stop(self, flush_s: float) -> None:
        """Write everything in memory that is not on the disk, heads of chains first, for at most so long."""
        if self._task is None:
            return
        self._task.cancel()
        flush = asyncio.create_task(self._flush(self._task, time.monotonic() + flush_s))
        await asyncio.wait([flush], timeout=flush_s + GRACE_S)
        if not flush.done():
            log.error("the disk tier does not answer; what is only in memory is lost")

    async def _flush(self, before: asyncio.Task[None], deadline: float) -> None:
        await asyncio.gather(before, return_exceptions=True)
        for name in self._slabs.names():
            if time.monotonic() >= deadline or not self._disk.writable:
                log.warning("the disk tier stops before everything in memory was written")
                return
            await self._write(name)

    def put(self, names: Iterable[bytes]) -> None:
        """These blocks are used by nobody now."""
        for name in names:
            if name not in self._disk:
                self._queue[name] = None
        while len(self._queue) > QUEUE:
            del self._queue[next(iter(self._queue))]
        if self._queue:
            self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            while self._queue:
                if not self._disk.writable:
                    await asyncio.sleep(RETRY_S)
                    continue
                name = next(iter(self._queue))
                del self._queue[name]
                await self._write(name)
            self._wake.clear()

    async def _write(self, name: bytes) -> None:
        entry = self._slabs.find(name)
        if entry is None or name in self._disk:
            return
        self._slabs.hold(entry)
        try:
            header = Header(entry.key, entry.tenant, entry.checksums)
            await self._disk.write(header, self._arena.slab(entry.index), self._slabs.is_pinned(name))
        finally:
            self._slabs.drop(entry)
