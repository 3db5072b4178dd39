"""A node's block store: it owns an arena and answers writers and readers over gRPC.

Bytes go in through shared memory only: a writer reserves slabs, copies and seals. They come out the same way or, for
other machines, in frames. All decisions are `Ledger`'s; this file gives it a clock, keeps the arena's generations in
step, wakes followers and lets `Publisher` tell Redis. A start has a random epoch and an empty arena.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from cluster.errors import EpochMismatch, Expired, LayoutMismatch, NoSpace, ProtocolError, StartupError
from cluster.identity import Identity
from cluster.messages import Ack, StoreInfo
from cluster.rpc import Server, Unary
from cluster.store_messages import (
    MEMORY,
    Fetch,
    Find,
    Finish,
    Follow,
    FollowEnd,
    Found,
    Fragment,
    Held,
    Hello,
    Hold,
    Release,
    Reserve,
    Reserved,
    Revoke,
    Seal,
    Session,
    Slab,
    StatRequest,
    StoreStat,
    Welcome,
)
from kvstore.arena import Arena, machine_id
from kvstore.hashing import vectors_digest
from kvstore.layout import Layout
from kvstore.ledger import Ledger, Transfer
from kvstore.presence import present
from kvstore.publisher import Publisher
from kvstore.slabs import Entry, Slabs, State

TICK_S = 0.2  # how late a hold may expire that nobody asks for, or a dead writer's slab be freed
SESSION_ACK_S = 1.0
FRAME_BYTES = 2**20
EPOCH_BITS = 52  # exact in Lua, whose numbers are doubles
CLIENT_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")  # becomes part of a file's name
log = logging.getLogger(__name__)


class StoreServer:
    """One start of one store. Without a `redis_url` in its identity it serves unannounced."""

    def __init__(self, store_id: str, layout: Layout, memory: int, identity: Identity) -> None:
        self._store_id = store_id
        self._layout = layout
        self._identity = identity
        self._epoch = secrets.randbits(EPOCH_BITS) | 1  # never 0
        self._arena = Arena.create(store_id, layout, memory, self._epoch)
        self._ledger = Ledger(Slabs(self._arena.slabs))
        self._sealed_bytes = 0
        self._news: dict[str, set[asyncio.Event]] = {}  # transfer -> its followers, each woken to look again
        self._ghosts: set[str] = set()  # clients without a session whose process may still write
        self._server: Server | None = None
        self._publisher: Publisher | None = None
        self._ticker: asyncio.Task[None] | None = None

    async def start(self, port: int = 0) -> StoreInfo:
        """Serve. Raises StartupError when the address cannot be bound."""
        calls: dict[str, Unary] = {
            "Hello": self._hello,
            "Reserve": self._reserve,
            "Seal": self._seal,
            "Finish": self._finish,
            "Revoke": self._revoke,
            "Hold": self._hold,
            "Release": self._release,
            "Find": self._find,
            "Stat": self._stat,
        }
        self._server = Server(
            self._identity.secret, calls, {"Session": self._session, "Follow": self._follow, "Fetch": self._fetch}
        )
        try:
            address = await self._server.start(self._identity.host, port)
        except RuntimeError as error:
            self._arena.close()
            raise StartupError(f"the block store cannot listen on {self._identity.host}:{port} ({error})") from None
        info = StoreInfo(
            id=self._store_id,
            address=address,
            node=socket.gethostname(),
            pid=os.getpid(),
            namespace=self._identity.namespace,
            epoch=self._epoch,
        )
        if self._identity.redis_url:
            self._publisher = Publisher(self._identity.redis_url, info, self._ledger.slabs.findable)
            self._publisher.start()
        self._ticker = asyncio.create_task(self._tick(), name="store ticker")
        return info

    async def stop(self) -> None:
        """Stop serving and remove the arena."""
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        if self._publisher is not None:
            await self._publisher.stop()
        if self._server is not None:
            await self._server.stop()
        self._arena.close()

    # ------------------------------------------------------------------------------------------------------- writers
    async def _hello(self, message: Hello, _: Any) -> Welcome:
        if message.layout != self._layout.fingerprint:
            raise LayoutMismatch(f"{message.client_id} has another block layout than this store; serve one model each")
        if message.hash_vectors != vectors_digest():
            raise LayoutMismatch(f"{message.client_id} hashes blocks differently; run one version of Tandem everywhere")
        return Welcome(self._epoch, machine_id(), str(self._arena.path), self._arena.slabs)

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
        self._exorcise()

    def _exorcise(self) -> None:
        """Free what writers had reserved that are dead by now."""
        for client_id in [c for c in self._ghosts if not present(self._arena.path, c)]:
            self._ghosts.discard(client_id)
            self._ledger.forget(client_id)

    async def _reserve(self, message: Reserve, _: Any) -> Reserved:
        now = time.monotonic()
        hold_s = message.hold_ms / 1000
        slabs = self._ledger.reserve(message.transfer_id, message.client_id, message.blocks, hold_s, now)
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
            self._publish()
        return Reserved(slabs)

    async def _seal(self, message: Seal, _: Any) -> Ack:
        if any(len(block.checksums) != 4 * self._layout.cells for block in message.blocks):
            raise ProtocolError(f"a seal needs {self._layout.cells} checksums a block")
        new = self._ledger.seal(message.transfer_id, message.blocks, time.monotonic())
        self._sealed_bytes += new * self._layout.block_bytes
        self._notify(message.transfer_id)
        self._publish()
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

    async def _follow(self, message: Follow, context: Any) -> AsyncIterator[Fragment | FollowEnd]:
        if message.epoch != self._epoch:
            raise EpochMismatch("the store has restarted since this handoff was made; recompute it")
        transfer = self._ledger.follow(message.transfer_id, time.monotonic())
        news = asyncio.Event()
        self._news.setdefault(transfer.id, set()).add(news)
        context.add_done_callback(lambda _: self._unfollow(transfer, news))
        position = message.start
        while True:
            news.clear()
            while position < len(transfer.entries) and (entry := transfer.sealed(position)):
                tokens = transfer.keys[position].tokens
                for fragment in self._fragments(position, tokens, entry, message.inline):
                    yield fragment
                position += 1
            if transfer.failure is not None:
                yield FollowEnd(None, transfer.failure.code, transfer.failure.message)
                return
            if transfer.finished:
                yield FollowEnd(transfer.first_token, "", "")
                return
            await news.wait()  # ends with the caller's deadline at the latest

    async def _find(self, message: Find, _: Any) -> Found:
        found = 0
        for name in message.hashes:
            if self._ledger.slabs.find(name) is None:
                break
            found += 1
        return Found(bytes([MEMORY]) * found)

    async def _fetch(self, message: Fetch, context: Any) -> AsyncIterator[Fragment | FollowEnd]:
        if message.epoch != self._epoch:
            raise EpochMismatch("the store has restarted since it was found; look again")
        slabs = self._ledger.slabs
        pinned: list[Entry] = []
        for name in message.hashes:
            entry = slabs.find(name)
            if entry is None:
                break
            slabs.hold(entry)
            pinned.append(entry)
        context.add_done_callback(lambda _: self._unpin(pinned))
        for position, entry in enumerate(pinned):
            for fragment in self._fragments(position, self._layout.tokens, entry, message.inline):
                yield fragment
        missing = len(message.hashes) - len(pinned)
        yield FollowEnd(None, Expired.code if missing else "", f"{missing} blocks are not here" if missing else "")

    def _unpin(self, pinned: list[Entry]) -> None:
        for entry in reversed(pinned):
            self._ledger.slabs.drop(entry)

    def _fragments(self, position: int, tokens: int, entry: Entry, inline: bool) -> Iterator[Fragment]:
        slab = Slab(entry.index, entry.generation, sealed=True)
        if not inline:
            yield Fragment(position, tokens, slab, entry.checksums, 0, b"", last=True)
            return
        data = self._arena.slab(entry.index)
        for offset in range(0, len(data), FRAME_BYTES):
            last = offset + FRAME_BYTES >= len(data)
            frame = data[offset : offset + FRAME_BYTES].tobytes()
            yield Fragment(position, tokens, slab, entry.checksums if last else b"", offset, frame, last)

    def _unfollow(self, transfer: Transfer, news: asyncio.Event) -> None:
        self._ledger.unfollow(transfer, time.monotonic())
        self._news[transfer.id].discard(news)
        if not self._news[transfer.id]:
            del self._news[transfer.id]

    # ------------------------------------------------------------------------------------------------------ the rest
    async def _stat(self, _: StatRequest, __: Any) -> StoreStat:
        self._ledger.expire(time.monotonic())
        counts = self._ledger.slabs.counts
        return StoreStat(
            slabs=self._arena.slabs,
            free=counts[State.FREE],
            reserved=counts[State.RESERVED],
            held=counts[State.HELD],
            cached=counts[State.CACHED],
            quarantined=counts[State.QUARANTINED],
            transfers=len(self._ledger.transfers),
            block_bytes=self._layout.block_bytes,
            epoch=self._epoch,
            sealed_bytes_total=self._sealed_bytes,
            evictions_total=self._ledger.slabs.evictions,
            expired_total=self._ledger.expired,
        )

    def _notify(self, transfer_id: str) -> None:
        for news in self._news.get(transfer_id, ()):
            news.set()

    def _publish(self) -> None:
        changes = self._ledger.slabs.take_changes()
        if self._publisher is not None:
            self._publisher.put(changes)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._ledger.expire(time.monotonic())
            self._exorcise()
