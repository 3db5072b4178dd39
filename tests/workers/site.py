"""What the worker tests share: real workers, real stores, real gRPC and a real Redis; only the model is simulated."""

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from cluster.config import Config
from cluster.identity import Identity
from cluster.messages import (
    Abort,
    Accepted,
    DecodeJob,
    Generation,
    JobFailed,
    Load,
    Outputs,
    PrefillJob,
    Sampling,
    StepOutput,
    Submit,
    TokenOutput,
)
from cluster.rpc import Client
from cluster.store_messages import StatRequest, StoreStat
from kvstore.hashing import ModelKey
from kvstore.layout import Layout
from kvstore.redis_server import EmbeddedRedis
from kvstore.server import StoreServer
from tests.kvstore.rig import SECRET, Process, process
from workers import streams as streams_module
from workers.engine import Engine
from workers.sequence import Sequence
from workers.sim import SimRunner, Timings, sim_layout
from workers.worker import Worker, WorkerSettings

VOCAB = 1000
CONTEXT = 512
CONFIG = Config(block_size=4, token_budget=32, max_queue=2, max_sequences=2)
BUSY = CONFIG.model_copy(update={"max_queue": 1000, "max_sequences": 16})
LAYOUT = sim_layout(CONFIG.block_size)
KEY = ModelKey(b"sim", b"tokenizer", "float32", CONFIG.block_size)
PROMPT = tuple(range(1, 60))
FULL = (len(PROMPT) - 1) // CONFIG.block_size * CONFIG.block_size  # tokens of it that can come from elsewhere
PATIENCE_S = 20.0
streams_module.HEARTBEAT_S = 0.05  # so that the load of an idle worker is known soon


def runner(timings: Timings, blocks: int = 400) -> SimRunner:
    return SimRunner(LAYOUT, blocks, VOCAB, timings)


def expected(prompt: tuple[int, ...], new: int) -> list[int]:
    """Without any cache."""
    engine = Engine(runner(Timings()), token_budget=1000, max_sequences=1, max_context=CONTEXT)
    engine.add(Sequence(generation("x", prompt, new), router_id="", root=b"", deadline=math.inf))
    tokens: list[int] = []
    while len(tokens) < new:
        step = engine.step(0.0)
        engine.offloaded(step.offloads)
        for _, output in step.outputs:
            assert isinstance(output, TokenOutput)
            tokens += output.tokens
    return tokens


def generation(
    name: str, prompt: tuple[int, ...] = PROMPT, new: int = 10, salt: bytes = b"", exact: bool = True
) -> Generation:
    sampling = Sampling(max_tokens=new, temperature=0)
    return Generation(name, prompt, (), sampling, salt, 60_000, tenant=salt.hex(), exact=exact)


class Site:
    """Stores and workers as a test asks for them; the workers' output streams are read into `tokens`."""

    def __init__(self, redis_url: str, layout: Layout = LAYOUT) -> None:
        self.identity = Identity("ns", redis_url, SECRET, "127.0.0.1")
        self.store = StoreServer("store", layout, 2**20, self.identity)
        self.address = ""  # of the store, once it serves
        self.clients: dict[str, Client] = {}
        self.workers: dict[str, Worker] = {}
        self.last: dict[str, StepOutput] = {}  # worker -> its newest frame
        self.tokens: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}
        self.finished: set[str] = set()
        self.failed: dict[str, str] = {}
        self.readers: list[asyncio.Task[None]] = []

    async def worker(
        self, name: str, step_s: float = 0.0, token_s: float = 0.0005, config: Config = CONFIG, blocks: int = 400
    ) -> Client:
        """A worker whose prefill is slow enough for fetches to be worth it."""
        settings = WorkerSettings(name, "both", KEY, min(CONTEXT, blocks * 4), self.identity, config)
        return await self.serve(name, Worker(runner(Timings(step_s=step_s, token_s=token_s), blocks), settings))

    async def serve(self, name: str, worker: Worker) -> Client:
        self.workers[name] = worker
        self.clients[name] = client = Client((await worker.start()).address, SECRET)
        self.readers.append(asyncio.create_task(self.read(name)))
        await until(lambda: name in self.last)
        return client

    async def read(self, name: str) -> None:
        async with aclosing(self.clients[name].stream("Outputs", Outputs("router"), None)) as frames:
            async for frame in frames:
                self.last[name] = frame
                for output in frame.outputs:
                    if isinstance(output, JobFailed):
                        self.failed[output.id] = output.code
                        self.finished.add(output.id)
                    else:
                        known = self.tokens.setdefault(output.id, [])
                        assert output.start == len(known)
                        known += output.tokens
                        self.cached[output.id] = output.cached_tokens
                        self.finished.update([output.id] if output.finish else [])

    async def complete(self, worker: str, name: str, **more: Any) -> list[int]:
        """One generation by one worker, from its submission to its last token."""
        job = DecodeJob(generation(name, **more))
        answer = await self.clients[worker].call("Submit", Submit("router", job), 5)
        assert isinstance(answer, Accepted), answer
        await until(lambda: name in self.finished)
        assert name not in self.failed, self.failed
        return self.tokens[name]

    async def connected(self, *names: str) -> None:
        """Until these workers have found their store."""
        for name in names:
            await prefill(self.clients[name], f"hello-{name}", prompt=(7, 7))
            await until(lambda name=name: f"hello-{name}" in self.tokens)  # type: ignore[misc]

    async def leave(self) -> None:
        """Break every output stream, as a router that dies does."""
        for reader in self.readers:
            reader.cancel()
        await asyncio.gather(*self.readers, return_exceptions=True)

    async def stop(self, name: str) -> None:
        """A worker ends."""
        await self.clients.pop(name).close()
        await self.workers.pop(name).stop()

    async def stat(self, address: str = "") -> StoreStat:
        client = Client(address or self.address, SECRET)
        try:
            s: StoreStat = await client.call("Stat", StatRequest(), 5)
        finally:
            await client.close()
        assert s.free + s.reserved + s.held + s.cached + s.quarantined == s.slabs
        return s

    async def held(self, address: str = "") -> int:
        stat = await self.stat(address)
        return stat.held + stat.reserved + stat.quarantined

    def load(self, name: str) -> Load:
        return self.last[name].load

    async def quiet(self) -> None:
        """Until no worker uses a block; then nothing of the store is held either, but for what was never claimed."""
        for client in self.clients.values():
            await client.call("Abort", Abort(tuple(self.tokens)), 5)
        for name in self.workers:
            await until(lambda name=name: self.idle(self.load(name)))  # type: ignore[misc]
        if self.address:
            await until(lambda: none(self.held()))

    def idle(self, load: Load) -> bool:
        return load.running == load.waiting == 0 and load.blocks_free == load.blocks_total

    async def close(self) -> None:
        await self.leave()
        for client in self.clients.values():
            await client.close()
        for worker in self.workers.values():
            await worker.stop()
        if self.address:
            await self.store.stop()


async def until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            met = condition()
            if met if isinstance(met, bool) else await met:
                return
            await asyncio.sleep(0.01)


async def none(count: Awaitable[int]) -> bool:
    return await count == 0


def run(test: Callable[[Site], Awaitable[None]], redis: EmbeddedRedis, *, store: bool = True) -> None:
    """The test with one store in this process, or without."""

    @asynccontextmanager
    async def site() -> AsyncIterator[Site]:
        made = Site(redis.url)
        if store:
            made.address = (await made.store.start()).address
        try:
            yield made
        finally:
            await made.close()

    async def main() -> None:
        async with site() as made:
            await test(made)

    asyncio.run(asyncio.wait_for(main(), 60))


@asynccontextmanager
async def store_process(redis_url: str, store_id: str = "p", memory: int = 2**20) -> AsyncIterator[tuple[str, Process]]:
    """A store in a process of its own, to be killed."""
    settings = {"store_id": store_id, "layout": dataclasses.asdict(LAYOUT), "memory": memory, "port": 0}
    async with process("serve", redis_url=redis_url, **settings) as made:
        yield (await made.line()).split()[0], made


async def prefill(client: Client, name: str, **more: Any) -> Accepted:
    """Submit a prefill as soon as the worker has found the store."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            answer = await client.call("Submit", Submit("router", PrefillJob(generation(name, **more))), 5)
            if isinstance(answer, Accepted):
                return answer
            assert answer.code == "store_error", answer
            await asyncio.sleep(0.02)
