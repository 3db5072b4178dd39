"""A worker's way into the block stores of its own node: which one it writes to, and the connection for that.

Stores are found in Redis once and then known by their connection, so a Redis that dies later costs nothing. With
several stores on a node each worker prefers one by rendezvous hashing (Thaler and Ravishankar, 1998): when a store
goes, only its own workers move, and they come back with it. Reading is not tied to this: see `workers/tier.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence

from cluster.errors import ProtocolError, StoreError, TandemError, Unauthorized, Unavailable
from cluster.identity import Identity
from cluster.membership import Membership
from cluster.messages import StoreInfo
from kvstore.client import StoreClient
from kvstore.connections import Connections
from kvstore.writer import HandoffWriter
from workers.block_mover import BlockMover

LOOK_S = 2.0  # how often a connected worker looks whether its preferred store is back; ten times as often without one
RETIRE_S = 30.0  # how long a connection that was replaced may finish its transfers
log = logging.getLogger(__name__)


class NodeStore:
    """`changed` is called whenever the worker writes to another start of a store than before."""

    def __init__(
        self,
        worker_id: str,
        mover: BlockMover,
        identity: Identity,
        connections: Connections,
        changed: Callable[[], None],
    ) -> None:
        self._worker_id = worker_id
        self._mover = mover
        self._identity = identity
        self._connections = connections
        self._changed = changed
        self._membership = Membership(identity.redis_url)
        self._client: StoreClient | None = None
        self._writer: HandoffWriter | None = None
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def writer(self) -> HandoffWriter | None:
        """The connection, if there is one now."""
        return self._writer if self._writer is not None and self._writer.connected else None

    @property
    def address(self) -> str:
        """Of the store that is written to; empty: there is none."""
        return self._client.address if self._client is not None and self.writer is not None else ""

    @property
    def epoch(self) -> int:
        return self._client.epoch if self._client is not None else 0

    async def run(self, node: str) -> None:
        """Stay connected, until cancelled; a store that restarts comes back under another address or epoch."""
        while True:
            try:
                _, stores = await self._membership.members(self._identity.namespace)
                await self._connect_to([store for store in stores if store.node == node])
            except (Unavailable, StoreError, Unauthorized, ProtocolError) as error:
                if self.writer is None:
                    where = self._identity.namespace
                    log.warning(
                        "no block store of %s is in reach, nothing is handed off or kept: %s", where, error.message
                    )
            await asyncio.sleep(LOOK_S if self.writer is not None else LOOK_S / 10)

    async def close(self) -> None:
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        if self._writer is not None:
            await self._writer.close()
        await self._membership.close()

    async def _connect_to(self, near: list[StoreInfo]) -> None:
        """Use the best of these that answers, or keep what there is. Raises what the last one answered."""
        refusal: TandemError | None = None
        for store in preference(self._worker_id, near):
            if self.writer is not None and store.address == self.address:
                return
            try:
                await self._connect(store.address)
                return
            except (Unavailable, StoreError, Unauthorized) as error:
                refusal = error
        if refusal is not None:
            raise refusal

    async def _connect(self, address: str) -> None:
        client = StoreClient(address, self._identity.secret, self._worker_id, self._mover.layout)
        writer = HandoffWriter(client, self._mover.layout, self._mover)
        await writer.connect()
        old, self._client, self._writer = self._writer, client, writer
        if old is not None:
            task = asyncio.create_task(_retire(old))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        self._changed()
        # readers will need theirs soon, and a handshake takes longer than the first question may
        await self._connections.get(client.address, client.epoch)


def preference(worker_id: str, stores: Sequence[StoreInfo]) -> list[StoreInfo]:
    """The stores in the order in which this worker would use them."""
    return sorted(stores, key=lambda store: hashlib.sha256(f"{store.id}/{worker_id}".encode()).digest())


async def _retire(writer: HandoffWriter) -> None:
    """Close a connection, after its transfers have had time to end."""
    try:
        if writer.connected and writer.busy:
            await asyncio.sleep(RETIRE_S)
    finally:
        await writer.close()
