"""What feeds a router's prefix map from the index: which store has which block, without asking anybody.

    snapshot   own-sets of all stores, page by page, after the number of the last event has been read
    stream     every event after that one, each with the number that follows; anything else is a gap -> snapshot

A gap is an event stream that was trimmed before it was read, or a Redis that lost its data. The copy is late by a round
trip and may be wrong like the index itself: good for choosing a worker, never to be trusted with more. While Redis is
away it stays as it was. It does not say whether a store lives; that is membership's. Each store is an owner in the map,
under a number that a snapshot changes: the old account stands until the new one is whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from cluster.errors import Unavailable
from cluster.redis import Link
from kvstore.index import Keys
from kvstore.prefix_map import PrefixMap, split

BLOCK_MS = 1_000  # how long Redis waits for an event before it answers that there is none
LINK_S = 3.0  # must be above BLOCK_MS
RETRY_S = 1.0  # after a failure or a gap: a Redis in trouble is not helped by snapshots in a row
EVENTS = 64  # per reply: at most 64 x BATCH hashes, half a megabyte
PAGE = 1_000  # members of an own-set per reply
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MirrorStat:
    blocks: int  # known now; one that several stores have counts once for each
    events_total: int  # applied
    gaps_total: int  # times that events were missed
    snapshots_total: int
    behind_s: float  # seconds since it was known to have seen everything; up to one when all is well


class Mirror:
    """Follows one namespace from `start` to `close`, in the loop that calls them. Nothing it does raises."""

    def __init__(self, redis_url: str, namespace: str, prefix_map: PrefixMap) -> None:
        """`prefix_map` is shared with whoever else feeds it; only owners that joined in here are touched."""
        self._link = Link(redis_url, LINK_S)
        self._keys = Keys(namespace)
        self._map = prefix_map
        self._stores: dict[str, int] = {}  # store id -> its number in the map, if it has any blocks
        self._position = b""  # id of the last event seen, empty: a snapshot is needed
        self._number = 0  # number of that event
        self._events = self._gaps = self._snapshots = 0
        self._level_at = time.monotonic()
        self._reachable = True
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="index mirror")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._link.close()

    def stores(self) -> tuple[tuple[str, int], ...]:
        """(store id, its number in the prefix map) of all that have blocks, as of now."""
        return tuple(self._stores.items())

    def owners(self, name: bytes) -> tuple[str, ...]:
        """Ids of the stores that have that block, in order."""
        numbers = set(self._map.owners(name))
        return tuple(sorted(store for store, owner in self._stores.items() if owner in numbers))

    def stat(self) -> MirrorStat:
        behind_s = time.monotonic() - self._level_at
        blocks = sum(map(self._map.count, self._stores.values()))
        return MirrorStat(blocks, self._events, self._gaps, self._snapshots, behind_s)

    async def _run(self) -> None:
        while True:
            try:
                await self._follow()
                self._reachable = True
            except Unavailable as error:
                if self._reachable:
                    log.warning("the index mirror stays as it is: %s", error.message)
                self._reachable = False
            except _Gap as gap:
                log.info("the index mirror starts over: %s", gap)
                self._position = b""
                self._gaps += 1
            else:
                continue
            await asyncio.sleep(RETRY_S)

    async def _follow(self) -> None:
        """One step: a snapshot, or the next events."""
        if not self._position:
            await self._take_snapshot()
        elif not await self._read(BLOCK_MS):
            # silence: either nothing happened, or what would tell us is gone
            if await self._last_number() == self._number:
                self._level_at = time.monotonic()
            elif not await self._read(0):
                raise _Gap("its events were lost, with Redis's data or by trimming")

    async def _take_snapshot(self) -> None:
        last = await self._link.command("XREVRANGE", self._keys.events, "+", "-", "COUNT", 1)
        if last:
            position, number = last[0][0], _number(last[0][1])
        else:
            position, number = b"0-0", await self._last_number()
        fresh: dict[str, int] = {}
        try:
            for name in await self._link.command("HKEYS", self._keys.stores):
                await self._take_store(name.decode(errors="replace"), fresh)
        except BaseException:
            self._leave(fresh)
            raise
        before, self._stores = self._stores, fresh
        self._leave(before)
        self._position, self._number = position, number
        self._snapshots += 1

    async def _take_store(self, store: str, fresh: dict[str, int]) -> None:
        """All that a store has published, under a number of its own in `fresh`."""
        cursor, own = -1, self._keys.own(store)
        while cursor:
            cursor, members = await self._link.command("SSCAN", own, max(cursor, 0), "COUNT", PAGE)
            if members:
                self._put(fresh, store, members)

    def _put(self, stores: dict[str, int], store: str, hashes: list[bytes]) -> None:
        if store not in stores:
            stores[store] = self._map.join()
        self._map.put(stores[store], hashes)

    def _delete(self, store: str, hashes: list[bytes]) -> None:
        owner = self._stores.get(store)
        if owner is None:
            return
        self._map.delete(owner, hashes)
        if not self._map.count(owner):
            del self._stores[store]
            self._map.leave(owner)

    def _leave(self, stores: dict[str, int]) -> None:
        for owner in stores.values():
            self._map.leave(owner)

    async def _last_number(self) -> int:
        return _number({b"n": await self._link.command("GET", self._keys.sequence) or 0})

    async def _read(self, wait_ms: int) -> int:
        """Apply what comes next in the stream and return how many events that were. Raises _Gap, Unavailable."""
        wait = ("BLOCK", wait_ms) if wait_ms else ()
        command = ("XREAD", "COUNT", EVENTS, *wait, "STREAMS", self._keys.events, self._position)
        streams = await self._link.command(*command)
        events = streams[0][1] if streams else []
        for position, event in events:
            number = _number(event)
            if number != self._number + 1:
                raise _Gap(f"event {number} came after {self._number}")
            store = event.get(b"store", b"").decode(errors="replace")
            if put := split(event.get(b"put", b"")):
                self._put(self._stores, store, put)
            self._delete(store, split(event.get(b"del", b"")))
            self._position, self._number = position, number
            self._events += 1
        if 0 < len(events) < EVENTS:
            self._level_at = time.monotonic()
        return len(events)


class _Gap(Exception):
    """Events were missed."""


def _number(event: Any) -> int:
    try:
        return int(event[b"n"])
    except (KeyError, TypeError, ValueError):
        raise _Gap("an event has no number; is the Redis shared with another version?") from None
