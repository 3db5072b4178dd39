"""Who has which blocks of a chain: the node's own store says so itself, the index in Redis knows about the others.

The own store's answer is true when it is given; the index may be stale, empty, dead or lying. Both are only used to
decide whom to ask for bytes: the store that is asked checks its epoch and its hashes, the reader checks the rest.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from cluster.errors import TandemError
from cluster.store_messages import DISK, Find, Found
from kvstore.connections import Connections
from kvstore.fetcher import Path, Source
from kvstore.index import Index, Owner

FIND_S = 0.050  # in the way of the first token; a miss costs less than a slow answer
FIND_LIMIT = 4096  # hashes in one question
log = logging.getLogger(__name__)


class Locator:
    """`index` is None where there is no Redis: then only the own store is asked."""

    def __init__(self, index: Index | None, connections: Connections) -> None:
        self._index = index
        self._connections = connections

    async def locate(self, hashes: Sequence[bytes], near: str, near_epoch: int | None) -> list[Source]:
        """The longest prefix of the chain that stores are said to have, in runs. `near` is the address of this node's
        store, empty when there is none. Never raises: at worst nothing is known."""
        runs, found = await self._find(hashes[:FIND_LIMIT], near, near_epoch) if near and hashes else ([], 0)
        if self._index is None or found == len(hashes):
            return runs
        owners = await self._index.lookup(hashes[found:])
        now = time.monotonic()
        reputation = self._connections.reputation
        good = [[owner for owner in each if not reputation.avoided(owner.address, now)] for each in owners]
        return runs + far_sources(found, good, self._is_mapped)

    async def _find(self, hashes: Sequence[bytes], near: str, epoch: int | None) -> tuple[list[Source], int]:
        """What the own store has, and how many blocks that is."""
        if self._connections.reputation.avoided(near, time.monotonic()):
            return [], 0
        try:
            async with asyncio.timeout(FIND_S):
                client = await self._connections.get(near, epoch)
                found: Found = await client.call("Find", Find(tuple(hashes)), FIND_S)
        except (TimeoutError, TandemError) as error:
            log.info("the store at %s is not asked for blocks: %s", near, error)
            return [], 0
        tiers = found.tiers[: len(hashes)]
        return near_sources(near, client.epoch, tiers, mapped=client.arena is not None), len(tiers)

    def _is_mapped(self, owner: Owner) -> bool:
        client = self._connections.known(owner.address, owner.epoch)
        return client is not None and client.arena is not None


def near_sources(store: str, epoch: int, tiers: bytes, *, mapped: bool) -> list[Source]:
    """The runs of blocks that are in the same tier of this node's store."""
    memory: Path = "memory" if mapped else "remote"
    runs: list[Source] = []
    for block, tier in enumerate(tiers):
        if block == 0 or tier != tiers[block - 1]:
            path: Path = "disk" if tier == DISK else memory
            runs.append(Source(store, epoch, block, block + 1, path))
        else:
            last = runs[-1]
            runs[-1] = Source(store, epoch, last.start, block + 1, last.path)
    return runs


def far_sources(first: int, owners: Sequence[Sequence[Owner]], is_mapped: Callable[[Owner], bool]) -> list[Source]:
    """Runs for the blocks `first`.. whose owners are given, to the first that has none. An owner whose memory is mapped
    here goes before any other; among equals the one that has most of the blocks that follow, for fewer streams."""
    reach = _reach(owners)
    mapped = [{_start(owner): is_mapped(owner) for owner in each} for each in owners]
    runs: list[Source] = []
    block = 0
    while block < len(owners) and owners[block]:
        here = mapped[block]
        best = max(here, key=lambda start: (here[start], reach[block][start]))
        stop = block + 1
        while stop < block + reach[block][best] and (here[best] or not any(mapped[stop].values())):
            stop += 1
        runs.append(Source(*best, first + block, first + stop, "memory" if here[best] else "remote"))
        block = stop
    return runs


def _start(owner: Owner) -> tuple[str, int]:
    """One start of one store."""
    return owner.address, owner.epoch


def _reach(owners: Sequence[Sequence[Owner]]) -> list[dict[tuple[str, int], int]]:
    """For each block, its owners -> how many blocks from this one on they have without a gap."""
    reach: list[dict[tuple[str, int], int]] = [{} for _ in owners]
    after: dict[tuple[str, int], int] = {}
    for block in range(len(owners) - 1, -1, -1):
        after = reach[block] = {start: 1 + after.get(start, 0) for start in map(_start, owners[block])}
    return reach
