"""Membership on a real Redis: registrations last as long as their heartbeats, and an absent Redis is an answer."""

import asyncio
import dataclasses
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import redis

from cluster.errors import ProtocolError, Unavailable
from cluster.membership import Membership
from cluster.messages import StoreInfo, WorkerInfo
from kvstore.redis_server import EmbeddedRedis

WORKER = WorkerInfo(
    id="decode-0",
    address="127.0.0.1:1",
    node="n",
    pid=7,
    role="decode",
    namespace="ns",
    incarnation=2**60,
    max_context=1024,
    block_size=16,
)
STORE = StoreInfo(id="decode-0", address="127.0.0.1:2", node="n", pid=8, namespace="ns", epoch=2**52 - 1)


@pytest.fixture
def server() -> Iterator[EmbeddedRedis]:
    made = EmbeddedRedis()
    yield made
    made.close()


def run(url: str, test: Callable[[Membership], Awaitable[Any]]) -> None:
    async def body() -> None:
        membership = Membership(url)
        try:
            async with asyncio.timeout(30):
                await test(membership)
        finally:
            await membership.close()

    asyncio.run(body())


def test_members_come_and_go(server: EmbeddedRedis) -> None:
    async def body(membership: Membership) -> None:
        assert await membership.members("ns") == ([], [])
        await membership.register(WORKER)
        await membership.register(STORE)  # a worker and a store may share an id
        second = dataclasses.replace(WORKER, id="decode-1")
        await membership.register(second)
        await membership.register(dataclasses.replace(WORKER, namespace="other"))
        assert await membership.members("ns") == ([WORKER, second], [STORE])
        await membership.unregister(WORKER)
        await membership.unregister(WORKER)
        assert await membership.members("ns") == ([second], [STORE])

    run(server.url, body)


def test_registering_again_replaces(server: EmbeddedRedis) -> None:
    async def body(membership: Membership) -> None:
        await membership.register(WORKER)
        changed = dataclasses.replace(WORKER, role="prefill", incarnation=3)
        await membership.register(changed)
        assert await membership.members("ns") == ([changed], [])

    run(server.url, body)


def test_who_says_nothing_is_forgotten(server: EmbeddedRedis) -> None:
    async def body(membership: Membership) -> None:
        await membership.register(STORE)
        await membership.register(WORKER, ttl_s=0.2)
        deadline = time.monotonic() + 20
        while (await membership.members("ns"))[0]:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert await membership.members("ns") == ([], [STORE])
        with redis.Redis.from_url(server.url) as client:
            assert client.hlen("tandem:{ns}:members") == 1, "what has run out takes no space"

    run(server.url, body)


def test_a_redis_that_lost_everything_is_whole_after_the_next_heartbeat(server: EmbeddedRedis) -> None:
    async def body(membership: Membership) -> None:
        await membership.register(WORKER)
        with redis.Redis.from_url(server.url) as client:
            client.flushall()
            client.script_flush()
        assert await membership.members("ns") == ([], [])
        await membership.register(WORKER)
        assert await membership.members("ns") == ([WORKER], [])

    run(server.url, body)


def test_a_foreign_entry_is_an_error_that_says_where(server: EmbeddedRedis) -> None:
    async def body(membership: Membership) -> None:
        with redis.Redis.from_url(server.url) as client:
            client.hset("tandem:{ns}:members", "x", b"9999999999999999garbage")
        with pytest.raises(ProtocolError):
            await membership.members("ns")

    run(server.url, body)


def test_a_dead_redis_is_unavailable_and_its_password_unmentioned(server: EmbeddedRedis) -> None:
    async def body(membership: Membership) -> None:
        await membership.register(WORKER)
        server.close()
        for call in (membership.register(WORKER), membership.unregister(WORKER), membership.members("ns")):
            with pytest.raises(Unavailable, match="Redis at") as caught:
                await call
            assert server.url.split(":")[2].partition("@")[0] not in caught.value.message

    run(server.url, body)


def test_a_hung_redis_is_unavailable_within_a_second_or_so_and_comes_back(server: EmbeddedRedis) -> None:
    async def body(membership: Membership) -> None:
        await membership.register(WORKER)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(Unavailable):
                await membership.members("ns")
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert await membership.members("ns") == ([WORKER], [])

    run(server.url, body)
