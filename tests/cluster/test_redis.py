"""A Redis with TLS in front and a user that may do only what it must: all of it works, and nothing tells secrets."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import redis

from cluster.errors import StartupError, Unavailable
from cluster.membership import Membership
from cluster.messages import StoreInfo
from cluster.order_book import OrderBook
from cluster.orders import ScaleOrder
from cluster.redis import Link
from kvstore import mirror as mirror_module
from kvstore.index import Index, IndexWriter, Standing
from kvstore.mirror import Mirror
from kvstore.prefix_map import PrefixMap
from kvstore.redis_server import EmbeddedRedis, ping
from kvstore.slabs import Change
from tests.cluster.tls import certificate, tls_proxy
from tests.kvstore.rig import prefixes, until

PASSWORD = "s3cr:t/with@odd?characters"
CHAIN = [hashlib.sha256(b"%d" % i).digest() for i in range(300)]
STORE = StoreInfo(id="a", address="127.0.0.1:2", node="n", pid=8, namespace="ns", epoch=7)


def acl_line() -> str:
    """The line that docs/configuration.md tells operators to use."""
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    match = re.search(r"^ +(ACL SETUSER .*)$", text, re.MULTILINE)
    assert match
    return match[1]


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    """With the documented user."""
    made = EmbeddedRedis()
    with redis.Redis.from_url(made.url) as client:
        client.execute_command(*acl_line().replace("PASSWORD", PASSWORD).split(" "))
    yield made
    made.close()


def port(server: EmbeddedRedis) -> int:
    found = urlsplit(server.url).port
    assert found
    return found


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


async def use_everything(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command that any process sends to Redis, in the order of a store's life."""
    monkeypatch.setattr(mirror_module, "BLOCK_MS", 20)
    monkeypatch.setattr("kvstore.index.LOOKUP_S", 5.0)
    await asyncio.to_thread(ping, url, 5.0)
    prefix_map = PrefixMap()
    membership, index, mirror = Membership(url), Index(url, "ns"), Mirror(url, "ns", prefix_map)
    writer, other = IndexWriter(url, "ns", "a", 7, "127.0.0.1:2"), IndexWriter(url, "ns", "b", 8, "127.0.0.1:3")
    await membership.register(STORE)
    assert await membership.members("ns") == ([], [STORE])
    await writer.claim()
    await mirror.start()
    await until(lambda: mirror.stat().snapshots_total == 1, "the mirror has its snapshot")
    for part in (CHAIN[:150], CHAIN[150:]):
        assert await writer.publish([Change(name, 1, True) for name in part])
    assert (await writer.heartbeat())[0] is Standing.CURRENT
    assert len(await index.lookup(CHAIN)) == len(CHAIN)
    await until(lambda: prefixes(mirror, prefix_map, CHAIN) == {"a": len(CHAIN)}, "the mirror follows")
    assert await writer.unpublish(CHAIN[-1:]) == 1
    await other.claim()
    await other.reap("a")  # it lives: nothing goes
    await until(lambda: prefixes(mirror, prefix_map, CHAIN) == {"a": len(CHAIN) - 1}, "the mirror follows")
    await writer.leave()
    await membership.unregister(STORE)
    assert await membership.members("ns") == ([], [])
    await until(lambda: mirror.stat().blocks == 0, "the mirror follows")
    assert mirror.stat().gaps_total == 0
    orders = OrderBook(url)
    await orders.change("ns", [ScaleOrder(1, 2)])
    assert (await orders.read("ns")).scale == ScaleOrder(1, 2)
    await orders.change("ns", (), ["scale"])
    for each in (membership, index, mirror, writer, other, orders):
        await each.close()


def test_the_documented_user_may_do_all_that_is_needed(server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"redis://tandem:{quote(PASSWORD, safe='')}@127.0.0.1:{port(server)}/0"
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        client.script_flush()
        client.execute_command("ACL", "LOG", "RESET")
        run(lambda: use_everything(url, monkeypatch))
        assert client.execute_command("ACL", "LOG") == [], "nothing was tried that is not allowed"


def test_and_no_more(server: EmbeddedRedis) -> None:
    url = f"redis://tandem:{quote(PASSWORD, safe='')}@127.0.0.1:{port(server)}/0"

    async def body() -> None:
        link = Link(url, 5.0)
        for command in (("FLUSHALL",), ("KEYS", "*"), ("CONFIG", "GET", "*"), ("GET", "another:key"), ("ACL", "LIST")):
            with pytest.raises(Unavailable, match="permission"):
                await link.command(*command)
        with pytest.raises(Unavailable):
            await link.script("return redis.call('GET', KEYS[1])", ["another:key"], [])
        await link.close()

    run(body)


def test_everything_over_tls(server: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, key = certificate(tmp_path, "right")
    with redis.Redis.from_url(server.url) as client:
        client.flushall()

    async def body() -> None:
        async with tls_proxy(port(server), chain, key) as tls_port:
            password = quote(PASSWORD, safe="")
            await use_everything(f"rediss://tandem:{password}@127.0.0.1:{tls_port}/0?ssl_ca_certs={chain}", monkeypatch)

    run(body)


def test_a_wrong_authority_password_or_protocol_is_unavailable_and_tells_no_secret(
    server: EmbeddedRedis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    chain, key = certificate(tmp_path, "right")
    wrong, _ = certificate(tmp_path, "wrong")
    password = quote(PASSWORD, safe="")
    told: list[str] = []

    async def fails(url: str) -> None:
        membership, index = Membership(url), Index(url, "ns")
        with pytest.raises(Unavailable, match=r"Redis at rediss?://127") as caught:
            await membership.members("ns")
        assert await index.lookup(CHAIN) == []
        with pytest.raises(StartupError, match=r"cannot reach Redis at rediss?://127") as at_start:
            await asyncio.to_thread(ping, url, 5.0)
        told.extend((caught.value.message, at_start.value.message))
        await membership.close()
        await index.close()

    async def body() -> None:
        async with tls_proxy(port(server), chain, key) as tls_port:
            await fails(f"rediss://tandem:{password}@127.0.0.1:{tls_port}/0?ssl_ca_certs={wrong}")
            assert "certificate" in told[0].lower()
            await fails(f"rediss://tandem:{password}@127.0.0.1:{tls_port}/0")  # the system's authorities
            await fails(f"redis://tandem:{password}@127.0.0.1:{tls_port}/0")  # plain to a TLS port
        await fails(
            f"rediss://tandem:{password}@127.0.0.1:{port(server)}/0?ssl_ca_certs={chain}"
        )  # TLS to a plain port
        await fails(f"redis://tandem:{password}x@127.0.0.1:{port(server)}/0")
        await fails(f"redis://nobody:{password}@127.0.0.1:{port(server)}/0")

    run(body)
    everything = caplog.text + "".join(told)
    assert len(told) == 12
    assert PASSWORD not in everything
    assert password not in everything
    assert "odd" not in everything


def test_cancelling_a_command_ends_it(server: EmbeddedRedis) -> None:
    """Whenever it comes: redis-py's own time-outs swallow a cancellation that meets an answer (Python 3.11)."""

    async def body() -> None:
        link = Link(server.url, 5.0)

        async def forever() -> Any:
            while True:
                await link.command("GET", "x")

        for pause in range(200):
            task = asyncio.create_task(forever())
            await asyncio.sleep(0.0005 + pause * 0.00001)
            task.cancel()
            done, _ = await asyncio.wait({task}, timeout=5.0)
            assert done
        await link.close()

    run(body)
