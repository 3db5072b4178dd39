"""The blocks of one store, wherever they lie: in memory (`Slabs`), on the disk (`DiskTier`), or in both.

    seal ──► memory ── nobody holds it: write-behind ──► memory and disk ── evicted from memory ──► disk
                ▲                                                                                     │
                └──────────────────────────────── promote, for a reader ──────────────────────────────┘

A block is published when it is first in any tier and withdrawn when it is in none. Without a disk folder there is just
memory, and everything here is cheap.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from cluster.errors import NoSpace
from cluster.store_messages import DISK, MEMORY
from kvstore.arena import Arena
from kvstore.block_file import Header
from kvstore.copying import in_thread
from kvstore.disk import THREADS, DiskTier
from kvstore.publisher import Publisher
from kvstore.slabs import Change, Entry, Slabs, State
from kvstore.write_behind import WriteBehind

PROMOTIONS = THREADS - 1  # at once; the others wait without slabs, so a disk that hangs takes few from everybody


class Tiers:
    """`publisher` is set once the store has an address to publish."""

    def __init__(self, arena: Arena, slabs: Slabs, disk: DiskTier | None) -> None:
        self.arena = arena
        self.slabs = slabs
        self.disk = disk
        self.publisher: Publisher | None = None
        self._write_behind = WriteBehind(arena, slabs, disk) if disk is not None else None
        self._slots = asyncio.Semaphore(PROMOTIONS)
        self._promoting: Counter[bytes] = Counter()  # hash -> reads from the disk that are under way
        self._announced: set[bytes] = set()  # hashes of which the publisher knows that they are here

    async def open(self) -> None:
        """Find what the disk has. Raises StartupError."""
        if self.disk is not None and self._write_behind is not None:
            await self.disk.open()
            self._announced.update(self.disk.names())
            self._write_behind.start()

    async def close(self, flush_s: float) -> None:
        """Write what is not on the disk yet, for at most so long, and let go of it."""
        if self.disk is not None and self._write_behind is not None:
            await self._write_behind.stop(flush_s)
            self.disk.close()

    def tier(self, name: bytes) -> int | None:
        """MEMORY, DISK, or None: it is not here."""
        if self.slabs.find(name) is not None:
            return MEMORY
        return DISK if self.disk is not None and name in self.disk else None

    def names(self) -> list[bytes]:
        """Hashes of all blocks, once each."""
        disk = self.disk.names() if self.disk is not None else []
        return self.slabs.names() + [name for name in disk if self.slabs.find(name) is None]

    def findable(self) -> list[Change]:
        """Everything that can be found now, in any tier."""
        return [self._change(name) for name in self.names()]

    def settle(self) -> None:
        """Publish what became findable or stopped being so, and queue for the disk what nobody holds any more."""
        touched = [change.hash for change in self.slabs.take_changes()]
        if self.disk is not None:
            touched += self.disk.take_changed()
        changes = []
        for name in dict.fromkeys(touched):
            change = self._change(name)
            if change.present != (name in self._announced):
                (self._announced.add if change.present else self._announced.discard)(name)
                changes.append(change)
        if self.publisher is not None and changes:
            self.publisher.put(changes)
        idle = self.slabs.take_idle()
        if self._write_behind is not None:
            self._write_behind.put(idle)

    def in_use(self, name: bytes) -> bool:
        """Whether somebody holds the block, or is reading it from the disk."""
        entry = self.slabs.find(name)
        return self._promoting[name] > 0 or (entry is not None and entry.state is State.HELD)

    def touch(self, names: Sequence[bytes]) -> None:
        """These have been read, the last one last: they go last from the disk too."""
        if self.disk is not None:
            self.disk.touch(names)

    def pin(self, names: Sequence[bytes], pinned: bool) -> int:
        """Returns how many of them took."""
        taken = self.slabs.pin(names, pinned)
        if self.disk is not None:
            for name in taken:
                self.disk.pin(name, pinned)
        return len(taken)

    async def drop(self, names: Sequence[bytes]) -> int:
        """Forget these blocks in every tier, those in use excepted. Returns how many were here."""
        dropped = [name for name in dict.fromkeys(names) if self.tier(name) is not None and not self.in_use(name)]
        for name in dropped:
            self.slabs.forget(name)
        if self.disk is not None:
            await self.disk.remove(dropped)
        self.settle()
        return len(dropped)

    async def promote(self, names: Sequence[bytes], used_ns: int) -> list[Entry]:
        """Hold these blocks for a reader, reading from the disk what is not in memory, up to the first that is not to
        be had. Evicts what nobody holds. Not to be cancelled: slabs would get lost."""
        async with self._slots:
            entries = self._take(names)
            fresh = [i for i, entry in enumerate(entries) if entry.state is State.RESERVED]
            read = await self._read([(names[i], entries[i]) for i in fresh], used_ns)
        headers = dict(zip(fresh, read, strict=True))
        held: list[Entry] = []
        for i, entry in enumerate(entries):
            header = headers.get(i)
            if header is not None:
                entry = self.slabs.seal(entry, header.key, header.checksums, header.tenant)
            if i in headers and header is None:
                self.slabs.release(entry)
            elif len(held) == i:
                held.append(entry)
            else:
                self.slabs.drop(entry)  # what comes after a block that is missing is of no use
        self.settle()
        return held

    def _take(self, names: Sequence[bytes]) -> list[Entry]:
        """The slab of each block up to the first that has neither one nor a file: held, or reserved to be filled."""
        entries: list[Entry] = []
        for name in names:
            entry = self.slabs.find(name)
            if entry is not None:
                self.slabs.hold(entry)
            elif self.slabs.available and self.tier(name) == DISK:
                entry = self.slabs.take()
                self.arena.set_generation(entry.index, entry.generation)
            else:
                break
            entries.append(entry)
        return entries

    async def _read(self, blocks: Sequence[tuple[bytes, Entry]], used_ns: int) -> list[Header | None]:
        if self.disk is None or not blocks:
            return []
        names = [name for name, _ in blocks]
        self._promoting.update(names)
        try:
            await in_thread(lambda: self.arena.commit([entry.index for _, entry in blocks]))
            return await self.disk.read([(name, self.arena.slab(entry.index)) for name, entry in blocks], used_ns)
        except NoSpace:
            return [None] * len(blocks)
        finally:
            self._promoting.subtract(names)
            for name in names:
                if not self._promoting[name]:
                    del self._promoting[name]

    def _change(self, name: bytes) -> Change:
        entry = self.slabs.find(name)
        return Change(name, entry.generation if entry is not None else 0, self.tier(name) is not None)
