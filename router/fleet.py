"""The workers and stores a router knows: membership polled, connections kept, and what placement needs to know of them.

Membership only introduces. Whether a worker lives is for its own stream to say, so a Redis that is down, empty or
behind takes nobody out of service: the last known fleet stays, and a listed worker that is not connected is never
placed. Every report of a worker goes into `table` at once, what it has cached into the prefix map. No policy here
(`router/placement.py`) and no request (`router/dispatch.py`).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from cluster.errors import TandemError, WorkerLost
from cluster.messages import ControllerInfo, RouterInfo, StoreInfo, WorkerInfo
from cluster.rpc import Client
from cluster.store_messages import StatRequest, StoreStat
from kvstore.hashing import ModelKey
from kvstore.prefix_map import PrefixMap
from router.experience import Experience
from router.outputs import WorkerLink
from router.placement import Ask, Decision, place
from router.table import FleetTable, WorkerView

POLL_S = 1.0
POLL_TIMEOUT_S = 2.0
STAT_TIMEOUT_S = 1.0

log = logging.getLogger(__name__)


class Members(Protocol):
    """Who has registered; `cluster.membership.Membership` is one."""

    async def members(self, namespace: str) -> tuple[list[WorkerInfo], list[StoreInfo]]: ...

    async def reports(self, namespace: str) -> tuple[list[RouterInfo], list[ControllerInfo]]: ...

    async def close(self) -> None: ...


class Fleet:
    """Owns one WorkerLink per known worker, and the membership. Must be started and closed in the loop that serves.

    Workers are those of `namespace`; stores too, unless `store_namespaces` says otherwise. `prefix_map` says who has
    which block: workers join it here, stores elsewhere, and `store_owners` tells their ids and numbers.
    """

    def __init__(
        self,
        membership: Members,
        namespace: str,
        router_id: str,
        secret: str,
        worker_timeout_s: float,
        store_namespaces: Sequence[str] = (),
        *,
        model_key: ModelKey,
        prefix_map: PrefixMap | None = None,
        store_owners: Callable[[], Iterable[tuple[str, int]]] = tuple,
        policy: str = "least_time",
    ) -> None:
        self.redis_reachable = False
        self.stores: tuple[StoreInfo, ...] = ()
        self.model_key = model_key
        self.table = FleetTable(model_key.block_size, 0)  # the workers that a request may go to
        self.changed = asyncio.Event()  # set when that has changed, for one waiter, who clears it
        self._map = PrefixMap() if prefix_map is None else prefix_map  # an empty one is false
        self._experience = Experience()
        self._store_owners = store_owners
        self._placed_stores: dict[int, str] = {}  # number in the prefix map -> node
        self._policy = policy
        self._rng = random.Random()
        self._membership = membership
        self._namespace = namespace
        self._store_namespaces = store_namespaces or (namespace,)
        self._router_id = router_id
        self._secret = secret
        self._worker_timeout_s = worker_timeout_s
        self._links: dict[str, WorkerLink] = {}  # worker id -> its connection
        self.listed: frozenset[str] = frozenset()  # worker ids in the last membership answer
        self._connected: set[str] = set()  # ids of the workers that were when `table` was selected
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Learn who is there and keep learning; returns after the first answer, or failure, of the membership."""
        await self._poll()
        self._task = asyncio.create_task(self._poll_forever(), name="fleet")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self._links.values()))
        await self._membership.close()

    @property
    def running(self) -> bool:
        return self._task is not None and not self._task.done()

    def links(self) -> list[WorkerLink]:
        return list(self._links.values())

    def link(self, worker_id: str) -> WorkerLink:
        """Raises WorkerLost when that worker has left since it was placed."""
        link = self._links.get(worker_id)
        if link is None:
            raise WorkerLost(f"worker {worker_id} left the fleet")
        return link

    def snapshot(self) -> tuple[WorkerView, ...]:
        """The workers a request may go to. One that has left the membership is draining, unless all have."""
        return tuple(self._links[worker_id].view() for worker_id in self.table.ids())

    def place(self, ask: Ask, hashes: Sequence[bytes]) -> Decision:
        """Choose workers for what has those full blocks. Raises Unavailable when nobody is left."""
        decision = place(self.table, ask, self._map.lookup(hashes), self._policy, self._rng)
        self.table.placed(decision)
        return decision

    @property
    def known_blocks(self) -> int:
        """Blocks that the prefix map knows somebody to have."""
        return len(self._map)

    async def controller(self) -> ControllerInfo | None:
        """What the controller says it did; None where there is none, or the membership does not answer."""
        try:
            async with asyncio.timeout(STAT_TIMEOUT_S):
                _, controllers = await self._membership.reports(self._namespace)
        except (TandemError, OSError):  # of which TimeoutError is one
            return None
        return controllers[-1] if controllers else None

    async def store_stats(self) -> list[tuple[StoreInfo, StoreStat | None]]:
        """Each known store with its own account of its slabs; None where it did not answer."""
        stores = self.stores
        return list(zip(stores, await asyncio.gather(*map(self._stat, stores)), strict=True))

    async def ask_store(self, store: StoreInfo, method: str, message: Any, timeout_s: float) -> Any:
        """One call on a connection of its own: stores are asked rarely from here. Raises what the store or the way to
        it does."""
        client = Client(store.address, self._secret)
        try:
            return await client.call(method, message, timeout_s)
        finally:
            await client.close()

    async def _stat(self, store: StoreInfo) -> StoreStat | None:
        try:
            answer = await self.ask_store(store, "Stat", StatRequest(), STAT_TIMEOUT_S)
        except TandemError as error:
            log.warning("store %s at %s gave no account: %s", store.id, store.address, error.message)
            return None
        return answer if isinstance(answer, StoreStat) else None

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await self._poll()

    async def _poll(self) -> None:
        try:
            async with asyncio.timeout(POLL_TIMEOUT_S):
                namespaces = dict.fromkeys((self._namespace, *self._store_namespaces))
                found = {namespace: await self._membership.members(namespace) for namespace in namespaces}
        except Exception as error:  # whatever the index does, the fleet that is connected goes on serving
            if self.redis_reachable or self._task is None:
                log.warning("membership is unreachable, keeping the last known fleet: %r", error)
            self.redis_reachable = False
            return
        self.redis_reachable = True
        workers, stores = found[self._namespace][0], [s for name in self._store_namespaces for s in found[name][1]]
        await self._adopt(workers)
        if stores or not self.stores:
            self.stores = tuple(stores)
        self._place_stores()

    async def _adopt(self, workers: list[WorkerInfo]) -> None:
        if not workers and any(link.alive for link in self._links.values()):
            return  # an index that came back empty; the living will register again
        self.listed = frozenset(worker.id for worker in workers)
        for worker in workers:
            known = self._links.get(worker.id)
            if known and (known.info.incarnation, known.info.address) == (worker.incarnation, worker.address):
                known.info = worker
                continue
            self.table.block_bytes = worker.block_bytes or self.table.block_bytes
            self._links[worker.id] = WorkerLink(
                worker,
                self._router_id,
                self._secret,
                self._worker_timeout_s,
                self._map,
                self._experience,
                self._report,
            )
            if known:
                self._select()
                await known.close()
        gone = [
            link for link in self._links.values() if link.info.id not in self.listed and (link.idle or not link.alive)
        ]
        for link in gone:
            del self._links[link.info.id]
        self._select()
        for link in gone:
            await link.close()

    def _report(self, link: WorkerLink) -> None:
        """A worker's view has changed."""
        worker_id = link.info.id
        if self._links.get(worker_id) is not link:
            return  # another incarnation has taken its place
        if link.alive != (worker_id in self._connected):
            self._select()
        if self.table.row(worker_id) is not None:
            self.table.put(link.view())
        self.changed.set()

    def _select(self) -> None:
        """Bring the table's rows up to date with who is connected and listed."""
        self._connected = {worker_id for worker_id, link in self._links.items() if link.alive}
        wanted = self._connected & self.listed or self._connected
        for worker_id in self.table.ids():
            if worker_id not in wanted:
                self.table.remove(worker_id)
        for worker_id in wanted:
            if self.table.row(worker_id) is None:
                self.table.put(self._links[worker_id].view())
        self.changed.set()

    def _place_stores(self) -> None:
        nodes = {store.id: store.node for store in self.stores}
        found = {owner: nodes[store_id] for store_id, owner in self._store_owners() if store_id in nodes}
        for owner in self._placed_stores.keys() - found.keys():
            self.table.remove_store(owner)
        for owner, node in found.items():
            if self._placed_stores.get(owner) != node:
                self.table.set_store(owner, node)
        self._placed_stores = found
