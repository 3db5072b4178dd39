"""What operators call (`tandem kv`), and readers that were sent wrong bytes: list, pin, drop and verify blocks.

Blocks come and go while these run. Whatever is looked at in a thread is held meanwhile, and whatever was found is
looked up again after every wait.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import partial
from typing import Any

from cluster.errors import ProtocolError
from cluster.rpc import Unary
from cluster.store_messages import DISK, MEMORY, BlockInfo, Count, Drop, List, Listing, Pin, Verify
from kvstore.block_file import named
from kvstore.copying import checksums, in_thread
from kvstore.layout import Layout
from kvstore.limits import MAX_HASHES, check_hashes
from kvstore.tiers import Tiers

VERIFIED_AT_ONCE = 8  # blocks held and checked per call of a thread


class OperatorVerbs:
    def __init__(self, tiers: Tiers, layout: Layout) -> None:
        self.corrupt = 0  # blocks in memory that did not match
        self.unary: dict[str, Unary] = {
            "List": self._list,
            "Pin": self._pin,
            "Drop": self._drop,
            "Verify": self._verify,
        }
        self._tiers = tiers
        self._slabs = tiers.slabs
        self._layout = layout

    async def _list(self, message: List, _: Any) -> Listing:
        if not 0 <= message.limit <= MAX_HASHES:
            raise ProtocolError(f"a page of {message.limit} blocks; ask for 0 to {MAX_HASHES}")
        names = self._tiers.names()
        after = message.after
        while True:
            page = await in_thread(partial(_page, names, message.prefix, after, message.limit))
            blocks = await self._describe(page)
            if blocks or not page:
                return Listing(tuple(blocks), len(names))
            after = page[-1]  # all of them went meanwhile, and an empty page would mean the end

    async def _describe(self, names: Sequence[bytes]) -> list[BlockInfo]:
        disk = self._tiers.disk
        unknown = [name for name in names if self._tiers.tier(name) == DISK]
        headers = dict(zip(unknown, await disk.headers(unknown), strict=True)) if disk is not None else {}
        blocks = []
        for name in names:
            pinned = self._slabs.is_pinned(name)
            entry, header = self._slabs.find(name), headers.get(name)
            if entry is not None:
                key, holders, tenant = entry.key, entry.holders, entry.tenant
                blocks.append(BlockInfo(name, key.parent, key.tokens, MEMORY, holders, pinned, tenant))
            elif header is not None:
                key = header.key
                blocks.append(BlockInfo(name, key.parent, key.tokens, DISK, 0, pinned, header.tenant))
        return blocks

    async def _pin(self, message: Pin, _: Any) -> Count:
        check_hashes(message.hashes)
        return Count(self._tiers.pin(message.hashes, message.pinned))

    async def _drop(self, message: Drop, _: Any) -> Count:
        check_hashes(message.hashes)
        return Count(await self._tiers.drop(message.hashes))

    async def _verify(self, message: Verify, _: Any) -> Count:
        check_hashes(message.hashes)
        names = list(dict.fromkeys(message.hashes))
        corrupt: set[bytes] = set()
        for start in range(0, len(names), VERIFIED_AT_ONCE):
            part = names[start : start + VERIFIED_AT_ONCE]
            corrupt |= await self._verify_memory(part) | await self._verify_disk(part)
            self._tiers.settle()
        return Count(len(corrupt))

    async def _verify_memory(self, names: Sequence[bytes]) -> set[bytes]:
        entries = [entry for name in names if (entry := self._slabs.find(name)) is not None]
        arena, layout = self._tiers.arena, self._layout
        checks = [(entry.key, entry.checksums, arena.slab(entry.index)) for entry in entries]
        for entry in entries:
            self._slabs.hold(entry)
        try:
            good = await in_thread(lambda: [named(key) and checksums(b, layout) == crc for key, crc, b in checks])
            bad = {key.hash for (key, _, _), right in zip(checks, good, strict=True) if not right}
            for entry in entries:
                if entry.hash in bad:  # not forgotten meanwhile, and still the same: it is held
                    self._slabs.forget(entry.hash)
                    self.corrupt += 1
        finally:
            for entry in reversed(entries):
                self._slabs.drop(entry)
        return bad

    async def _verify_disk(self, names: Sequence[bytes]) -> set[bytes]:
        return await self._tiers.disk.check(names) if self._tiers.disk is not None else set()


def _page(names: Sequence[bytes], prefix: bytes, after: bytes, limit: int) -> list[bytes]:
    return heapq.nsmallest(limit, (name for name in names if name > after and name.startswith(prefix)))
