"""Blocks of a chain on their way to one reader: held in memory until it has gone, those on the disk read ahead of it.

What is in memory is held at once, so that making room for the rest evicts none of it. The chain ends at the first block
that is nowhere, whose file turns out to be bad, or for which there is no slab.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence

from kvstore.slabs import Entry
from kvstore.tiers import Tiers

READ_BLOCKS = 8  # read from the disk per call of a thread, ...
READ_BYTES = 4 * 2**20  # ... or fewer: the reader gets none of them before all are there


class Chain:
    """`release` it when its reader has gone, however it went."""

    def __init__(self, tiers: Tiers, names: Sequence[bytes]) -> None:
        self._tiers = tiers
        self._entries: list[Entry | None] = []  # position -> slab; None: not in memory yet
        for name in names:
            if tiers.tier(name) is None:
                break
            entry = tiers.slabs.find(name)
            if entry is not None:
                tiers.slabs.hold(entry)
            self._entries.append(entry)
        self._end = len(self._entries)  # blocks that can be had
        self._names = list(names[: self._end])
        self._released = False
        self._news = asyncio.Event()
        self._promotion: asyncio.Task[None] | None = None  # never cancelled: it would lose slabs
        if None in self._entries:
            self._promotion = asyncio.create_task(self._promote(), name="promotion")

    async def ready(self, position: int) -> list[Entry]:
        """The slabs of the blocks from `position` on that are in memory, at least one; to be read until `release`.
        Empty: the chain has ended."""
        while True:
            self._news.clear()
            found = list(itertools.takewhile(lambda entry: entry is not None, self._entries[position : self._end]))
            if found or position >= self._end:
                return [entry for entry in found if entry is not None]
            await self._news.wait()

    def release(self) -> asyncio.Task[None] | None:
        """Let go of everything. Returns what may still be reading from the disk; it lets go when it is done."""
        self._released = True
        for entry in reversed(self._entries):
            if entry is not None:
                self._tiers.slabs.drop(entry)
        self._entries.clear()
        self._end = 0
        self._news.set()
        self._tiers.touch(self._names[::-1])
        return self._promotion

    async def _promote(self) -> None:
        at_once = max(1, min(READ_BLOCKS, READ_BYTES // self._tiers.arena.slab_bytes))
        used_ns = time.time_ns()  # for the files' times, which are wall clock; nothing but an order depends on it
        try:
            while not self._released and None in self._entries:
                start = self._entries.index(None)
                stop = start
                while stop < min(len(self._entries), start + at_once) and self._entries[stop] is None:
                    stop += 1
                held = await self._tiers.promote(self._names[start:stop], used_ns - start)
                if self._released:
                    for entry in reversed(held):
                        self._tiers.slabs.drop(entry)
                    return
                self._entries[start : start + len(held)] = held
                self._news.set()
                if len(held) < stop - start:
                    self._end = start + len(held)
                    return
        except BaseException:
            self._end = 0
            raise
        finally:
            self._news.set()
