"""The controller's eyes and hands: Ray's actors, what workers say on their output streams, what Redis knows of routers.

What was decided about a worker (its role, that it drains) is kept with its post in the `Workforce`, and told to its
process until that has heard it: one that was restarted has forgotten, and comes back in the role it had last. Decides
nothing itself. All of it runs in the controller's event loop; Ray is asked from one thread beside it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from cluster import pools
from cluster.config import Config
from cluster.controller import Observation
from cluster.errors import TandemError
from cluster.identity import Identity
from cluster.membership import Membership
from cluster.messages import ControllerInfo, Drain, Migrate, SetRole, StoreInfo, WorkerInfo
from cluster.order_book import OrderBook
from cluster.pools import Action, Member
from cluster.rpc import Client
from cluster.store_messages import StatRequest, StoreStat
from deploy.worker_reports import WorkerReports
from deploy.workforce import Post, Workforce

CALL_S = 2.0
Result = TypeVar("Result")
log = logging.getLogger(__name__)


class ManagedCluster:
    """A `cluster.controller.Cluster`. The workforce is its own from the first call until `close`."""

    def __init__(self, workforce: Workforce, identity: Identity, config: Config) -> None:
        self._workforce = workforce
        self._block_size = config.block_size
        self._namespace, self._secret = identity.namespace, identity.secret
        self._worker_timeout_s = config.worker_timeout
        self._reader_id = f"controller-{secrets.token_hex(4)}"
        self._membership = Membership(identity.redis_url)
        self._orders = OrderBook(identity.redis_url)
        self._reports: dict[str, WorkerReports] = {}  # worker id -> those of its latest start
        self._ray = ThreadPoolExecutor(1, "controller-ray")

    async def observe(self) -> Observation:
        workers, _ = await self._membership.members(self._namespace)
        routers, _ = await self._membership.reports(self._namespace)
        orders = await self._orders.read(self._namespace)
        progress = await self._with_ray(self._workforce.advance)
        posts = self._workforce.posts()
        await self._follow(posts, {worker.id: worker for worker in workers})
        await asyncio.gather(*map(self._tell, posts), self._clear_deserted())
        now_s = time.monotonic()
        return Observation(
            tuple(map(self._member, posts)),
            tuple(routers),
            tuple(error.message for error in progress.failed),
            tuple((post.id, now_s - post.since_s) for post in progress.ended),
            orders,
        )

    async def act(self, action: Action) -> str:
        if isinstance(action, pools.Start):
            worker_id = await self._with_ray(lambda: self._workforce.start_worker(action.role))
            return f"{worker_id} is started for {action.role}"
        post = self._workforce.post(action.id)
        if post is None or post.stopping:
            return ""
        match action:
            case pools.ChangeRole(role=role):
                post.enter(role, post.state)
                await self._tell(post)
                return f"{post.id} turns to {role}"
            case pools.Drain():
                post.enter(post.role, "draining")
                await self._tell(post)
                return f"{post.id} drains"
            case pools.Migrate():
                return await self._migrate(post)
        await self._with_ray(lambda: self._workforce.stop_worker(post.id))
        return f"{post.id} has nothing left to do"

    async def withdraw(self, orders: Sequence[str]) -> None:
        await self._orders.change(self._namespace, (), orders)

    async def report(self, info: ControllerInfo) -> None:
        await self._membership.register(info)

    async def close(self) -> None:
        await asyncio.gather(*(reports.close() for reports in self._reports.values()))
        await self._membership.close()
        await self._orders.close()
        await asyncio.to_thread(self._ray.shutdown)  # nobody else may use Ray's side before

    async def _with_ray(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._ray, call)

    # ---------------------------------------------------------------------------------------------------- workers
    async def _follow(self, posts: Sequence[Post], registered: dict[str, WorkerInfo]) -> None:
        """Listen to the latest start of every worker. One that drains has left the membership and is still heard."""
        for post in posts:
            known = self._reports.get(post.id)
            starts = [info for info in (registered.get(post.id), post.info) if info is not None and post.info]
            latest = max(starts, key=lambda info: info.incarnation, default=None)
            if post.stopping or latest is None or (known and known.info.incarnation >= latest.incarnation):
                continue
            self._reports[post.id] = WorkerReports(latest, self._reader_id, self._secret, self._worker_timeout_s)
            if known:
                await known.close()
                await self._with_ray(partial(self._workforce.restarted, post.id))
        for worker_id in self._reports.keys() - {post.id for post in posts if not post.stopping}:
            await self._reports.pop(worker_id).close()

    def _member(self, post: Post) -> Member:
        reports = self._reports.get(post.id)
        load = reports.load if reports is not None else None
        if post.state != "draining":
            post.enter(post.role, "starting" if load is None else "serving")
        elif reports is not None and post.drained not in (0, reports.info.incarnation):
            load = None  # the process that was told to drain is gone, and what it had with it
        if reports is None or load is None:
            return Member(post.id, post.role, post.state, post.shards, since_s=post.since_s)
        return Member(
            post.id,
            post.role,
            post.state,
            post.shards,
            rates=reports.rates,
            running=load.running + load.waiting,
            waiting_tokens=load.waiting_tokens,
            context_tokens=load.context_tokens,
            since_s=post.since_s,
            kv_tokens=load.blocks_total * self._block_size,
        )

    async def _tell(self, post: Post) -> None:
        """See to it that its process knows what was decided. When it cannot be told now, the next observation does."""
        reports = self._reports.get(post.id)
        if reports is None or reports.load is None:
            return
        try:
            if post.state == "draining" and not post.drained:
                await self._call(reports.info, "Drain", Drain())
                post.drained = reports.info.incarnation
            elif post.state != "draining" and reports.load.role != post.role:
                await self._call(reports.info, "SetRole", SetRole(post.role))
        except TandemError as error:
            log.warning("%s does not know yet that it is %s, %s: %s", post.id, post.role, post.state, error.message)

    async def _migrate(self, post: Post) -> str:
        reports = self._reports.get(post.id)
        if reports is None or reports.load is None:
            return ""
        await self._call(reports.info, "Migrate", Migrate())
        return f"{post.id} gives its sequences to others"

    async def _call(self, peer: WorkerInfo | StoreInfo, method: str, message: Any) -> Any:
        client = Client(peer.address, self._secret)
        try:
            return await client.call(method, message, CALL_S)
        finally:
            await client.close()

    # ----------------------------------------------------------------------------------------------------- stores
    async def _clear_deserted(self) -> None:
        """End the stores of nodes without workers, once nobody waits for a block there."""
        for node, stores in self._workforce.deserted().items():
            if not any(await asyncio.gather(*map(self._is_waited_for, stores))):
                await self._with_ray(partial(self._workforce.stores.clear, node))

    async def _is_waited_for(self, store: StoreInfo) -> bool:
        """Whether somebody has yet to come for blocks in it. A store that does not answer holds none."""
        try:
            stat = await self._call(store, "Stat", StatRequest())
        except TandemError:
            return False
        return isinstance(stat, StoreStat) and stat.held + stat.reserved > 0
