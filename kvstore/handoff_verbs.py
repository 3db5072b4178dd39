"""What writers and followers of handoffs call: the `Ledger` over gRPC.

It gives the ledger a clock, keeps the arena's generations in step and wakes followers; every decision is the ledger's.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from cluster import telemetry
from cluster.errors import EpochMismatch, NoSpace, ProtocolError
from cluster.messages import Ack
from cluster.rpc import Stream, Unary
from cluster.store_messages import (
    Finish,
    Follow,
    FollowEnd,
    Fragments,
    Held,
    Hold,
    Put,
    Release,
    Reserve,
    Reserved,
    Revoke,
    Seal,
    Session,
)
from kvstore.frames import frames
from kvstore.layout import Layout
from kvstore.ledger import Ledger, Transfer
from kvstore.limits import asked_part, check_put, check_reserve, check_seal
from kvstore.presence import present
from kvstore.tiers import Tiers

SESSION_ACK_S = 1.0
CLIENT_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")  # becomes part of a file's name


class HandoffVerbs:
    def __init__(self, ledger: Ledger, tiers: Tiers, layout: Layout) -> None:
        self.sealed_bytes = 0
        self.unary: dict[str, Unary] = {
            "Reserve": self._reserve,
            "Put": self._put,
            "Seal": self._seal,
            "Finish": self._finish,
            "Revoke": self._revoke,
            "Hold": self._hold,
            "Release": self._release,
        }
        self.streams: dict[str, Stream] = {"Session": self._session, "Follow": self._follow}
        self._ledger = ledger
        self._tiers = tiers
        self._arena = tiers.arena
        self._layout = layout
        self._news: dict[str, set[asyncio.Event]] = {}  # transfer -> its followers, each woken to look again
        self._ghosts: set[str] = set()  # clients without a session whose process may still write

    def exorcise(self) -> None:
        """Free what writers had reserved that are dead by now."""
        for client_id in [c for c in self._ghosts if not present(self._arena.path, c)]:
            self._ghosts.discard(client_id)
            self._ledger.forget(client_id)

    # ------------------------------------------------------------------------------------------------------- writers
    async def _session(self, message: Session, context: Any) -> AsyncIterator[Ack]:
        client_id = message.client_id
        if not CLIENT_ID.fullmatch(client_id):
            raise ProtocolError(f"{client_id!r} is no client id: letters, digits, dots, dashes and underscores only")
        self._ledger.open_session(client_id)
        # not `finally`: it would not run before garbage collection when the stream breaks while a message is sent
        context.add_done_callback(lambda _: self._close_session(client_id))
        while True:
            yield Ack()
            await asyncio.sleep(SESSION_ACK_S)

    def _close_session(self, client_id: str) -> None:
        for transfer in self._ledger.close_session(client_id):
            self._notify(transfer.id)
        self._ghosts.add(client_id)
        self.exorcise()

    async def _reserve(self, message: Reserve, _: Any) -> Reserved:
        check_reserve(message, self._layout)
        with telemetry.span("store reserve", telemetry.caller(), {"tandem.blocks": len(message.blocks)}):
            return await self._make_room(message)

    async def _make_room(self, message: Reserve) -> Reserved:
        now = time.monotonic()
        hold_s = message.hold_ms / 1000
        slabs = self._ledger.reserve(
            message.transfer_id, message.client_id, message.blocks, hold_s, now, message.tenant
        )
        fresh = [slab for slab in slabs if not slab.sealed]
        try:
            for slab in fresh:
                self._arena.set_generation(slab.index, slab.generation)
            await asyncio.to_thread(self._arena.commit, [slab.index for slab in fresh])
        except (NoSpace, asyncio.CancelledError):
            # the writer never heard of these slabs
            self._ledger.revoke(message.transfer_id, "the store could not reserve it", time.monotonic())
            raise
        finally:
            self._tiers.settle()
        return Reserved(slabs)

    async def _put(self, message: Put, _: Any) -> Ack:
        """Not in a thread: between the look at who has the slabs and the copy nothing may happen."""
        check_put(message, self._layout)
        self._ledger.check_writable(message.transfer_id, [part.slab for part in message.fragments], time.monotonic())
        for part in message.fragments:
            end = part.offset + len(part.data)
            self._arena.slab(part.slab.index)[part.offset : end] = np.frombuffer(part.data, np.uint8)
        return Ack()

    async def _seal(self, message: Seal, _: Any) -> Ack:
        check_seal(message, self._layout)
        new = self._ledger.seal(message.transfer_id, message.blocks, time.monotonic())
        self.sealed_bytes += new * self._layout.block_bytes
        self._notify(message.transfer_id)
        self._tiers.settle()
        return Ack()

    async def _finish(self, message: Finish, _: Any) -> Ack:
        self._ledger.finish(message.transfer_id, message.first_token, time.monotonic())
        self._notify(message.transfer_id)
        return Ack()

    async def _revoke(self, message: Revoke, _: Any) -> Ack:
        self._ledger.revoke(message.transfer_id, message.reason, time.monotonic())
        self._notify(message.transfer_id)
        return Ack()

    # ------------------------------------------------------------------------------------------------------- readers
    async def _hold(self, message: Hold, _: Any) -> Held:
        return Held(int(1000 * self._ledger.hold(message.transfer_id, message.ttl_ms / 1000, time.monotonic())))

    async def _release(self, message: Release, _: Any) -> Ack:
        self._ledger.release(message.transfer_id, time.monotonic())
        return Ack()

    async def _follow(self, message: Follow, context: Any) -> AsyncIterator[Fragments | FollowEnd]:
        if message.epoch != self._arena.epoch:
            raise EpochMismatch("the store has restarted since this handoff was made; recompute it")
        part = asked_part(message.rectangle, self._layout)
        transfer = self._ledger.follow(message.transfer_id, time.monotonic())
        news, position = asyncio.Event(), message.start
        self._news.setdefault(transfer.id, set()).add(news)
        span = telemetry.start("store follow", telemetry.caller(), {"tandem.inline": message.inline})
        context.add_done_callback(lambda _: self._unfollow(transfer, news))
        context.add_done_callback(lambda _: telemetry.end(span, {"tandem.blocks": position - message.start}))
        while True:
            news.clear()
            ready = transfer.ready(position)
            for frame in frames(self._arena, part, ready, message.inline):
                yield frame
            position += len(ready)
            if ready:
                continue  # more may have come while these were sent
            if transfer.failure is not None:
                yield FollowEnd(None, transfer.failure.code, transfer.failure.message)
                return
            if transfer.finished:
                yield FollowEnd(transfer.first_token, "", "")
                return
            await news.wait()  # ends with the caller's deadline at the latest

    def _unfollow(self, transfer: Transfer, news: asyncio.Event) -> None:
        self._ledger.unfollow(transfer, time.monotonic())
        self._news[transfer.id].discard(news)
        if not self._news[transfer.id]:
            del self._news[transfer.id]

    def _notify(self, transfer_id: str) -> None:
        for news in self._news.get(transfer_id, ()):
            news.set()
