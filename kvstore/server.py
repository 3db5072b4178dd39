"""A node's block store: it owns an arena, and a folder of the disk if it is given one, and answers over gRPC.

Bytes go in through shared memory only: a writer reserves slabs, copies and seals. They come out the same way or, for
other machines, in frames. What can be asked of it is in handoff_verbs.py, block_verbs.py and operator_verbs.py; this
file brings the parts to life, introduces clients, and lets time pass. A start has a random epoch and an empty arena.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

from cluster.errors import LayoutMismatch, StartupError
from cluster.identity import Identity
from cluster.messages import StoreInfo
from cluster.rpc import Server, Unary
from cluster.store_messages import Hello, StatRequest, StoreStat, Welcome
from kvstore.arena import Arena, machine_id
from kvstore.block_verbs import BlockVerbs
from kvstore.buffers import keep_buffers
from kvstore.disk import DiskTier
from kvstore.handoff_verbs import HandoffVerbs
from kvstore.hashing import vectors_digest
from kvstore.layout import Layout
from kvstore.ledger import Ledger
from kvstore.operator_verbs import OperatorVerbs
from kvstore.publisher import Publisher
from kvstore.slabs import Slabs, State
from kvstore.tiers import Tiers

TICK_S = 0.2  # how late a hold may expire that nobody asks for, or a dead writer's slab be freed
EVICTED_AT_ONCE = 64  # slabs, between two looks at what else there is to do
PROMOTIONS_S = 1.0  # for reads from the disk that nobody waits for any more
FLUSH_S = 10.0  # for what is not on the disk yet when the store stops
EPOCH_BITS = 52  # exact in Lua, whose numbers are doubles


class StoreServer:
    """One start of one store. Without a `redis_url` in its identity it serves unannounced, without `disk` (a folder of
    its own, the same at every start) from memory alone. One tenant's cached blocks fill `tenant_share` of the memory
    at most."""

    def __init__(
        self,
        store_id: str,
        layout: Layout,
        memory: int,
        identity: Identity,
        disk: Path | None = None,
        disk_memory: int = 0,
        tenant_share: float = 1.0,
    ) -> None:
        self._store_id = store_id
        self._layout = layout
        self._identity = identity
        self._epoch = secrets.randbits(EPOCH_BITS) | 1  # never 0
        self._arena = Arena.create(store_id, layout, memory, self._epoch)
        slabs = Slabs(self._arena.slabs, tenant_share)
        self._ledger = Ledger(slabs)
        tier = DiskTier(disk, identity.namespace, layout, disk_memory) if disk is not None else None
        self._tiers = Tiers(self._arena, slabs, tier)
        self._handoffs = HandoffVerbs(self._ledger, self._tiers, layout)
        self._blocks = BlockVerbs(self._tiers, layout)
        self._operator = OperatorVerbs(self._tiers, layout)
        self._server: Server | None = None
        self._publisher: Publisher | None = None
        self._ticker: asyncio.Task[None] | None = None

    async def start(self, port: int = 0) -> StoreInfo:
        """Serve. Raises StartupError when the disk folder cannot be used or the address not be bound."""
        keep_buffers()
        try:
            await self._tiers.open()
            address = await self._listen(port)
        except StartupError:
            await self._tiers.close(0.0)
            self._arena.close()
            raise
        info = StoreInfo(
            id=self._store_id,
            address=address,
            node=socket.gethostname(),
            pid=os.getpid(),
            namespace=self._identity.namespace,
            epoch=self._epoch,
        )
        if self._identity.redis_url:
            self._publisher = Publisher(self._identity.redis_url, info, self._tiers.findable)
            self._publisher.start()
            self._tiers.publisher = self._publisher
        self._ticker = asyncio.create_task(self._tick(), name="store ticker")
        return info

    async def stop(self) -> None:
        """Stop serving, bring what is only in memory to the disk, and remove the arena."""
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        if self._publisher is not None:
            await self._publisher.stop()
        if self._server is not None:
            await self._server.stop()
        await self._blocks.close(PROMOTIONS_S)
        await self._tiers.close(FLUSH_S)
        self._arena.close()

    async def _listen(self, port: int) -> str:
        own: dict[str, Unary] = {"Hello": self._hello, "Stat": self._stat}
        calls = own | self._handoffs.unary | self._blocks.unary | self._operator.unary
        self._server = Server(self._identity.secret, calls, self._handoffs.streams | self._blocks.streams)
        try:
            return await self._server.start(self._identity.host, port)
        except RuntimeError as error:
            raise StartupError(f"the block store cannot listen on {self._identity.host}:{port} ({error})") from None

    async def _hello(self, message: Hello, _: Any) -> Welcome:
        if message.layout != self._layout.fingerprint:
            raise LayoutMismatch(f"{message.client_id} has another block layout than this store; serve one model each")
        if message.hash_vectors != vectors_digest():
            raise LayoutMismatch(f"{message.client_id} hashes blocks differently; run one version of Tandem everywhere")
        return Welcome(self._epoch, machine_id(), str(self._arena.path), self._arena.slabs)

    async def _stat(self, _: StatRequest, __: Any) -> StoreStat:
        self._ledger.expire(time.monotonic())
        slabs, disk = self._ledger.slabs, self._tiers.disk
        return StoreStat(
            slabs=self._arena.slabs,
            free=slabs.counts[State.FREE],
            reserved=slabs.counts[State.RESERVED],
            held=slabs.counts[State.HELD],
            cached=slabs.counts[State.CACHED],
            quarantined=slabs.counts[State.QUARANTINED],
            transfers=len(self._ledger.transfers),
            block_bytes=self._layout.block_bytes,
            epoch=self._epoch,
            sealed_bytes_total=self._handoffs.sealed_bytes,
            evictions_total=slabs.evictions,
            expired_total=self._ledger.expired,
            pinned=slabs.pinned,
            disk_blocks=len(disk) if disk is not None else 0,
            disk_bytes=len(disk) * disk.block_bytes if disk is not None else 0,
            disk_limit_bytes=disk.limit_bytes if disk is not None else 0,
            disk_writes_total=disk.writes if disk is not None else 0,
            disk_reads_total=disk.reads if disk is not None else 0,
            disk_errors_total=disk.errors if disk is not None else 0,
            found_blocks_total=self._blocks.found,
            missed_blocks_total=self._blocks.missed,
            fetched_blocks_total=self._blocks.fetched,
            corrupt_total=self._operator.corrupt + (disk.corrupt if disk is not None else 0),
        )

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._ledger.expire(time.monotonic())
            self._handoffs.exorcise()
            left = self._ledger.slabs.surplus
            while left > 0 and (evicted := self._ledger.slabs.evict(min(left, EVICTED_AT_ONCE))):
                left -= evicted
                self._tiers.settle()
                await asyncio.sleep(0)
            self._tiers.settle()
