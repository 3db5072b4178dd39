"""Which store has which block: an index in Redis that saves a search and is never trusted.

    tandem:{ns}:b:<hash>     hash    store -> "epoch generation"
    tandem:{ns}:stores       hash    store -> "epoch expiry address"
    tandem:{ns}:own:<store>  set     hashes it has published
    tandem:{ns}:events       stream  put and del, capped

The store that owns a block checks whatever is asked of it, so an index that is stale, empty, lying or dead costs a miss
and nothing else: no bytes, no pins, no expiry per block in here. The scripts in lua/ are fenced by the epoch, a random
number per start of a store: a start that was replaced cannot publish, and what it published is not found. A store that
Redis has forgotten is told so and publishes again.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from cluster.errors import Unavailable
from cluster.redis import Link
from kvstore.slabs import Change

LOOKUP_S = 0.020  # a lookup is in the way of the first token; a miss costs less than a slow answer
UPDATE_S = 1.0
BREAKER_S = 1.0  # after a failed lookup, the next ones are misses for this long
TTL_MS = 10_000  # of a store that says nothing; it repeats itself every 2 s
GRACE_MS = 60_000  # a store dead for longer is not expected back: the others clear up behind it
BATCH = 256  # blocks a script handles: far below Lua's unpack limit, and Redis answers nobody else meanwhile
EVENTS_KEPT = 100_000
log = logging.getLogger(__name__)


def _script(name: str) -> str:
    return files("kvstore").joinpath("lua", f"{name}.lua").read_text()


_HEARTBEAT, _PUBLISH, _UNPUBLISH = _script("heartbeat"), _script("publish"), _script("unpublish")
_LOOKUP, _REAP = _script("lookup"), _script("reap")


class Keys:
    """The names of one namespace's keys. The braces keep them on one shard of a Redis cluster."""

    def __init__(self, namespace: str) -> None:
        prefix = f"tandem:{{{namespace}}}:"
        self.stores = prefix + "stores"
        self.events = prefix + "events"
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
        self._link = Link(redis_url, LOOKUP_S)
        self._keys = Keys(namespace)
        self._closed_until = 0.0  # on the monotonic clock

    async def lookup(self, hashes: Sequence[bytes]) -> list[tuple[Owner, ...]]:
        """The owners of each block of the longest prefix of the chain that live stores have."""
        found: list[tuple[Owner, ...]] = []
        for start in range(0, len(hashes), BATCH):
            part = hashes[start : start + BATCH]
            answer = await self._lookup(part)
            found += answer
            if len(answer) < len(part):
                break
        return found

    async def _lookup(self, hashes: Sequence[bytes]) -> list[tuple[Owner, ...]]:
        if time.monotonic() < self._closed_until:
            return []
        try:
            blocks = await self._link.script(_LOOKUP, [self._keys.stores, *self._keys.blocks(hashes)], [])
        except Unavailable as error:
            log.warning("lookups are misses for %.0f s: %s", BREAKER_S, error.message)
            self._closed_until = time.monotonic() + BREAKER_S
            return []
        return [tuple(Owner(o[0].decode(), o[1].decode(), int(o[2]), int(o[3])) for o in owners) for owners in blocks]

    async def close(self) -> None:
        await self._link.close()


class Standing(enum.Enum):
    """What Redis says to a store's heartbeat."""

    REPLACED = 0  # a newer start of the same store has taken over
    CURRENT = 1
    FORGOTTEN = 2  # Redis did not know the store: whatever it had published is lost


class IndexWriter:
    """What one start of one store says about itself. Every method raises Unavailable when Redis does not answer."""

    def __init__(self, redis_url: str, namespace: str, store_id: str, epoch: int, address: str) -> None:
        self._link = Link(redis_url, UPDATE_S)
        self._keys = Keys(namespace)
        self._store_id = store_id
        self._epoch = epoch
        self._address = address

    async def claim(self) -> None:
        """Become the store's current start, and remove what earlier ones published. Comes before any `publish`."""
        await self._beat(claim=True)
        await self.reap(self._store_id)

    async def heartbeat(self) -> tuple[Standing, list[str]]:
        """Be found for another 10 s. Also returns the stores that died long ago: somebody should `reap` them."""
        return await self._beat(claim=False)

    async def publish(self, blocks: Sequence[Change]) -> bool:
        """At most BATCH blocks can be found here. False: nothing was done, as the next heartbeat will explain."""
        arguments: list[bytes | str | int] = [self._store_id, self._epoch, EVENTS_KEPT]
        for block in blocks:
            arguments += [block.hash, block.generation]
        return bool(await self._link.script(_PUBLISH, self._all(self._store_id, [b.hash for b in blocks]), arguments))

    async def unpublish(self, hashes: Sequence[bytes]) -> int:
        """At most BATCH blocks are gone. Returns how many of them were known."""
        arguments: list[bytes | str | int] = [self._store_id, self._epoch, EVENTS_KEPT, *hashes]
        return int(await self._link.script(_UNPUBLISH, self._all(self._store_id, hashes), arguments))

    async def reap(self, store_id: str) -> None:
        """Remove what a dead store, or an earlier start of this one, has published. O(its blocks), BATCH at a time."""
        while hashes := await self._link.command("SRANDMEMBER", self._keys.own(store_id), BATCH):
            arguments = [store_id, EVENTS_KEPT, *hashes]
            if await self._link.script(_REAP, self._all(store_id, hashes), arguments) == 0:
                return  # it is back, and what is left is its own
        if store_id != self._store_id:
            await self._link.command("HDEL", self._keys.stores, store_id)

    async def leave(self) -> None:
        """Stop being found at once."""
        await self._link.command("HDEL", self._keys.stores, self._store_id)

    async def close(self) -> None:
        await self._link.close()

    async def _beat(self, claim: bool) -> tuple[Standing, list[str]]:
        arguments: list[bytes | str | int] = [self._store_id, self._epoch, self._address, TTL_MS, GRACE_MS, int(claim)]
        standing, dead = await self._link.script(_HEARTBEAT, [self._keys.stores], arguments)
        return Standing(standing), [store.decode() for store in dead]

    def _all(self, store_id: str, hashes: Sequence[bytes]) -> list[bytes | str]:
        return [self._keys.stores, self._keys.own(store_id), self._keys.events, *self._keys.blocks(hashes)]
