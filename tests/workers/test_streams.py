"""What each connected router is told: by streams that are read at any time, and by real workers over gRPC."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import WorkerLost
from cluster.messages import Accepted, DecodeJob, Outputs, StepOutput, Submit, TokenOutput
from cluster.rpc import Client
from kvstore.hashing import extend
from kvstore.prefix_map import PrefixMap, split
from kvstore.redis_server import EmbeddedRedis
from tests.kvstore.rig import SECRET
from tests.models import tiny_model
from tests.workers.engine_run import Run, engine, prompt, sequence
from tests.workers.remote_workers import remote
from tests.workers.site import CONFIG, CONTEXT, KEY, Site, generation, run, until
from tests.workers.test_cache_changes import apply
from workers import streams as streams_module
from workers.streams import Streams
from workers.worker import WorkerSettings

ROOT = KEY.root(b"")


@pytest.fixture(scope="module")
def redis() -> Any:
    server = EmbeddedRedis()
    yield server
    server.close()


class Context:
    """Of a gRPC call that goes on."""

    def __init__(self) -> None:
        self.done: list[Callable[[Any], None]] = []

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.done.append(callback)


class Reader:
    """A router that reads a frame when the test says so."""

    def __init__(self, streams: Streams, router_id: str) -> None:
        self.context = Context()
        self._frames: AsyncIterator[StepOutput] = streams.outputs(Outputs(router_id), self.context)
        self._next: asyncio.Task[StepOutput] | None = None
        self.known: set[bytes] = set()
        self.resets = 0
        self.frames: list[StepOutput] = []
        self.tokens: list[int] = []

    async def read(self) -> None:
        self.take(await anext(self._frames))

    async def read_what_there_is(self) -> None:
        """All frames that come without anything else happening."""
        while True:
            self._next = self._next or asyncio.ensure_future(anext(self._frames))
            for _ in range(5):
                await asyncio.sleep(0)
            if not self._next.done():
                return
            self.take(self._next.result())
            self._next = None

    def take(self, frame: StepOutput) -> None:
        self.frames.append(frame)
        for output in frame.outputs:
            assert isinstance(output, TokenOutput)
            assert output.start == len(self.tokens)
            self.tokens += output.tokens
        if frame.cache is not None:
            self.known = apply(self.known, frame.cache)
            self.resets += frame.cache.reset

    async def close(self) -> None:
        if self._next is not None:
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)


@pytest.mark.parametrize("seed", range(3))
def test_whoever_reads_whenever_ends_with_what_there_is(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reads all the time, one now and then, one joins late, and one stops reading until everything was too much."""
    monkeypatch.setattr(streams_module, "QUIET_S", 0.0)
    chance = random.Random(seed)

    async def body() -> None:
        worker = Run(engine(num_blocks=24))
        wanted = [False]
        left: list[str] = []
        load = worker.engine.load("both")
        streams = Streams(load, 40, lambda: wanted.__setitem__(0, True), left.append)
        eager, lazy, stuck = Reader(streams, "eager"), Reader(streams, "lazy"), Reader(streams, "stuck")
        readers = [eager, lazy, stuck]

        def step() -> None:
            done = worker.engine.step(worker.now, wanted[0])
            wanted[0] = False
            worker.engine.offloaded(done.offloads)
            for order in done.fetches:
                worker.deliver(order)
            for preempted in done.lookups:
                worker.engine.located(preempted, [])
            done.outputs.clear()  # they go to somebody else
            streams.act(done, worker.engine.load("both"))

        for reader in readers:
            await reader.read()
            assert reader.frames[0].cache is None, "blind at first"
        for number in range(40):
            worker.add(sequence(f"s{number}", prompt(chance.randrange(1, 60), seed=chance.randrange(6)), new=5))
            for _ in range(chance.randrange(12)):
                step()
                await eager.read_what_there_is()
            if chance.random() < 0.3:
                await lazy.read_what_there_is()
            if number == 3:
                await stuck.read_what_there_is()
            if number == 20:
                readers.append(Reader(streams, "late"))
        while worker.engine.sequences:
            step()
            await eager.read_what_there_is()
        for _ in range(3):
            for reader in readers:
                await reader.read_what_there_is()
            step()
        there = set(worker.engine.pool.names())
        assert len(there) > 10
        assert [reader.known == there for reader in readers] == [True] * 4
        assert stuck.resets == 2
        assert eager.resets == 1
        for reader in readers:
            await reader.close()

    asyncio.run(asyncio.wait_for(body(), 60))


def test_slow_readers_get_fewer_frames_and_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        worker = Run(engine())
        streams = Streams(worker.engine.load("both"), 1000, lambda: None, lambda _: None)
        reader, other = Reader(streams, "router"), Reader(streams, "other")
        await reader.read()
        await other.read()
        key = streams.key("router")
        assert key is not None
        worker.engine.add(sequence("x", prompt(20), new=30))
        worker.engine.sequences["x"].router_id = key
        while worker.engine.sequences:
            streams.act(worker.step(), worker.engine.load("both"))
        await reader.read_what_there_is()
        assert len(reader.frames) == 2
        assert reader.tokens == worker.tokens["x"]
        assert len(reader.tokens) == 30
        for one in (reader, other):
            await one.close()

    asyncio.run(asyncio.wait_for(body(), 60))


def test_a_stream_is_a_lease_and_the_newest_counts() -> None:
    async def body() -> None:
        left: list[str] = []
        streams = Streams(engine().load("both"), 1000, lambda: None, left.append)
        assert streams.key("router") is None
        first = Reader(streams, "router")
        await first.read()
        key = streams.key("router")
        second = Reader(streams, "router")
        await second.read()
        again = streams.key("router")
        assert key is not None
        assert again not in (None, key)
        assert not streams.connected(key)
        for callback in first.context.done:
            callback(None)
        assert left == [key]
        assert streams.key("router") == again
        for callback in second.context.done:
            callback(None)
        assert left == [key, again]
        assert streams.key("router") is None

    asyncio.run(asyncio.wait_for(body(), 60))


# -------------------------------------------------------------------------------------------------- over the network
class Router:
    """Listens to one worker and keeps what it is told as routers do."""

    def __init__(self, address: str, router_id: str) -> None:
        self._client = Client(address, SECRET)
        self._router_id = router_id
        self.map = PrefixMap()
        self.owner = self.map.join()
        self.frames: list[StepOutput] = []
        self.listening = asyncio.create_task(self._read())

    def depth(self, hashes: list[bytes]) -> int:
        return int(self.map.lookup(hashes)[self.owner])

    def has(self, hashes: list[bytes]) -> bool:
        """These and no others."""
        return self.depth(hashes) == len(hashes) == self.map.count(self.owner)

    async def _read(self) -> None:
        stream = self._client.stream("Outputs", Outputs(self._router_id), None)
        with suppress(WorkerLost):
            async with aclosing(stream) as frames:
                async for frame in frames:
                    self._take(frame)

    def _take(self, frame: StepOutput) -> None:
        self.frames.append(frame)
        if frame.cache is not None:
            if frame.cache.reset:
                self.map.leave(self.owner)
                self.owner = self.map.join()
            self.map.put(self.owner, split(frame.cache.put))
            self.map.delete(self.owner, split(frame.cache.delete))

    async def close(self) -> None:
        self.listening.cancel()
        await asyncio.gather(self.listening, return_exceptions=True)
        await self._client.close()

    async def submit(self, job: DecodeJob) -> None:
        assert isinstance(await self._client.call("Submit", Submit(self._router_id, job), 5), Accepted)


def chain(tokens: list[int]) -> list[bytes]:
    """Names of the blocks that a finished generation leaves: its last token's KV was never computed."""
    hashes: list[bytes] = []
    extend(hashes, ROOT, tokens[:-1], CONFIG.block_size)
    return hashes


def test_two_routers_one_late_both_know_what_there_is(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        await site.worker("w", token_s=0.0)
        early = Router(site.clients["w"].address, "early")
        prompt = tuple(range(1, 100))
        hashes = chain([*prompt, *await site.complete("w", "one", prompt=prompt)])
        late = Router(site.clients["w"].address, "late")
        for router in (early, late):
            await until(lambda router=router: router.has(hashes))  # type: ignore[misc]
        more = (*prompt, *site.tokens["one"], 7)
        hashes = chain([*more, *await site.complete("w", "two", prompt=more)])
        for router in (early, late):
            await until(lambda router=router: router.has(hashes))  # type: ignore[misc]
            await router.close()

    run(body, redis)


def test_what_was_evicted_is_told(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        await site.worker("w", token_s=0.0, blocks=40)
        router = Router(site.clients["w"].address, "other")
        first = tuple(range(1, 100))
        await site.complete("w", "one", prompt=first)
        await until(lambda: router.depth(chain([*first, 0])) == 24)
        second = tuple(range(500, 640))
        kept = chain([*second, *await site.complete("w", "two", prompt=second)])
        await until(lambda: router.depth(kept) == len(kept))
        await until(lambda: router.map.count(router.owner) <= 40)
        late = Router(site.clients["w"].address, "late")
        await until(lambda: late.map.count(late.owner) == router.map.count(router.owner) > 0)
        await router.close()
        await late.close()

    run(body, redis, store=False)


def test_a_worker_that_was_killed_begins_anew(redis: EmbeddedRedis, tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    config = CONFIG.model_copy(update={"runner": "sim"})

    async def body(site: Site) -> None:
        settings = WorkerSettings("w", "both", KEY, CONTEXT, site.identity, config)
        with remote(settings, model) as worker:
            router = Router((await worker.start()).address, "router")
            await until(lambda: bool(router.frames))
            prompt = tuple(range(1, 100))
            await router.submit(DecodeJob(generation("one", prompt, new=1)))
            await until(lambda: router.has(chain([*prompt, 0])))
            worker.kill()
            await until(router.listening.done)
        with remote(settings, model) as worker:
            again = Router((await worker.start()).address, "router")
            await until(lambda: any(frame.cache and frame.cache.reset for frame in again.frames))
            assert again.map.count(again.owner) == 0
        await router.close()
        await again.close()

    run(body, redis, store=False)


def test_a_router_without_outputs_hears_of_the_load_and_of_rates(
    redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though no sign of life is due for an hour."""

    async def body(site: Site) -> None:
        await site.worker("w", step_s=0.01)
        monkeypatch.setattr(streams_module, "HEARTBEAT_S", 3600.0)
        other = Router(site.clients["w"].address, "other")
        await until(lambda: bool(other.frames))
        rates = other.frames[0].rates
        assert rates is not None
        assert rates.step_tokens == CONFIG.token_budget
        assert rates.start_s > 0
        task = asyncio.create_task(site.complete("w", "one", new=30))
        await until(lambda: other.frames[-1].load.running == 1)
        await until(lambda: other.frames[-1].load.context_tokens >= 59)
        await task
        await until(lambda: other.frames[-1].load.running == 0)
        assert all(frame.outputs == () for frame in other.frames)
        monkeypatch.setattr(streams_module, "RATES_S", 0.0)
        count = sum(frame.rates is not None for frame in other.frames)
        await site.complete("w", "two", new=30)
        await until(lambda: sum(frame.rates is not None for frame in other.frames) > count)
        await other.close()

    run(body, redis)
