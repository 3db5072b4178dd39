"""The controller's eyes and hands on real workers over gRPC and a real Redis; only Ray is left out.

With Ray they are tested in `tests/e2e/test_scaling.py`.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import pools
from cluster.errors import StartupError, Unavailable
from cluster.membership import Membership
from cluster.messages import ControllerInfo, DecodeJob, Role, RouterInfo, SetRole, StoreInfo, Submit, WorkerInfo
from cluster.pools import Member
from deploy.managed_cluster import ManagedCluster
from deploy.workforce import Post, Progress
from kvstore.redis_server import EmbeddedRedis
from tests.workers.site import BUSY, KEY, Site, generation, none, prefill, run, runner, until
from workers.sim import Timings
from workers.worker import Worker, WorkerSettings


@pytest.fixture(scope="module")
def redis() -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis()
    yield server
    server.close()


class Staff:
    """A workforce whose workers live in this process."""

    def __init__(self, site: Site) -> None:
        self.membership = Membership(site.identity.redis_url)
        self.progress = Progress()
        self.restarts: list[str] = []
        self.asked_for: list[Role] = []
        self.empty: dict[str, list[StoreInfo]] = {}
        self.stores = SimpleNamespace(clear=lambda node: self.empty.pop(node))
        self._site = site
        self._posts: dict[str, Post] = {}

    async def start(self, name: str, role: Role) -> None:
        """Anew, if there was one of that name."""
        settings = WorkerSettings(name, role, KEY, 400, self._site.identity, BUSY)
        await self._site.serve(name, Worker(runner(Timings(step_s=0.005)), settings))
        address = self._site.clients[name].address
        found: list[WorkerInfo] = []
        while not found:
            found = [w for w in (await self.membership.members("ns"))[0] if w.address == address]
        if name not in self._posts:
            process: Any = SimpleNamespace(info=found[0])
            group: Any = None
            self._posts[name] = Post(role, settings, 2, group, 60.0, 0.0, process=process)

    def advance(self) -> Progress:
        return self.progress

    def posts(self) -> list[Post]:
        return list(self._posts.values())

    def post(self, worker_id: str) -> Post | None:
        return self._posts.get(worker_id)

    def start_worker(self, role: Role) -> str:
        self.asked_for.append(role)
        return "worker-7"

    def stop_worker(self, worker_id: str) -> None:
        self._posts[worker_id].stopping = True

    def restarted(self, worker_id: str) -> None:
        self.restarts.append(worker_id)

    def deserted(self) -> dict[str, list[StoreInfo]]:
        return dict(self.empty)


@asynccontextmanager
async def managed(site: Site) -> AsyncIterator[tuple[ManagedCluster, Staff]]:
    """With one decode worker, which is heard."""
    staff: Any = Staff(site)
    cluster = ManagedCluster(staff, site.identity, BUSY)
    try:
        await staff.start("decode-0", "decode")
        await until(lambda: becomes(cluster, state="serving"))
        yield cluster, staff
    finally:
        await cluster.close()
        await staff.membership.close()


async def member(cluster: ManagedCluster) -> Member:
    """The only one, as of now."""
    (found,) = (await cluster.observe()).members
    return found


async def becomes(cluster: ManagedCluster, **expected: Any) -> bool:
    found = await member(cluster)
    return all(getattr(found, name) == value for name, value in expected.items())


def check(test: Callable[[Site, ManagedCluster, Any], Awaitable[None]], redis: EmbeddedRedis) -> None:
    async def main(site: Site) -> None:
        async with managed(site) as (cluster, staff):
            await test(site, cluster, staff)

    run(main, redis)


def test_what_a_worker_reports_is_what_the_plan_sees(redis: EmbeddedRedis) -> None:
    async def test(site: Site, cluster: ManagedCluster, staff: Staff) -> None:
        idle = await member(cluster)
        assert (idle.id, idle.role, idle.shards, idle.running, idle.kv_tokens) == ("decode-0", "decode", 2, 0, 1600)
        assert idle.since_s > 0
        await submit(site, "decode-0", "long", 300)
        await until(lambda: becomes(cluster, running=1))
        assert (await member(cluster)).rates is not None
        router = RouterInfo("r", "ns", 1, 2, 3, 4, 5, 6, 7, 8.0, 9.0)
        await staff.membership.register(router)
        staff.progress = Progress(failed=(StartupError("worker-9: no room"),), ended=())
        seen = await cluster.observe()
        assert (seen.routers, seen.failed) == ((router,), ("worker-9: no room",))

    check(test, redis)


def test_a_role_is_told_and_told_again_after_a_restart(redis: EmbeddedRedis) -> None:
    async def test(site: Site, cluster: ManagedCluster, staff: Staff) -> None:
        assert "turns to prefill" in await cluster.act(pools.ChangeRole("decode-0", "prefill"))
        await until(lambda: site.load("decode-0").role == "prefill")
        changed_s = (await member(cluster)).since_s
        await site.stop("decode-0")
        await until(lambda: becomes(cluster, state="starting", role="prefill"))
        await staff.start("decode-0", "decode")
        await until(lambda: becomes(cluster, state="serving"))
        assert staff.restarts == ["decode-0"]
        await until(lambda: heard(cluster, lambda: site.load("decode-0").role == "prefill"))
        assert (await member(cluster)).since_s > changed_s
        # whoever else sets it is corrected
        await site.clients["decode-0"].call("SetRole", SetRole("both"), 5)
        await until(lambda: site.load("decode-0").role == "both")
        await until(lambda: heard(cluster, lambda: site.load("decode-0").role == "prefill"))

    check(test, redis)


def test_a_draining_worker_is_followed_until_it_has_nothing_left(redis: EmbeddedRedis) -> None:
    async def test(site: Site, cluster: ManagedCluster, staff: Staff) -> None:
        await submit(site, "decode-0", "long", 300)
        await until(lambda: becomes(cluster, running=1))
        assert "drains" in await cluster.act(pools.Drain("decode-0"))
        await until(lambda: none(registered(staff)))
        assert await becomes(cluster, state="draining", running=1)
        await cluster.act(pools.Migrate("decode-0"))
        await until(lambda: becomes(cluster, state="draining", running=0))
        assert site.failed == {"long": "moved"}
        assert await cluster.act(pools.Stop("decode-0")) != ""
        assert await cluster.act(pools.Stop("decode-0")) == ""
        assert await cluster.act(pools.Migrate("nobody")) == ""

    check(test, redis)


def test_one_that_dies_while_it_drains_has_nothing_left_even_if_it_is_restarted(redis: EmbeddedRedis) -> None:
    async def test(site: Site, cluster: ManagedCluster, staff: Staff) -> None:
        await submit(site, "decode-0", "long", 300)
        await until(lambda: becomes(cluster, running=1))
        await cluster.act(pools.Drain("decode-0"))
        await site.stop("decode-0")
        await until(lambda: becomes(cluster, state="draining", running=0))
        await staff.start("decode-0", "decode")
        await until(lambda: heard(cluster, lambda: bool(staff.restarts)))
        await submit(site, "decode-0", "late", 300)
        await until(lambda: site.load("decode-0").running == 1)
        assert await becomes(cluster, state="draining", running=0)

    check(test, redis)


def test_stores_of_a_deserted_node_go_when_nobody_waits_for_a_block(redis: EmbeddedRedis) -> None:
    async def test(site: Site, cluster: ManagedCluster, staff: Staff) -> None:
        await prefill(site.clients["decode-0"], "handoff")
        await until(lambda: "handoff" in site.tokens)
        staff.empty = {"node": [StoreInfo("store", site.address, "node", 1, "ns", 1)]}
        assert await site.held() > 0
        await cluster.observe()
        assert staff.empty
        staff.empty = {"node": [StoreInfo("gone", "127.0.0.1:1", "node", 1, "ns", 1)]}
        await cluster.observe()
        assert not staff.empty

    check(test, redis)


def test_without_redis_it_says_that_it_is_blind(redis: EmbeddedRedis) -> None:
    async def main() -> None:
        staff: Any = SimpleNamespace()
        identity = Site("redis://127.0.0.1:1").identity
        cluster = ManagedCluster(staff, identity, BUSY)
        try:
            with pytest.raises(Unavailable):
                await cluster.observe()
            with pytest.raises(Unavailable):
                await cluster.report(ControllerInfo("controller", "ns", 1, 0, 0, 0, 0, 0, 0, 0.0, ()))
        finally:
            await cluster.close()

    asyncio.run(asyncio.wait_for(main(), 20))


async def submit(site: Site, worker: str, name: str, new: int) -> None:
    await site.clients[worker].call("Submit", Submit("router", DecodeJob(generation(name, new=new))), 5)


async def registered(staff: Staff) -> int:
    return len((await staff.membership.members("ns"))[0])


async def heard(cluster: ManagedCluster, condition: Callable[[], bool]) -> bool:
    """Whether it is so after another observation."""
    await cluster.observe()
    return condition()
