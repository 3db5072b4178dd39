"""The router's knowledge against real workers, a real store and a real Redis: its worth, and how it comes back."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from cluster.membership import Membership
from cluster.messages import Sampling
from kvstore.mirror import Mirror
from kvstore.prefix_map import PrefixMap
from kvstore.redis_server import EmbeddedRedis
from router import chains
from router.dispatch import Dispatcher
from router.fleet import Fleet
from router.placement import Ask, Decision
from router.request import Request
from tests.kvstore.rig import SECRET
from tests.workers.site import BUSY, FULL, KEY, PROMPT, Site, expected, run, until


@pytest.fixture(scope="module")
def redis() -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis()
    yield server
    server.close()


class Router:
    """What of a router has to do with placement."""

    def __init__(self, name: str, redis_url: str) -> None:
        prefix_map = PrefixMap()
        self.mirror = Mirror(redis_url, "ns", prefix_map)
        self.fleet = Fleet(
            Membership(redis_url), "ns", name, SECRET, 5.0,
            model_key=KEY, prefix_map=prefix_map, store_owners=self.mirror.stores,
        )  # fmt: skip
        self.dispatcher = Dispatcher(self.fleet, 30.0)

    async def serve(self, request: Request) -> list[int]:
        return [token async for delta in self.dispatcher.serve(request) for token in delta.tokens]

    async def decision(self, prompt: tuple[int, ...], excluded: frozenset[str] = frozenset()) -> Decision:
        hashes = await chains.hashes(KEY, prompt, b"", True)
        return self.fleet.place(Ask(len(prompt), 10, excluded), hashes)


@asynccontextmanager
async def router(name: str, redis_url: str, workers: int) -> AsyncIterator[Router]:
    made = Router(name, redis_url)
    await made.mirror.start()
    await made.fleet.start()
    try:
        await until(lambda: len(made.fleet.table) == workers)
        yield made
    finally:
        await made.dispatcher.close()
        await made.fleet.close()
        await made.mirror.close()


def request(name: str, prompt: tuple[int, ...] = PROMPT, new: int = 10) -> Request:
    return Request(name, prompt, Sampling(max_tokens=new, temperature=0), b"", "")


def test_a_router_that_restarts_is_blind_but_right_and_then_level_again(redis: EmbeddedRedis) -> None:
    async def test(site: Site) -> None:
        await site.worker("w1")
        await site.worker("w2")
        async with router("router-a", redis.url, 2) as before:
            first = request("r1")
            assert await before.serve(first) == expected(PROMPT, 10)
            home = first.decisions[0].route.decode
            async with asyncio.timeout(10):
                while (await before.decision(PROMPT)).chosen.device_tokens < FULL:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        async with router("router-b", redis.url, 2) as after:
            assert await after.serve(request("r2")) == expected(PROMPT, 10)
            others = frozenset({"w1", "w2"} - {home})
            async with asyncio.timeout(2):  # what is promised of a router that restarts
                while (await after.decision(PROMPT, others)).chosen.device_tokens < FULL:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

    run(test, redis)


def test_a_prefix_in_a_store_outlives_its_worker(redis: EmbeddedRedis) -> None:
    async def test(site: Site) -> None:
        for name in ("w1", "w2"):
            await site.worker(name, token_s=0.002)
        await site.connected("w1", "w2")
        async with router("router-a", redis.url, 2) as one:
            first = request("r1")
            await one.serve(first)
            home = first.decisions[0].route.decode
            excluded = frozenset({home})
            async with asyncio.timeout(10):
                while not (await one.decision(PROMPT, excluded)).chosen.fetched_tokens:
                    await one.serve(request("again"))  # a prompt seen twice is offloaded
                    await asyncio.sleep(0.1)
            await site.stop(home)
            await until(lambda: home not in one.fleet.table.ids())
            again = request("r2")
            assert await one.serve(again) == expected(PROMPT, 10)
            assert again.decisions[0].chosen.fetched_tokens > 0

    run(test, redis)


def test_two_routers_do_not_stampede(redis: EmbeddedRedis) -> None:
    """Each knows of the other's requests only what the workers report."""

    async def test(site: Site) -> None:
        names = ("w1", "w2", "w3", "w4")
        for name in names:
            await site.worker(name, step_s=0.002, config=BUSY)
        async with router("router-a", redis.url, 4) as one, router("router-b", redis.url, 4) as two:
            requests = [request(f"r{at}", tuple(range(at, at + 40))) for at in range(48)]
            routers = (one, two)
            answers = await asyncio.gather(*(routers[at % 2].serve(asked) for at, asked in enumerate(requests)))
            assert answers[7] == expected(requests[7].prompt, 10)
            assert all(len(answer) == 10 for answer in answers)
            served = Counter(asked.decisions[-1].route.decode for asked in requests)
            assert max(served[name] for name in names) <= 1.5 * len(requests) / len(names)
            await until(lambda: not any(link.pending for made in routers for link in made.fleet.links()))

    run(test, redis)
