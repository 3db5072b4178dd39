"""What readers of cached blocks call: which of a chain are here, and the bytes of those.

A reader is told about a tier only so that it can predict how long fetching takes; fetching is the same for both.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from cluster import telemetry
from cluster.errors import EpochMismatch, Expired
from cluster.rpc import Stream, Unary
from cluster.store_messages import Fetch, Find, FollowEnd, Found, Fragments
from kvstore.chain import Chain
from kvstore.frames import frames
from kvstore.layout import Layout
from kvstore.limits import asked_part, check_hashes
from kvstore.tiers import Tiers


class BlockVerbs:
    def __init__(self, tiers: Tiers, layout: Layout) -> None:
        self.found = self.missed = self.fetched = 0  # blocks
        self.unary: dict[str, Unary] = {"Find": self._find}
        self.streams: dict[str, Stream] = {"Fetch": self._fetch}
        self._tiers = tiers
        self._layout = layout
        self._promotions: set[asyncio.Task[None]] = set()  # still reading for streams that have ended

    async def close(self, timeout_s: float) -> None:
        """Wait until nothing is read from the disk any more, but not for a disk that hangs; the streams have ended."""
        if self._promotions:
            await asyncio.wait(self._promotions, timeout=timeout_s)

    async def _find(self, message: Find, _: Any) -> Found:
        check_hashes(message.hashes)
        began_s = time.monotonic()
        tiers = bytearray()
        for name in message.hashes:
            tier = self._tiers.tier(name)
            if tier is None:
                break
            tiers.append(tier)
        self.found += len(tiers)
        self.missed += len(message.hashes) - len(tiers)
        about = {"tandem.blocks": len(message.hashes), "tandem.found_blocks": len(tiers)}
        telemetry.record("store find", telemetry.caller(), began_s, time.monotonic(), about)
        return Found(bytes(tiers))

    async def _fetch(self, message: Fetch, context: Any) -> AsyncIterator[Fragments | FollowEnd]:
        check_hashes(message.hashes)
        if message.epoch != self._tiers.arena.epoch:
            raise EpochMismatch("the store has restarted since it was found; look again")
        part = asked_part(message.rectangle, self._layout)
        chain = Chain(self._tiers, message.hashes)
        # not `finally`: it would not run before garbage collection when the stream breaks while a message is sent
        context.add_done_callback(lambda _: self._release(chain))
        span, position = telemetry.start("store fetch", telemetry.caller(), {"tandem.inline": message.inline}), 0
        context.add_done_callback(lambda _: telemetry.end(span, {"tandem.blocks": position}))
        while ready := await chain.ready(position):
            blocks = [(position + i, self._layout.tokens, entry) for i, entry in enumerate(ready)]
            for frame in frames(self._tiers.arena, part, blocks, message.inline):
                yield frame
            position += len(ready)
            self.fetched += len(ready)
        missing = len(message.hashes) - position
        yield FollowEnd(None, Expired.code if missing else "", f"{missing} blocks are not here" if missing else "")

    def _release(self, chain: Chain) -> None:
        promotion = chain.release()
        if promotion is not None and not promotion.done():
            self._promotions.add(promotion)
            promotion.add_done_callback(self._promotions.discard)
        self._tiers.settle()
