"""The prefill end of a handoff: blocks go from a worker's KV cache into its node's store.

A writer shares its store's memory and holds two signs of life: a session stream, whose end tells the store to give up
what is not sealed, and a locked file, which says when nobody can be writing to it any more. It reserves and seals; how
bytes come into slabs is for `slab_writer` to say, and for others who copy for several shards.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from cluster.errors import DeadlineExceeded, Expired, StoreError, TandemError, Unavailable, WorkerLost
from cluster.messages import Ack, Handoff
from cluster.store_messages import BlockKey, Finish, Release, Reserve, Reserved, Revoke, Seal, Sealed, Session, Slab
from kvstore.client import CALL_S, StoreClient
from kvstore.layout import Layout
from kvstore.presence import Presence
from kvstore.slab_writer import BlockSource

SILENCE_S = 5.0  # a store says something every second
SEAL_BYTES = 32 * 2**20  # of blocks that are copied before the store is told
STORE_HOLD_MS = 5_000  # of blocks outside handoffs, from the reservation to the release
log = logging.getLogger(__name__)


class HandoffWriter:
    """Make one per StoreClient, then `connect`; when `connected` turns false its transfers are lost: make a new pair.

    `source` copies blocks that nobody changes until `send` returns."""

    def __init__(self, client: StoreClient, layout: Layout, source: BlockSource) -> None:
        self.connected = False
        self._client = client
        self._layout = layout
        self._source = source
        self._transfers: dict[str, tuple[Slab, ...]] = {}  # transfer -> the slab of each of its blocks
        self._copies: set[asyncio.Task[Sequence[bytes]]] = set()  # under way
        self._revokes: set[asyncio.Task[None]] = set()
        self._serial = itertools.count()  # numbers the transfers of `store`
        self._presence: Presence | None = None
        self._session: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Raises StoreError when the store is on another machine, and what `StoreClient.connect` raises."""
        try:
            await self._client.connect(writable=True)
            if self._client.arena is None:
                raise StoreError(
                    f"the memory of the store at {self._client.address} cannot be mapped here; see its log"
                )
            self._presence = Presence(self._client.arena.path, self._client.client_id)
            acks = self._client.stream("Session", Session(self._client.client_id), None)
            await _next(acks, CALL_S)
        except BaseException:
            await self.close()
            raise
        self.connected = True
        self._session = asyncio.create_task(self._watch(acks), name="store session")

    async def close(self) -> None:
        """Let go of the store once the copies that are under way have ended."""
        self.connected = False
        if self._copies or self._revokes:
            await asyncio.wait(self._copies | self._revokes)
        if self._presence is not None:
            self._presence.close()
            self._presence = None
        if self._session is not None:
            self._session.cancel()
            await asyncio.gather(self._session, return_exceptions=True)
        await self._client.close()

    @property
    def busy(self) -> bool:
        """Whether transfers are under way that would be lost with the connection."""
        return bool(self._transfers)

    async def reserve(
        self, transfer_id: str, names: Sequence[BlockKey | bytes], tokens: int, hold_ms: int, tenant: str = ""
    ) -> Handoff:
        """Room for the KV of `tokens`, whose full blocks have these names. A bare hash can be stored under but not
        verified later. Raises NoSpace when it is not all there."""
        full, rest = divmod(tokens, self._layout.tokens)
        assert len(names) == full, f"{len(names)} names for {full} full blocks"
        keys = [name if isinstance(name, BlockKey) else BlockKey(name, self._layout.tokens) for name in names]
        if rest:
            keys.append(BlockKey(b"", rest))
        self._check_connected()
        request = Reserve(transfer_id, self._client.client_id, tuple(keys), hold_ms, tenant)
        try:
            reserved: Reserved = await self._client.call("Reserve", request)
        except (Unavailable, asyncio.CancelledError):
            # the answer may be on its way, and space that nobody knows of would stay reserved
            self._give_back_later(transfer_id, "its writer did not wait")
            raise
        self._transfers[transfer_id] = reserved.slabs
        return Handoff(self._client.address, self._client.epoch, transfer_id)

    async def send(self, transfer_id: str, blocks: Sequence[tuple[int, int]]) -> None:
        """Copy the (position in the transfer, block id) pairs and seal them; what the store has already is skipped.

        Raises Expired or whatever else ended the transfer; it is given up then."""
        self._check_connected()
        slabs = self._transfers.get(transfer_id)
        if slabs is None:
            raise Expired(f"transfer {transfer_id} has ended; reserve again")
        todo = [(position, block, slabs[position]) for position, block in blocks if not slabs[position].sealed]
        if not todo:
            return
        try:
            await self._copy_and_seal(transfer_id, todo)
        except TandemError:
            # nothing is being copied, so the store may have the space back even if it had put it into quarantine
            await self._give_back(transfer_id, "Seal failed")
            raise

    async def finish(self, transfer_id: str, first_token: int | None) -> None:
        """Every block is sent. `first_token` was sampled after the last one; None: nothing was."""
        try:
            await self._client.call("Finish", Finish(transfer_id, first_token))
        except TandemError:
            await self._give_back(transfer_id, "Finish failed")
            raise
        self._transfers.pop(transfer_id, None)

    async def store(self, keys: Sequence[BlockKey], block_ids: Sequence[int], tenant: str) -> int:
        """Write full blocks that belong to no handoff, all or none; returns how many the store did not have already.

        Raises NoSpace, and what `send` raises."""
        transfer_id = f"{self._client.client_id}+{next(self._serial)}"
        await self.reserve(transfer_id, keys, len(keys) * self._layout.tokens, STORE_HOLD_MS, tenant)
        new = sum(not slab.sealed for slab in self._transfers[transfer_id])
        try:
            await self.send(transfer_id, list(enumerate(block_ids)))
            await self._client.call("Release", Release(transfer_id))
        except (TandemError, asyncio.CancelledError):
            self._give_back_later(transfer_id, "its writer gave up")
            raise
        finally:
            self._transfers.pop(transfer_id, None)
        return new

    async def revoke(self, transfer_id: str, reason: str) -> None:
        """Give a transfer up; its space is free at once. Call it when no `send` of the transfer is under way."""
        self._transfers.pop(transfer_id, None)
        await self._client.call("Revoke", Revoke(transfer_id, reason))

    async def _copy_and_seal(self, transfer_id: str, todo: Sequence[tuple[int, int, Slab]]) -> None:
        """Some blocks are copied while the store is told of those before, and readers can start on these. A seal that
        fails shows when no copy is under way."""
        step = max(1, SEAL_BYTES // self._layout.block_bytes)
        sealing: asyncio.Task[Any] | None = None
        try:
            for first in range(0, len(todo), step):
                positions, blocks, slabs = zip(*todo[first : first + step], strict=True)
                copying = self._source.write(self._client, transfer_id, blocks, slabs)
                task = asyncio.create_task(copying)
                self._copies.add(task)
                task.add_done_callback(self._copies.discard)
                sealed = tuple(map(Sealed, positions, await task))
                if sealing is not None:
                    await sealing
                sealing = asyncio.create_task(self._client.call("Seal", Seal(transfer_id, sealed)))
            if sealing is not None:
                await sealing
        finally:
            if sealing is not None:
                sealing.cancel()
                await asyncio.gather(sealing, return_exceptions=True)

    def _give_back_later(self, transfer_id: str, reason: str) -> None:
        task = asyncio.create_task(self._give_back(transfer_id, reason))
        self._revokes.add(task)
        task.add_done_callback(self._revokes.discard)

    async def _give_back(self, transfer_id: str, reason: str) -> None:
        try:
            await self.revoke(transfer_id, reason)
        except TandemError as error:
            log.warning("transfer %s could not be revoked, its hold will run out: %s", transfer_id, error.message)

    def _check_connected(self) -> None:
        if not self.connected:
            raise WorkerLost(f"the connection to the store at {self._client.address} is lost; connect again")

    async def _watch(self, acks: AsyncIterator[Ack]) -> None:
        try:
            while True:
                await _next(acks, SILENCE_S)
        except TandemError as error:
            log.warning("the session with the store at %s ended: %s", self._client.address, error.message)
        finally:
            self.connected = False
            self._transfers.clear()


async def _next(acks: AsyncIterator[Ack], timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await anext(acks)
    except TimeoutError:
        raise DeadlineExceeded("the store is silent") from None
    except StopAsyncIteration:
        raise WorkerLost("the store closed the session") from None
