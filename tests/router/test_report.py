"""What the controller reads of a router: counters, means of late, and a word at once when a worker is needed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress

import pytest

from cluster.errors import Unavailable
from cluster.membership import Membership
from cluster.messages import RouterInfo
from kvstore.redis_server import EmbeddedRedis
from router.admission import Limits
from router.gate import Entering, Gate, GateSettings
from router.metrics import Metrics
from router.report import Reporter, Tally
from router.table import FleetTable

NAMESPACE = "report-test"


class NoWorkers:
    """A fleet that nobody has joined."""

    def __init__(self) -> None:
        self.table = FleetTable(16, 1)
        self.changed = asyncio.Event()


def gate() -> Gate:
    return Gate(NoWorkers(), GateSettings(Limits(8), 4, 20.0, hold_for_start=True), Metrics())


@pytest.fixture(scope="module")
def redis() -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis()
    yield server
    server.close()


async def reported(membership: Membership, wanted: Callable[[RouterInfo], bool]) -> RouterInfo:
    async with asyncio.timeout(10):
        while True:
            with suppress(Unavailable):
                for info in (await membership.reports(NAMESPACE))[0]:
                    if wanted(info):
                        return info
            await asyncio.sleep(0.01)


def run(redis: EmbeddedRedis, test: Callable[[Membership, Tally, Gate], Awaitable[None]]) -> None:
    async def whole() -> None:
        membership, tally, door = Membership(redis.url), Tally(), gate()
        reporter = Reporter(redis.url, NAMESPACE, "router-1", tally, door)
        await door.start()
        await reporter.start()
        try:
            await test(membership, tally, door)
        finally:
            await door.close()
            await reporter.close()
        assert (await membership.reports(NAMESPACE))[0] == []
        await membership.close()

    asyncio.run(whole())


def test_counters_are_repeated(redis: EmbeddedRedis) -> None:
    async def test(membership: Membership, tally: Tally, _: Gate) -> None:
        first = await reported(membership, lambda info: info.requests_total == 0)
        assert (first.ttft_ms, first.itl_ms, first.waiting) == (0.0, 0.0, 0)
        tally.requests, tally.prompt_tokens, tally.uncached_tokens, tally.output_tokens = 1, 20, 10, 5
        second = await reported(membership, lambda info: info.requests_total == 1)
        assert (second.prompt_tokens_total, second.uncached_tokens_total, second.output_tokens_total) == (20, 10, 5)

    run(redis, test)


def test_who_waits_for_the_first_worker_is_reported(redis: EmbeddedRedis) -> None:
    async def test(membership: Membership, _: Tally, door: Gate) -> None:
        await reported(membership, lambda info: info.waiting == 0)
        entering = asyncio.create_task(door.enter(Entering("r", "a", 0, 50)))
        info = await reported(membership, lambda info: info.waiting == 1)
        assert info.waiting_tokens == 50
        await door.close()
        with pytest.raises(Unavailable):
            await entering

    run(redis, test)


def test_a_redis_that_comes_back_is_told_again() -> None:
    server = EmbeddedRedis()
    run(server, outage(server))
    server.close()


def outage(server: EmbeddedRedis) -> Callable[[Membership, Tally, Gate], Awaitable[None]]:
    async def test(membership: Membership, tally: Tally, _: Gate) -> None:
        await reported(membership, lambda info: info.requests_total == 0)
        tally.requests, dead = 7, server.pid
        os.kill(dead, signal.SIGKILL)
        while server.pid == dead:
            await asyncio.to_thread(server.revive)
        await reported(membership, lambda info: info.requests_total == 7)

    return test


def test_means_are_of_late() -> None:
    tally, door = Tally(), gate()
    for second in range(20):
        tally.began(1.0 if second < 10 else 0.5, float(second))
        tally.went_on(0.3, 3, float(second))  # three tokens at once
    info = tally.info("r", NAMESPACE, door, 20.0)
    assert info.ttft_ms == pytest.approx(500.0)
    assert info.itl_ms == pytest.approx(100.0)
    assert tally.info("r", NAMESPACE, door, 60.0).ttft_ms == 0.0
