"""Orders in a real Redis: they replace each other by name, hold until they are withdrawn, and go with its data."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import redis

from cluster.errors import ProtocolError, Unavailable
from cluster.order_book import OrderBook
from cluster.orders import DrainOrder, Orders, RoleOrder, ScaleOrder, SplitOrder
from kvstore.redis_server import EmbeddedRedis


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    made = EmbeddedRedis()
    yield made
    made.close()


def run(url: str, test: Callable[[OrderBook], Awaitable[Any]]) -> None:
    async def body() -> None:
        book = OrderBook(url)
        try:
            async with asyncio.timeout(30):
                await test(book)
        finally:
            await book.close()

    asyncio.run(body())


def test_orders_replace_each_other_by_name_and_outlive_whoever_gave_them(server: EmbeddedRedis) -> None:
    async def give(book: OrderBook) -> None:
        for order in (ScaleOrder(1, 2), ScaleOrder(3, 4), DrainOrder("a"), RoleOrder("b", "prefill")):
            await book.change("ns", [order])

    async def read(book: OrderBook) -> None:
        assert await book.read("ns") == Orders(frozenset("a"), {"b": "prefill"}, scale=ScaleOrder(3, 4))
        assert await book.read("other") == Orders()
        left = Orders(roles={"b": "prefill"})
        assert await book.change("ns", (), ["scale", "drain/a", "drain/nobody"]) == left
        assert await book.change("ns", (), []) == left == await book.read("ns")
        split = SplitOrder(1, 2)
        assert await book.change("ns", [split], ["role/b"]) == Orders(split=split) == await book.read("ns")

    run(server.url, give)
    run(server.url, read)


def test_a_redis_that_lost_its_data_has_no_orders(server: EmbeddedRedis) -> None:
    async def test(book: OrderBook) -> None:
        await book.change("ns", [ScaleOrder(1, 2)])
        with redis.Redis.from_url(server.url) as client:
            client.flushall()
        assert await book.read("ns") == Orders()

    run(server.url, test)


def test_what_is_no_order_is_refused(server: EmbeddedRedis) -> None:
    async def test(book: OrderBook) -> None:
        await book.change("strange", [ScaleOrder(1, 2)])
        with redis.Redis.from_url(server.url) as client:
            client.hset("tandem:{strange}:orders", "scale", b"\x01")
        with pytest.raises(ProtocolError):
            await book.read("strange")

    run(server.url, test)


def test_no_redis_is_an_answer() -> None:
    async def test(book: OrderBook) -> None:
        with pytest.raises(Unavailable):
            await book.read("ns")
        with pytest.raises(Unavailable):
            await book.change("ns", [ScaleOrder(1, 2)])

    run("redis://127.0.0.1:1", test)
