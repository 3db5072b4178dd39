"""The workers and stores a router knows: membership polled, connections kept, snapshots handed out.

Membership only introduces. Whether a worker lives is for its own stream to say, so a Redis that is down, empty or
behind takes nobody out of service: the last known fleet stays, and a listed worker that is not connected is never
placed. No policy here (`router/placement.py`) and no request (`router/dispatch.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Protocol

from cluster.errors import TandemError, WorkerLost
from cluster.messages import StoreInfo, WorkerInfo
from cluster.rpc import Client
from cluster.store_messages import StatRequest, StoreStat
from router.outputs import WorkerLink
from router.placement import WorkerView

POLL_S = 1.0
POLL_TIMEOUT_S = 2.0
STAT_TIMEOUT_S = 1.0

log = logging.getLogger(__name__)


class Members(Protocol):
    """Who has registered; `cluster.membership.Membership` is one."""

    async def members(self, namespace: str) -> tuple[list[WorkerInfo], list[StoreInfo]]: ...

    async def close(self) -> None: ...


class Fleet:
    """Owns one WorkerLink per known worker, and the membership. Must be started and closed in the loop that serves.
    Workers are those of `namespace`; stores too, unless `store_namespaces` says otherwise."""

    def __init__(
        self,
        membership: Members,
        namespace: str,
        router_id: str,
        secret: str,
        worker_timeout_s: float,
        store_namespaces: Sequence[str] = (),
    ) -> None:
        self.redis_reachable = False
        self.stores: tuple[StoreInfo, ...] = ()
        self._membership = membership
        self._namespace = namespace
        self._store_namespaces = store_namespaces or (namespace,)
        self._router_id = router_id
        self._secret = secret
        self._worker_timeout_s = worker_timeout_s
        self._links: dict[str, WorkerLink] = {}  # worker id -> its connection
        self._listed: frozenset[str] = frozenset()  # worker ids in the last membership answer
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
        alive = [link for link in self._links.values() if link.alive]
        listed = [link for link in alive if link.info.id in self._listed]
        return tuple(link.view() for link in listed or alive)

    def waiting(self) -> int:
        """Requests queued at the workers, as far as is known here."""
        return sum(link.load.waiting + link.pending for link in self._links.values() if link.load)

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

    async def _adopt(self, workers: list[WorkerInfo]) -> None:
        if not workers and any(link.alive for link in self._links.values()):
            return  # an index that came back empty; the living will register again
        self._listed = frozenset(worker.id for worker in workers)
        for worker in workers:
            known = self._links.get(worker.id)
            if known and (known.info.incarnation, known.info.address) == (worker.incarnation, worker.address):
                known.info = worker
                continue
            self._links[worker.id] = WorkerLink(worker, self._router_id, self._secret, self._worker_timeout_s)
            if known:
                await known.close()
        gone = [
            link for link in self._links.values() if link.info.id not in self._listed and (link.idle or not link.alive)
        ]
        for link in gone:
            del self._links[link.info.id]
            await link.close()
