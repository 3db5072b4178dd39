"""What goes wrong around the tier: Redis that lies, hangs or dies, stores that die or hang. It costs time, no token."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from cluster.messages import Accepted, DecodeJob, Submit
from cluster.redis import Link
from kvstore import index
from kvstore.hashing import extend
from kvstore.index import Keys
from kvstore.redis_server import EmbeddedRedis
from tests.kvstore.rig import Process
from tests.workers.site import (
    BUSY,
    CONFIG,
    KEY,
    PATIENCE_S,
    PROMPT,
    Site,
    expected,
    generation,
    prefill,
    run,
    store_process,
    until,
)
from tests.workers.test_tier import prefilled, prompt
from workers import tier


@contextlib.contextmanager
def own_redis() -> Iterator[EmbeddedRedis]:
    """One that may be stopped or killed."""
    server = EmbeddedRedis()
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server.pid, signal.SIGCONT)
        server.close()


@contextlib.asynccontextmanager
async def stopped(process: Process) -> AsyncIterator[None]:
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


# ---------------------------------------------------------------------------------------------------- a lying index
REQUESTS = 500
PREFIXES = [prompt(40, seed) for seed in range(60)]


class Liar:
    """Writes into the index that everybody has everything, under any epoch, generation and address."""

    def __init__(self, site: Site, addresses: list[str]) -> None:
        self._link = Link(site.identity.redis_url, 5.0)
        self._keys = Keys(site.identity.namespace)
        self._addresses = addresses
        self._rng = random.Random(1)
        self._chains: list[list[bytes]] = []
        for tokens in PREFIXES:
            self._chains.append([])
            extend(self._chains[-1], KEY.root(b""), tokens, CONFIG.block_size)
        self.lies = 0

    async def lie(self) -> None:
        rng = self._rng
        epochs: dict[str, int] = {}
        while True:
            entries = await self._link.command("HGETALL", self._keys.stores)
            known = {store.decode(): int(value.split()[0]) for store, value in entries.items()}
            liar = f"liar{rng.randrange(4)}"
            epochs[liar] = rng.choice([*known.values(), rng.getrandbits(52)])
            value = f"{epochs[liar]} {int(time.time() * 1000) + 10_000} {rng.choice(self._addresses)}"
            await self._link.command("HSET", self._keys.stores, liar, value)
            store = rng.choice([*known, liar])
            epoch = {**known, **epochs}.get(store, 1)
            for key in self._keys.blocks(rng.choice(self._chains)):
                lie = f"{epoch} {rng.choice([0, 1, 2, rng.getrandbits(20)])}"
                await self._link.command(*(("DEL", key) if rng.random() < 0.02 else ("HSET", key, store, lie)))
                self.lies += 1
            await asyncio.sleep(0.001)

    async def close(self) -> None:
        await self._link.close()


def test_a_lying_index_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "LOOKUP_S", 2.0)  # on a busy machine lies must be heard, not be late
    monkeypatch.setattr(tier, "LOCATE_S", 2.0)
    with own_redis() as redis, socket.create_server(("127.0.0.1", 0)) as silent:

        async def body(site: Site) -> None:
            async with store_process(redis.url, "p1") as (one, _), store_process(redis.url, "p2") as (two, _):
                names = ["w1", "w2", "w3"]
                for name in names:
                    await site.worker(name, config=BUSY, blocks=130, token_s=0.0002)
                await site.connected(*names)
                worker = site.clients[names[0]].address  # a live server that is no store
                nobody = "127.0.0.1:1"
                mute = f"127.0.0.1:{silent.getsockname()[1]}"  # takes connections and says nothing
                liar = Liar(site, [one, two, one, two, worker, nobody, mute, "rubbish"])
                lying = asyncio.create_task(liar.lie())
                await until(lambda: liar.lies > 500)
                try:
                    await _requests(site, names)
                finally:
                    lying.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await lying
                    await liar.close()
                loads = [site.load(name) for name in names]
                assert liar.lies > 1000
                assert sum(load.fetched_bytes_total for load in loads) > 0
                assert sum(load.fetch_failures_total for load in loads) > 0
                await site.quiet()
                for address in (one, two):
                    await until(lambda address=address: _zero(site, address))  # type: ignore[misc]

        run(body, redis, store=False)


async def _zero(site: Site, address: str) -> bool:
    return await site.held(address) == 0


async def _requests(site: Site, names: list[str]) -> None:
    rng = random.Random(2)
    right: dict[tuple[int, ...], list[int]] = {}
    gate = asyncio.Semaphore(12)

    async def one(number: int) -> None:
        tokens = (*rng.choice(PREFIXES)[: rng.choice([20, 37, 40])], *range(rng.randrange(8)))
        name = f"r{number}"
        async with gate:
            if number % 5 == 0:  # a prefill whose handoff another one follows
                p, d = rng.sample(names, 2)
                handoff = (await prefill(site.clients[p], f"p{number}", prompt=tokens)).handoff
                job = DecodeJob(generation(name, tokens, 6), handoff)
                assert isinstance(await site.clients[d].call("Submit", Submit("router", job), 5), Accepted)
                await until(lambda: name in site.finished)
            else:
                await site.complete(rng.choice(names), name, prompt=tokens, new=6)
        right.setdefault(tokens, expected(tokens, 6))
        assert site.tokens[name] == right[tokens], tokens

    await asyncio.gather(*(one(number) for number in range(REQUESTS)))
    assert not site.failed


# ------------------------------------------------------------------------------------------------------------ Redis
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_without_redis_handoffs_and_the_own_store_go_on(how: signal.Signals) -> None:
    with own_redis() as redis:

        async def body(site: Site) -> None:
            await site.worker("a", config=BUSY)
            await site.worker("b", config=BUSY)
            await site.connected("a", "b")
            during = asyncio.create_task(site.complete("a", "during", prompt=prompt(41, 9), new=60))
            os.kill(redis.pid, how)
            handoff = (await prefill(site.clients["a"], "p1")).handoff
            job = DecodeJob(generation("d1"), handoff)
            assert isinstance(await site.clients["b"].call("Submit", Submit("router", job), 5), Accepted)
            await until(lambda: "d1" in site.finished)
            assert site.tokens["d1"] == expected(PROMPT, 10)
            assert site.load("b").handoff_failures_total == 0
            await prefilled(site, "a", "p2", prompt=prompt(60, 1))
            assert await site.complete("b", "d2", prompt=prompt(60, 1)) == expected(prompt(60, 1), 10)
            assert site.cached["d2"] == 56
            nowhere = prompt(60, 2)
            assert await site.complete("b", "d3", prompt=nowhere) == expected(nowhere, 10)
            assert await during == expected(prompt(41, 9), 60)
            await site.quiet()

        run(body, redis)


# ----------------------------------------------------------------------------------------------------------- stores
@pytest.mark.parametrize("delay_ms", [0, 3, 6, 12])
def test_a_store_that_is_killed_while_it_is_fetched_from(delay_ms: int) -> None:
    with own_redis() as redis:

        async def body(site: Site) -> None:
            async with store_process(redis.url) as (_, store):
                await site.worker("a", config=BUSY)
                await site.worker("b", config=BUSY)
                await site.connected("a", "b")
                prompts = {f"d{seed}": prompt(240, seed) for seed in range(4)}
                for name, tokens in prompts.items():
                    await prefilled(site, "a", f"p-{name}", prompt=tokens)
                    await site.complete("a", f"again-{name}", prompt=tokens, new=1)  # its writes have ended
                tasks = [asyncio.create_task(site.complete("b", name, prompt=p)) for name, p in prompts.items()]
                await asyncio.sleep(delay_ms / 1000)
                store.kill()
                assert await asyncio.gather(*tasks) == [expected(tokens, 10) for tokens in prompts.values()]
                await site.quiet()

        run(body, redis, store=False)


def test_a_store_that_is_killed_while_it_is_written_to_and_the_one_that_comes_after_it() -> None:
    with own_redis() as redis:

        async def body(site: Site) -> None:
            await site.worker("a", config=BUSY, blocks=256, token_s=0.0001)
            prompts = {f"d{seed}": prompt(30 + seed, seed) for seed in range(8)}
            async with store_process(redis.url) as (_, store):
                await site.connected("a")
                tasks = [asyncio.create_task(site.complete("a", n, prompt=p, new=100)) for n, p in prompts.items()]
                await until(lambda: site.load("a").offloaded_blocks_total > 0)
                store.kill()
                assert await asyncio.gather(*tasks) == [expected(tokens, 100) for tokens in prompts.values()]
            await site.quiet()
            assert site.load("a").offload_failures_total > 0
            async with store_process(redis.url) as (address, _):
                before = site.load("a").offloaded_blocks_total

                async def written() -> bool:
                    name = f"again{len(site.finished)}"  # once more until the worker has found the new store
                    assert await site.complete("a", name, prompt=PROMPT, new=8) == expected(PROMPT, 8)
                    return site.load("a").offloaded_blocks_total > before

                await until(written)
                await site.quiet()
                await until(lambda: _zero(site, address))

        run(body, redis, store=False)


def test_a_store_that_hangs_is_not_waited_for() -> None:
    with own_redis() as redis:

        async def body(site: Site) -> None:
            async with store_process(redis.url) as (address, store):
                await site.worker("a", config=BUSY)
                await site.worker("b", config=BUSY)
                await site.connected("a", "b")
                await prefilled(site, "a", "p1", prompt=prompt(200, 1))
                await site.complete("a", "again", prompt=prompt(200, 1), new=1)
                async with stopped(store):
                    began = time.monotonic()
                    for name in ("d1", "d2"):
                        assert await site.complete("b", name, prompt=prompt(200, 1)) == expected(prompt(200, 1), 10)
                    assert time.monotonic() - began < PATIENCE_S / 2  # far below the 30 s and more of other timeouts
                    assert not site.failed
                await site.quiet()
                await until(lambda: _zero(site, address))

        run(body, redis, store=False)
