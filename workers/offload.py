"""Blocks on their way into the store outside handoffs: those that decode produced, repeated prompts, evicted ones.

They wait here to be written a batch at a time, because a batch costs as many calls as a block does. Nobody waits for
them: one batch is under way at a time, handoffs go first, and a full queue takes no more: what it does not take are the
tails of chains, which are worth least. That, and what the store has no room for, is a miss some day.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from cluster.errors import StoreError, TandemError
from kvstore.writer import HandoffWriter
from workers.counters import Counters
from workers.step import Offload

BATCH = 32  # blocks in one reservation
BATCH_S = 0.05  # how long a block may wait for others to go with it
YIELD_S = 0.5  # how long a batch waits for handoffs to end
Done = Callable[[Sequence[Offload]], None]  # takes back blocks that nobody copies from any more
log = logging.getLogger(__name__)


class OffloadQueue:
    """`writer` gives the connection to write over, if there is one now; `done` is called exactly once for every block.
    No more than `limit` blocks wait: the engine cannot reuse them meanwhile."""

    def __init__(
        self,
        writer: Callable[[], HandoffWriter | None],
        limit: int,
        handoffs_idle: asyncio.Event,
        done: Done,
        counters: Counters,
    ) -> None:
        self._writer = writer
        self._limit = limit
        self._handoffs_idle = handoffs_idle
        self._done = done
        self._counters = counters
        self._waiting: deque[Offload] = deque()
        self._filled = asyncio.Event()  # a whole batch waits
        self._some = asyncio.Event()  # anything waits

    def put(self, offloads: Sequence[Offload]) -> None:
        room = self._limit - len(self._waiting)
        self._waiting.extend(offloads[:room])
        if dropped := offloads[room:]:
            self._counters.offload_failures_total += len(dropped)
            self._done(dropped)
        if self._waiting:
            self._some.set()
        # cold blocks come in batches of their own, and the engine waits for them before it offers more
        if len(self._waiting) >= BATCH or any(offload.cold for offload in offloads):
            self._filled.set()

    async def run(self) -> None:
        """Write what comes, until cancelled."""
        batch: list[Offload] = []
        try:
            while True:
                await self._some.wait()
                with suppress(TimeoutError):
                    async with asyncio.timeout(BATCH_S):
                        await self._filled.wait()
                # somebody waits for handoffs and nobody for these; but they do not wait for ever either
                with suppress(TimeoutError):
                    async with asyncio.timeout(YIELD_S):
                        await self._handoffs_idle.wait()
                if batch := self._take():
                    await self._write(batch)
                    self._done(batch)
                    batch = []
        finally:
            self._done([*batch, *self._waiting])
            self._waiting.clear()

    def _take(self) -> list[Offload]:
        """The next batch: the oldest blocks that are of one tenant."""
        batch = [self._waiting.popleft()] if self._waiting else []
        while self._waiting and len(batch) < BATCH and self._waiting[0].name.tenant == batch[0].name.tenant:
            batch.append(self._waiting.popleft())
        if not self._waiting:
            self._some.clear()
        if len(self._waiting) < BATCH:
            self._filled.clear()
        return batch

    async def _write(self, batch: Sequence[Offload]) -> None:
        writer = self._writer()
        try:
            if writer is None:
                raise StoreError("this worker has no block store now")
            keys = [offload.name.key for offload in batch]
            new = await writer.store(keys, [offload.block for offload in batch], batch[0].name.tenant)
            self._counters.offloaded_blocks_total += new
        except TandemError as error:
            self._counters.offload_failures_total += len(batch)
            log.info("%d blocks do not go to the store: %s", len(batch), error.message)
