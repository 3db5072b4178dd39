"""A router's copy of the index: which store has which block, without asking anybody.

    snapshot   own-sets of all stores, page by page, after the number of the last event has been read
    stream     every event after that one, each with the number that follows; anything else is a gap -> snapshot

A gap is an event stream that was trimmed before it was read, or a Redis that lost its data. The copy is late by a round
trip and may be wrong like the index itself: good for choosing a worker, never to be trusted with more. While Redis is
away it stays as it was. It does not say whether a store lives; that is membership's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import Unavailable
from cluster.redis import Link
from kvstore.hashing import HASH_BYTES
from kvstore.index import Keys

CAPACITY = 1_000_000  # blocks, at about 190 bytes each
BLOCK_MS = 1_000  # how long Redis waits for an event before it answers that there is none
LINK_S = 3.0  # must be above BLOCK_MS
RETRY_S = 1.0  # after a failure or a gap: a Redis in trouble is not helped by snapshots in a row
EVENTS = 64  # per reply: at most 64 x BATCH hashes, half a megabyte
PAGE = 1_000  # members of an own-set per reply
MAX_SHARED = 65_536  # tuples of owners that are kept to be shared
log = logging.getLogger(__name__)

Owners = tuple[str, ...]  # store ids in order


class PrefixMap:
    """block -> stores, the least recently used forgotten beyond `capacity`. Plain data: no clock, no Redis."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._owners: OrderedDict[bytes, Owners] = OrderedDict()  # block -> who has it, never nobody
        self._shared: dict[Owners, Owners] = {}  # equal tuples are one object: there are few, and they compare fast

    def __len__(self) -> int:
        return len(self._owners)

    def put(self, hashes: Iterable[bytes], store: str) -> None:
        for name in hashes:
            owners = self._owners.get(name, ())
            if store not in owners:
                self._owners[name] = self._share(tuple(sorted((*owners, store))))
            self._owners.move_to_end(name)
        while len(self._owners) > self._capacity:
            self._owners.popitem(last=False)

    def delete(self, hashes: Iterable[bytes], store: str) -> None:
        for name in hashes:
            owners = self._owners.get(name, ())
            if owners == (store,):
                del self._owners[name]
            elif store in owners:
                self._owners[name] = self._share(tuple(owner for owner in owners if owner != store))

    def owners(self, name: bytes) -> Owners:
        return self._owners.get(name, ())

    def prefix(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """store -> how many leading blocks of the chain it has, for those that have any. Counts as use of them."""
        leading: dict[str, int] = {}
        running: set[str] = set()
        last: Owners = ()
        depth = 0
        for depth, name in enumerate(hashes):
            owners = self._owners.get(name, ())
            if owners is last and depth:
                continue
            still = running.intersection(owners) if depth else set(owners)
            leading.update(dict.fromkeys(running - still, depth))
            running, last = still, owners
            if not running:
                break
        else:
            leading.update(dict.fromkeys(running, len(hashes)))
        for name in reversed(hashes[: max(leading.values(), default=0)]):  # parents outlive their children
            self._owners.move_to_end(name)
        return leading

    def _share(self, owners: Owners) -> Owners:
        if len(self._shared) >= MAX_SHARED:
            self._shared.clear()  # stores come and go over the months
        return self._shared.setdefault(owners, owners)


@dataclass(frozen=True, slots=True)
class MirrorStat:
    blocks: int  # known now
    events_total: int  # applied
    gaps_total: int  # times that events were missed
    snapshots_total: int
    behind_s: float  # seconds since it was known to have seen everything; up to one when all is well


class Mirror:
    """Follows one namespace from `start` to `close`, in the loop that calls them. Nothing it does raises."""

    def __init__(self, redis_url: str, namespace: str, capacity: int = CAPACITY) -> None:
        self._link = Link(redis_url, LINK_S)
        self._keys = Keys(namespace)
        self._capacity = capacity
        self._map = PrefixMap(capacity)
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

    def owners(self, name: bytes) -> Owners:
        return self._map.owners(name)

    def prefix(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """store -> how many leading blocks of the chain it has."""
        return self._map.prefix(hashes)

    def stat(self) -> MirrorStat:
        behind_s = time.monotonic() - self._level_at
        return MirrorStat(len(self._map), self._events, self._gaps, self._snapshots, behind_s)

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
        fresh = PrefixMap(self._capacity)
        for store in await self._link.command("HKEYS", self._keys.stores):
            cursor, own = -1, self._keys.own(store.decode(errors="replace"))
            while cursor:
                cursor, members = await self._link.command("SSCAN", own, max(cursor, 0), "COUNT", PAGE)
                fresh.put(members, store.decode(errors="replace"))
        self._map, self._position, self._number = fresh, position, number
        self._snapshots += 1

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
            self._map.put(_names(event.get(b"put", b"")), store)
            self._map.delete(_names(event.get(b"del", b"")), store)
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


def _names(joined: bytes) -> list[bytes]:
    return [joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES)]
