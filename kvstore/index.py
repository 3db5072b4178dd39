"""Which store has which block: an index in Redis that saves a search and is never trusted.

    tandem:{ns}:b:<hash>     hash    store -> "epoch generation"
    tandem:{ns}:stores       hash    store -> "epoch expiry address"
    tandem:{ns}:own:<store>  set     hashes it has published
    tandem:{ns}:events       stream  put and del, capped, numbered without a gap
    tandem:{ns}:sequence     string  number of the last event

The store that owns a block checks whatever is asked of it, so an index that is stale, empty, lying or dead costs a miss
and nothing else: no bytes, no pins, no expiry per block in here. The scripts in lua/ are fenced by the epoch, a random
number per start of a store: a start that was replaced cannot publish, and what it published is not found. A store of
which Redis has forgotten anything is told so and publishes again.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from cluster.errors import Unavailable
from cluster.redis import Link
from kvstore.slabs import Change

LOOKUP_S = 0.020  # for a whole lookup: it is in the way of the first token, and a miss costs less than a slow answer
STEPS = (32, 128, 512)  # blocks asked for at a time, the last again and again: most chains end early
UPDATE_S = 1.0
LEAVE_S = 2.0  # for removing one's own entries when leaving; what is left then is for others to reap
BREAKER_S = 1.0  # after a failed lookup, the next ones are misses for this long
TTL_MS = 10_000  # of a store that says nothing; it repeats itself every 2 s
GRACE_MS = 60_000  # a store dead for longer is not expected back: the others clear up behind it
BATCH = 256  # blocks a script handles: far below Lua's unpack limit, and Redis answers nobody else meanwhile
EVENTS_KEPT = 100_000
EVENTS_MS = 3_600_000  # events outlive the last store by this: a namespace that nobody serves takes no space
log = logging.getLogger(__name__)


def _script(name: str) -> str:
    return files("kvstore").joinpath("lua", f"{name}.lua").read_text()


_HEARTBEAT, _PUBLISH, _UNPUBLISH = _script("heartbeat"), _script("publish"), _script("unpublish")
_LOOKUP, _REAP, _LEAVE = _script("lookup"), _script("reap"), _script("leave")


class Keys:
    """The names of one namespace's keys. The braces keep them on one shard of a Redis cluster."""

    def __init__(self, namespace: str) -> None:
        prefix = f"tandem:{{{namespace}}}:"
        self.stores = prefix + "stores"
        self.events = prefix + "events"
        self.sequence = prefix + "sequence"
        self._own = prefix + "own:"
        self._block = f"{prefix}b:".encode()

    def own(self, store_id: str) -> str:
        return self._own + store_id

    def blocks(self, hashes: Sequence[bytes]) -> list[bytes | str]:
        return [self._block + name for name in hashes]


@dataclass(frozen=True, slots=True)
class Owner:
    """A live store that says it has a block."""

    store: str
    address: str
    epoch: int
    generation: int


class Index:
    """Looks blocks up. Never raises: whatever Redis does, the worst answer is an empty one."""

    def __init__(self, redis_url: str, namespace: str) -> None:
        self._link = Link(redis_url, UPDATE_S)
        self._keys = Keys(namespace)
        self._closed_until = 0.0  # on the monotonic clock
        self._probe: asyncio.Task[None] | None = None

    async def lookup(self, hashes: Sequence[bytes]) -> list[tuple[Owner, ...]]:
        """The owners of each block of the longest prefix of the chain that live stores have, as far as 20 ms show."""
        found: list[tuple[Owner, ...]] = []
        start = time.monotonic()
        if start < self._closed_until:
            return found
        for size in itertools.chain(STEPS, itertools.repeat(STEPS[-1])):
            part = hashes[len(found) : len(found) + size]
            left = start + LOOKUP_S - time.monotonic()
            if not part or left <= 0:
                break
            answer = await self._ask(part, left, in_trouble=not found)
            found += answer
            if len(answer) < len(part):
                break
        return found

    async def _ask(self, hashes: Sequence[bytes], timeout_s: float, in_trouble: bool) -> list[tuple[Owner, ...]]:
        """`in_trouble`: no answer means that something is wrong, not only that a long chain has used up its time."""
        keys = [self._keys.stores, *self._keys.blocks(hashes)]
        try:
            return _owners(*await self._link.script(_LOOKUP, keys, [], timeout_s))
        except (Unavailable, ValueError) as error:  # ValueError: an entry that none of us has written
            if in_trouble:
                log.warning("lookups are misses for %.0f s: %s", BREAKER_S, error)
                self._closed_until = time.monotonic() + BREAKER_S
                if self._probe is None or self._probe.done():
                    self._probe = asyncio.create_task(self._connect(), name="index probe")
            return []

    async def _connect(self) -> None:
        """Leave a connection for the next lookup: making one, with TLS or from afar, takes longer than lookups may."""
        with contextlib.suppress(Unavailable):
            await self._link.command("PING")

    async def close(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        await self._link.close()


def _owners(flat: list[bytes], blocks: bytes) -> list[tuple[Owner, ...]]:
    """The reply of lookup.lua. Blocks with equal owners and generations share one tuple."""
    stores = [(flat[i].decode(), flat[i + 1].decode(), int(flat[i + 2])) for i in range(0, len(flat), 3)]
    seen: dict[bytes, tuple[Owner, ...]] = {}  # a block's part of the reply -> its meaning
    found = []
    for block in blocks.split(b";") if blocks else ():
        if block not in seen:
            pairs = [owner.split(b":") for owner in block.split(b",")]
            seen[block] = tuple(Owner(*stores[int(place)], int(generation)) for place, generation in pairs)
        found.append(seen[block])
    return found


class Standing(enum.Enum):
    """What Redis says to a store's heartbeat."""

    REPLACED = 0  # a newer start of the same store has taken over
    CURRENT = 1
    FORGOTTEN = 2  # Redis has lost some or all of what the store had published


class IndexWriter:
    """What one start of one store says about itself. Every method raises Unavailable when Redis does not answer."""

    def __init__(self, redis_url: str, namespace: str, store_id: str, epoch: int, address: str) -> None:
        self._link = Link(redis_url, UPDATE_S)
        self._keys = Keys(namespace)
        self._store_id = store_id
        self._epoch = epoch
        self._address = address
        self._published = 0  # blocks that Redis should know of this store

    async def claim(self) -> None:
        """Become the store's current start, and remove what earlier ones published. Comes before any `publish`."""
        await self._beat(claim=True)
        await self.reap(self._store_id)
        self._published = 0

    async def heartbeat(self) -> tuple[Standing, list[str]]:
        """Be found for another 10 s. Also returns the stores that died long ago: somebody should `reap` them."""
        return await self._beat(claim=False)

    async def publish(self, blocks: Sequence[Change]) -> bool:
        """At most BATCH blocks can be found here. False: nothing was done, as the next heartbeat will explain."""
        arguments: list[bytes | str | int] = [self._store_id, self._epoch, EVENTS_KEPT]
        for block in blocks:
            arguments += [block.hash, block.generation]
        new = int(await self._link.script(_PUBLISH, self._all(self._store_id, [b.hash for b in blocks]), arguments))
        self._published += max(new, 0)
        return new >= 0

    async def unpublish(self, hashes: Sequence[bytes]) -> int:
        """At most BATCH blocks are gone. Returns how many of them were known."""
        arguments: list[bytes | str | int] = [self._store_id, self._epoch, EVENTS_KEPT, *hashes]
        gone = int(await self._link.script(_UNPUBLISH, self._all(self._store_id, hashes), arguments))
        self._published -= gone
        return gone

    async def reap(self, store_id: str) -> None:
        """Remove what a dead store, or an earlier start of this one, has published. O(its blocks), BATCH at a time."""
        while hashes := await self._link.command("SRANDMEMBER", self._keys.own(store_id), BATCH):
            if await self._reap(store_id, hashes) == 0:
                return  # it is back, and what is left is its own
        await self._reap(store_id, ())

    async def leave(self) -> None:
        """Stop being found at once, and clear up behind oneself as far as that is quick."""
        await self._link.script(_LEAVE, [self._keys.stores], [self._store_id, self._epoch])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                await self.reap(self._store_id)

    async def close(self) -> None:
        await self._link.close()

    async def _reap(self, store_id: str, hashes: Sequence[bytes]) -> int:
        return int(await self._link.script(_REAP, self._all(store_id, hashes), [store_id, EVENTS_KEPT, *hashes]))

    async def _beat(self, claim: bool) -> tuple[Standing, list[str]]:
        arguments: list[bytes | str | int] = [self._store_id, self._epoch, self._address, TTL_MS, GRACE_MS, int(claim)]
        reply = await self._link.script(_HEARTBEAT, self._all(self._store_id, ()), [*arguments, EVENTS_MS])
        standing, published = Standing(reply[0]), int(reply[1])
        if standing is Standing.CURRENT and published != self._published:
            # a replica that took over before it had our last words, or somebody who thought us dead and began to reap
            standing = Standing.FORGOTTEN
        self._published = published
        return standing, [store.decode() for store in reply[2]]

    def _all(self, store_id: str, hashes: Sequence[bytes]) -> list[bytes | str]:
        keys = self._keys
        return [keys.stores, keys.own(store_id), keys.events, keys.sequence, *keys.blocks(hashes)]
