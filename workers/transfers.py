"""Everything of a worker that moves blocks, put together: handoffs, and for each kind of stores fetches and offloads.

    engine step ──► act ──► handoffs, tier, offload queue ──► sent / received / located / fetched / offloaded
      ▲                                                                                        │ (engine's events)
      └────────────────────────────────── post ◄───────────────────────────────────────────────┘

One way round: what a step asks for goes out here, and how it ended comes back to the engine's thread as an event.
Handoffs are always exact. What a sequence looks up, fetches and offloads is of the kind that the sequence is of.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from cluster.config import Config
from cluster.identity import Identity
from kvstore.connections import Connections
from workers.all_shards import AllShards
from workers.block_mover import BlockMover, OwnBlocks
from workers.counters import Counters
from workers.engine import Engine
from workers.handoffs import Handoffs
from workers.sequence import Sequence
from workers.shard_peers import ShardPeers
from workers.step import Step
from workers.stored_blocks import StoredBlocks, exact_blocks
from workers.tier_link import TierLink

OFFLOADING = 2  # at most half of a worker's blocks wait to be written to the store


class Transfers:
    """`post` hands an event to the thread that the engine runs on; `approximate` is how blocks are in the stores of
    approximate KV, where there are any."""

    def __init__(
        self,
        worker_id: str,
        engine: Engine,
        identity: Identity,
        config: Config,
        post: Callable[[Callable[[], None]], None],
        approximate: StoredBlocks | None = None,
    ) -> None:
        runner = engine.runner
        self.counters = Counters()
        self._engine = engine
        self._post = post
        idle = asyncio.Event()
        idle.set()
        kinds: list[tuple[bool, StoredBlocks, Identity]] = [(True, exact_blocks(runner), identity)]
        if approximate is not None:
            kinds.append((False, approximate, identity.approximate))
        limit = max(1, runner.num_blocks // (OFFLOADING * len(kinds)))
        changed, offloaded = self._event(engine.store_is_new), self._event(engine.offloaded)
        self._peers = ShardPeers(runner.peers, identity.secret, config.step_timeout)
        self._links: dict[bool, TierLink] = {}  # whether a sequence is exact -> its stores
        for is_exact, blocks, where in kinds:
            connections = Connections(where.secret, blocks.layout)
            mover: BlockMover = OwnBlocks(blocks, connections)
            if runner.peers:
                mover = AllShards(mover, runner.shard, self._peers, exact=is_exact)
            self._links[is_exact] = TierLink(
                worker_id, mover, connections, where, idle, limit, changed, offloaded, self.counters
            )
        exact = self._links[True]
        self.handoffs = Handoffs(exact.mover, exact.store, exact.connections, idle, self.counters)

    def work(self, node: str) -> list[Coroutine[Any, Any, None]]:
        """What has to run, until cancelled, on the event loop of a worker on that node."""
        return [work for link in self._links.values() for work in link.work(node)]

    async def close(self) -> None:
        """After what `work` returned has been cancelled."""
        await self.handoffs.close()
        for link in self._links.values():
            await link.close()
        await self._peers.close()

    def locate(self, sequence: Sequence) -> None:
        """Ask the stores for a sequence that the engine is about to get; it is not admitted before they answer."""
        sequence.locating = True
        self._links[sequence.exact].tier.locate(sequence, self._event(self._engine.located))

    def act(self, step: Step) -> None:
        """Do what a step asked for."""
        for send in step.sends:
            self.handoffs.send(send, self._event(self._engine.sent))
        for transfer_id in step.revoked:
            self.handoffs.revoke(transfer_id)
        for sequence in step.receives:
            self.handoffs.receive(sequence, self._event(self._engine.received))
        for order in step.fetches:
            self._links[order.sequence.exact].tier.fetch(order, self._event(self._engine.fetched))
        for sequence in step.lookups:
            self._links[sequence.exact].tier.locate(sequence, self._event(self._engine.located))
        for sequence_id in step.dropped:
            self.handoffs.drop(sequence_id)
            for link in self._links.values():
                link.tier.drop(sequence_id)
        for handoff in step.unclaimed:
            self.handoffs.release(handoff)
        for exact, link in self._links.items():
            if offloads := [offload for offload in step.offloads if offload.name.exact is exact]:
                link.offloads.put(offloads)

    def _event(self, method: Callable[..., None]) -> Callable[..., None]:
        """The same method of the engine, called on its thread."""
        return lambda *arguments: self._post(partial(method, *arguments))
