"""Everything of a worker that moves blocks, put together: its store, handoffs, fetches and offloads.

    engine step ──► act ──► handoffs, tier, offload queue ──► sent / received / located / fetched / offloaded
      ▲                                                                                        │ (engine's events)
      └────────────────────────────────── post ◄───────────────────────────────────────────────┘

One way round: what a step asks for goes out here, and how it ended comes back to the engine's thread as an event.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from cluster.config import Config
from cluster.identity import Identity
from kvstore.connections import Connections
from kvstore.index import Index
from workers.counters import Counters
from workers.engine import Engine
from workers.handoffs import Handoffs
from workers.node_store import NodeStore
from workers.offload import OffloadQueue
from workers.sequence import Sequence
from workers.step import Step
from workers.tier import Tier

OFFLOADING = 2  # at most half of a worker's blocks wait to be written to the store


class Transfers:
    """`post` hands an event to the thread that the engine runs on."""

    def __init__(
        self,
        worker_id: str,
        engine: Engine,
        identity: Identity,
        config: Config,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        runner = engine.runner
        self.counters = Counters()
        self._engine = engine
        self._post = post
        self._connections = Connections(identity.secret, runner.layout)
        self._store = NodeStore(worker_id, runner, identity, self._connections, lambda: post(engine.store_is_new))
        self.handoffs = Handoffs(runner, config, self._store, self._connections, self.counters)
        index = Index(identity.redis_url, identity.namespace)
        self._tier = Tier(runner, self._store, index, self._connections, self.counters)
        limit = max(1, runner.num_blocks // OFFLOADING)
        offloaded = self._event(engine.offloaded)
        self._offloads = OffloadQueue(lambda: self._store.writer, limit, self.handoffs.idle, offloaded, self.counters)

    def work(self, node: str) -> list[Coroutine[Any, Any, None]]:
        """What has to run, until cancelled, on the event loop of a worker on that node."""
        return [self._store.run(node), self._offloads.run(), self._tier.warm_up()]

    async def close(self) -> None:
        """After what `work` returned has been cancelled."""
        for part in (self.handoffs, self._tier, self._store, self._connections):
            await part.close()

    def locate(self, sequence: Sequence) -> None:
        """Ask the stores for a sequence that the engine is about to get; it is not admitted before they answer."""
        sequence.locating = True
        self._tier.locate(sequence, self._event(self._engine.located))

    def act(self, step: Step) -> None:
        """Do what a step asked for."""
        for send in step.sends:
            self.handoffs.send(send, self._event(self._engine.sent))
        for transfer_id in step.revoked:
            self.handoffs.revoke(transfer_id)
        for sequence in step.receives:
            self.handoffs.receive(sequence, self._event(self._engine.received))
        for order in step.fetches:
            self._tier.fetch(order, self._event(self._engine.fetched))
        for sequence in step.lookups:
            self._tier.locate(sequence, self._event(self._engine.located))
        for sequence_id in step.dropped:
            self.handoffs.drop(sequence_id)
            self._tier.drop(sequence_id)
        for handoff in step.unclaimed:
            self.handoffs.release(handoff)
        if step.offloads:
            self._offloads.put(step.offloads)

    def _event(self, method: Callable[..., None]) -> Callable[..., None]:
        """The same method of the engine, called on its thread."""
        return lambda *arguments: self._post(partial(method, *arguments))
