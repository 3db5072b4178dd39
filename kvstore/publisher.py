"""Tells Redis about one store, in the background: that it lives, which blocks it has, and which no longer.

Changes wait here until Redis has them; a Redis that is down costs one line in the log per outage and is told everything
it missed when it is back. Nothing here can fail the store.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from itertools import islice

from cluster.errors import Unavailable
from cluster.membership import Membership
from cluster.messages import StoreInfo
from kvstore.index import BATCH, IndexWriter, Standing
from kvstore.slabs import Change

HEARTBEAT_S = 2.0
BATCH_S = 0.005  # what is sealed within this time is published together
MAX_PENDING = 65_536  # more than there are blocks: in a long outage the oldest are dropped, at the price of misses
log = logging.getLogger(__name__)


class Publisher:
    """`findable` returns all blocks that the store has: what a Redis is told first, and again when it lost its data."""

    def __init__(self, redis_url: str, info: StoreInfo, findable: Callable[[], list[Change]]) -> None:
        self._info = info
        self._findable = findable
        self._membership = Membership(redis_url)
        self._index = IndexWriter(redis_url, info.namespace, info.id, info.epoch, info.address)
        self._pending: dict[bytes, Change] = {}  # hash -> the last thing that happened to it
        self._limit = MAX_PENDING
        self._wake = asyncio.Event()
        self._claimed = False
        self._reachable = True
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._put_all()
        self._task = asyncio.create_task(self._run(), name="publisher")

    async def stop(self) -> None:
        """Leave Redis, if it answers."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        try:
            await self._membership.unregister(self._info)
            await self._index.leave()
        except Unavailable as error:
            log.info("not unregistered, it will expire: %s", error.message)
        await self._membership.close()
        await self._index.close()

    def put(self, changes: Iterable[Change]) -> None:
        for change in changes:
            self._pending.pop(change.hash, None)  # the newest goes last
            self._pending[change.hash] = change
        while len(self._pending) > self._limit:
            del self._pending[next(iter(self._pending))]
        self._wake.set()

    def _put_all(self) -> None:
        blocks = self._findable()
        self._limit = len(blocks) + MAX_PENDING
        self.put(blocks)

    async def _run(self) -> None:
        while True:
            next_beat = time.monotonic() + HEARTBEAT_S
            try:
                if not await self._beat():
                    log.error("a newer start of store %s has taken over; this one publishes no more", self._info.id)
                    return
                if not self._reachable:
                    log.info("Redis answers again")
                self._reachable = True
                await self._publish_until(next_beat)
            except Unavailable as error:
                if self._reachable:
                    log.warning("the store goes on without its index: %s", error.message)
                self._reachable = False
            await asyncio.sleep(max(0.0, next_beat - time.monotonic()))

    async def _beat(self) -> bool:
        """Say that the store lives; False: it has been replaced."""
        await self._membership.register(self._info)
        if not self._claimed:
            await self._index.claim()
            self._claimed = True
        standing, dead = await self._index.heartbeat()
        if standing is Standing.FORGOTTEN:
            self._put_all()
        for store_id in dead:
            await self._index.reap(store_id)
        return standing is not Standing.REPLACED

    async def _publish_until(self, deadline: float) -> None:
        while (left := deadline - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left):  # `wait_for` of Python 3.11 can lose a cancellation
                    await self._wake.wait()
            except TimeoutError:
                return
            await asyncio.sleep(BATCH_S)
            self._wake.clear()
            while batch := list(islice(self._pending.values(), BATCH)):
                if time.monotonic() >= deadline or not await self._send(batch):
                    self._wake.set()  # there is more to do, after a heartbeat
                    return
                for change in batch:
                    if self._pending.get(change.hash) is change:
                        del self._pending[change.hash]

    async def _send(self, batch: list[Change]) -> bool:
        present = [change for change in batch if change.present]
        gone = [change.hash for change in batch if not change.present]
        if gone:
            await self._index.unpublish(gone)
        return not present or await self._index.publish(present)
