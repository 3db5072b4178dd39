"""A worker's link to one kind of stores: the one it writes to, lookups and fetches, and blocks that wait to be written.

A worker has one for exact KV and, where the deployment keeps approximate KV too, another for that. They share nothing
but the counters: each kind of stores has its own namespace, layout and block names.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from cluster.identity import Identity
from kvstore.connections import Connections
from kvstore.index import Index
from workers.block_mover import BlockMover
from workers.counters import Counters
from workers.node_store import NodeStore
from workers.offload import Done, OffloadQueue
from workers.tier import Tier


class TierLink:
    """`changed` is called whenever there is another store to write to than before, `offloaded` takes back what was
    written; no more than `limit` blocks wait for that. `mover` reads over `connections`, which are closed here."""

    def __init__(
        self,
        worker_id: str,
        mover: BlockMover,
        connections: Connections,
        identity: Identity,
        handoffs_idle: asyncio.Event,
        limit: int,
        changed: Callable[[], None],
        offloaded: Done,
        counters: Counters,
    ) -> None:
        self.mover = mover
        self.connections = connections
        self.store = NodeStore(worker_id, mover, identity, self.connections, changed)
        index = Index(identity.redis_url, identity.namespace)
        self.tier = Tier(mover, self.store, index, self.connections, counters)
        self.offloads = OffloadQueue(lambda: self.store.writer, limit, handoffs_idle, offloaded, counters)

    def work(self, node: str) -> list[Coroutine[Any, Any, None]]:
        """What has to run, until cancelled, on the event loop of a worker on that node."""
        return [self.store.run(node), self.offloads.run(), self.tier.warm_up()]

    async def close(self) -> None:
        """After what `work` returned has been cancelled."""
        for part in (self.tier, self.store, self.mover, self.connections):
            await part.close()
