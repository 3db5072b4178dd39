"""A worker as a reader of the offload tier: who has which blocks of a sequence, and bringing them here.

Runs on the event loop. Every lookup and every fetch is a task that ends in exactly one call of its callback, whatever
happens to it, so that the engine always gets its sequence and its blocks back; both have deadlines of their own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from cluster import telemetry
from kvstore.connections import Connections
from kvstore.fetcher import Fetched, Source
from kvstore.index import Index
from kvstore.locate import Locator
from workers.block_mover import BlockMover
from workers.counters import Counters
from workers.node_store import NodeStore
from workers.sequence import Sequence
from workers.step import BlockFetch
from workers.tasks import outcome

LOCATE_S = 0.25  # far above what store and index take together, for it holds the sequence up
Located = Callable[[Sequence, list[Source]], None]
# sequence, good blocks from the start of its table, (source, blocks, seconds) for what was tried
FetchEnded = Callable[[Sequence, int, tuple[tuple[Source, int, float], ...]], None]
log = logging.getLogger(__name__)


class Tier:
    """`store` is asked first, then the index. `connections` are shared with others who read."""

    def __init__(
        self, mover: BlockMover, store: NodeStore, index: Index, connections: Connections, counters: Counters
    ) -> None:
        self._mover = mover
        self._store = store
        self._index = index
        self._locator = Locator(index, connections)
        self._counters = counters
        self._lookups: set[asyncio.Task[list[Source]]] = set()
        self._fetches: dict[str, asyncio.Task[Fetched]] = {}  # sequence id -> task

    async def warm_up(self) -> None:
        """Connect to the index: a first lookup that has to do that as well takes longer than lookups may."""
        await self._index.lookup([b""])

    def locate(self, sequence: Sequence, done: Located) -> None:
        task = asyncio.create_task(self._locate(sequence))
        self._lookups.add(task)

        def ended(_: asyncio.Task[list[Source]]) -> None:
            self._lookups.discard(task)
            done(sequence, outcome(task, []))

        task.add_done_callback(ended)

    def fetch(self, order: BlockFetch, done: FetchEnded) -> None:
        sequence = order.sequence
        task = asyncio.create_task(self._fetch(order))
        self._fetches[sequence.id] = task

        def ended(_: asyncio.Task[Fetched]) -> None:
            del self._fetches[sequence.id]
            fetched = outcome(task, Fetched(order.sources[0].start, (), None))
            done(sequence, fetched.valid_blocks, fetched.parts)

        task.add_done_callback(ended)

    def drop(self, sequence_id: str) -> None:
        """The sequence has ended; what it fetches is of no use."""
        if sequence_id in self._fetches:
            self._fetches[sequence_id].cancel()

    async def close(self) -> None:
        tasks: list[asyncio.Task[Any]] = [*self._lookups, *self._fetches.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._index.close()

    async def _locate(self, sequence: Sequence) -> list[Source]:
        hashes = sequence.hashes[: (len(sequence.tokens) - 1) // self._mover.layout.tokens]
        try:
            async with asyncio.timeout(LOCATE_S):
                return await self._locator.locate(hashes, self._store.address, self._store.epoch)
        except TimeoutError:
            log.info("nobody said in time who has blocks of %s", sequence.id)
            return []

    async def _fetch(self, order: BlockFetch) -> Fetched:
        sequence, layout = order.sequence, self._mover.layout
        began = time.monotonic()
        timeout_s = min(order.timeout_s, max(0.0, sequence.deadline - began))
        with telemetry.span("fetch", sequence.span) as span:
            fetched = await self._mover.fetch(order.sources, sequence.hashes, order.table, timeout_s)
            about = {
                "tandem.sources": [f"{source.path} {source.store}" for source in order.sources],
                "tandem.blocks": order.sources[-1].stop - order.sources[0].start,
                "tandem.fetched_blocks": fetched.valid_blocks - order.sources[0].start,
            }
            telemetry.end(span, about, fetched.error.code if fetched.error else "")
        if fetched.error is not None:
            self._counters.fetch_failures_total += 1
            log.info("%s: %d blocks are there, then: %s", sequence.id, fetched.valid_blocks, fetched.error.message)
        self._counters.fetch_seconds_total += time.monotonic() - began
        for source, blocks, _ in fetched.parts:
            used = min(source.start + blocks, fetched.valid_blocks) - source.start
            if used > 0:
                self._counters.fetched(source.path, used * layout.tokens)
                self._counters.fetched_bytes_total += used * layout.block_bytes
        return fetched
