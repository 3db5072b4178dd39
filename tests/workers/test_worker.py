"""Workers as routers and stores see them: real gRPC, a real store and a real Redis; only the model is simulated."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from cluster.config import Config
from cluster.identity import Identity
from cluster.messages import (
    Abort,
    Accepted,
    Ack,
    DecodeJob,
    Generation,
    JobFailed,
    Outputs,
    PrefillJob,
    Refused,
    Sampling,
    SetRole,
    StepOutput,
    Submit,
    TokenOutput,
)
from cluster.rpc import Client
from cluster.store_messages import StatRequest
from kvstore.hashing import ModelKey
from kvstore.redis_server import EmbeddedRedis
from kvstore.server import StoreServer
from workers.engine import Engine
from workers.sequence import Sequence
from workers.sim import SimRunner, Timings, sim_layout
from workers.worker import Worker, WorkerSettings

SECRET = "secret"
VOCAB = 1000
CONTEXT = 512
CONFIG = Config(block_size=4, token_budget=32, max_queue=2, max_sequences=2)
KEY = ModelKey(b"sim", b"tokenizer", "float32", CONFIG.block_size)
PROMPT = tuple(range(1, 60))


def runner(step_s: float = 0.0) -> SimRunner:
    return SimRunner(sim_layout(CONFIG.block_size), 400, VOCAB, Timings(step_s=step_s))


def expected(prompt: tuple[int, ...], new: int) -> list[int]:
    engine = Engine(runner(), token_budget=1000, max_sequences=1, max_context=CONTEXT)
    engine.add(Sequence(generation("x", prompt, new), router_id="", root=b"", deadline=math.inf))
    tokens: list[int] = []
    while len(tokens) < new:
        for _, output in engine.step(0.0).outputs:
            assert isinstance(output, TokenOutput)
            tokens += output.tokens
    return tokens


def generation(name: str, prompt: tuple[int, ...] = PROMPT, new: int = 10) -> Generation:
    return Generation(name, prompt, (), Sampling(max_tokens=new, temperature=0), b"", 60_000)


class Site:
    """One store and the workers a test asks for, each with an output stream read into `tokens`."""

    def __init__(self, redis_url: str) -> None:
        self.identity = Identity("test", redis_url, SECRET, "127.0.0.1")
        self.store = StoreServer("store", sim_layout(CONFIG.block_size), 2**20, self.identity)
        self.address = ""  # of the store, once it serves
        self.clients: dict[str, Client] = {}
        self.last: dict[str, StepOutput] = {}  # worker -> its newest frame
        self.tokens: dict[str, list[int]] = {}
        self.failed: dict[str, str] = {}
        self._workers: list[Worker] = []
        self._readers: list[asyncio.Task[None]] = []

    async def worker(self, name: str, step_s: float = 0.0) -> Client:
        worker = Worker(runner(step_s), WorkerSettings(name, "both", KEY, CONTEXT, self.identity, CONFIG))
        self._workers.append(worker)
        self.clients[name] = client = Client((await worker.start()).address, SECRET)
        self._readers.append(asyncio.create_task(self._read(name)))
        await until(lambda: name in self.last)
        return client

    async def _read(self, name: str) -> None:
        async with aclosing(self.clients[name].stream("Outputs", Outputs("router"), None)) as frames:
            async for frame in frames:
                self.last[name] = frame
                for output in frame.outputs:
                    if isinstance(output, JobFailed):
                        self.failed[output.id] = output.code
                    else:
                        known = self.tokens.setdefault(output.id, [])
                        assert output.start == len(known)
                        known += output.tokens

    async def leave(self) -> None:
        """Break every output stream, as a router that dies does."""
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    async def stat(self) -> Any:
        client = Client(self.address, SECRET)
        try:
            return await client.call("Stat", StatRequest(), 5)
        finally:
            await client.close()

    async def held(self) -> int:
        stat = await self.stat()
        return stat.held + stat.reserved + stat.quarantined

    def load(self, name: str) -> Any:
        return self.last[name].load

    async def close(self) -> None:
        await self.leave()
        for client in self.clients.values():
            await client.close()
        for worker in self._workers:
            await worker.stop()
        await self.store.stop()


async def until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while True:
            met = condition()
            if met if isinstance(met, bool) else await met:
                return
            await asyncio.sleep(0.01)


def run(test: Callable[[Site], Awaitable[None]], redis: EmbeddedRedis) -> None:
    @asynccontextmanager
    async def site() -> AsyncIterator[Site]:
        made = Site(redis.url)
        made.address = (await made.store.start()).address
        try:
            yield made
        finally:
            await made.close()

    async def main() -> None:
        async with site() as made:
            await test(made)

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.fixture(scope="module")
def redis() -> Any:
    server = EmbeddedRedis()
    yield server
    server.close()


async def prefill(client: Client, name: str, **more: Any) -> Accepted:
    """Submit a prefill as soon as the worker has found the store."""
    async with asyncio.timeout(20):
        while True:
            answer = await client.call("Submit", Submit("router", PrefillJob(generation(name, **more))), 5)
            if isinstance(answer, Accepted):
                return answer
            assert answer.code == "store_error", answer
            await asyncio.sleep(0.02)


def test_blocks_go_from_one_worker_to_another_and_nothing_is_kept(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        p, d = await site.worker("p"), await site.worker("d")
        handoff = (await prefill(p, "p1")).handoff
        assert handoff is not None
        assert isinstance(await d.call("Submit", Submit("router", DecodeJob(generation("d1"), handoff)), 5), Accepted)
        await until(lambda: len(site.tokens.get("d1", [])) == 10)
        assert site.tokens["d1"] == expected(PROMPT, 10)
        assert site.tokens["p1"] == site.tokens["d1"][:1]
        await until(lambda: site.load("d").handoff_bytes_total == len(PROMPT) * sim_layout(4).token_bytes)
        assert site.load("d").prompt_tokens_total == 0
        await until(lambda: all(site.load(name).blocks_free == site.load(name).blocks_total for name in ("p", "d")))
        await until(lambda: _none(site.held()))

    run(body, redis)


async def _none(count: Awaitable[int]) -> bool:
    return await count == 0


def test_a_broken_output_stream_aborts_the_jobs_behind_it(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        client = await site.worker("w", step_s=0.005)
        await client.call("Submit", Submit("router", DecodeJob(generation("d1", new=400))), 5)
        await prefill(client, "p1")
        await until(lambda: site.load("w").running > 0)
        await site.leave()
        site._readers = [asyncio.create_task(site._read("w"))]
        await until(lambda: site.load("w").running == site.load("w").waiting == 0)
        await until(lambda: site.load("w").blocks_free == site.load("w").blocks_total)
        assert len(site.tokens["d1"]) < 400

    run(body, redis)


def test_an_aborted_handoff_is_given_back_wherever_it_is(redis: EmbeddedRedis) -> None:
    """Finished and unclaimed at the prefill worker; waiting for room at the decode worker."""

    async def body(site: Site) -> None:
        p, d = await site.worker("p"), await site.worker("d", step_s=0.005)
        await prefill(p, "p1")
        await until(lambda: "p1" in site.tokens)
        await p.call("Abort", Abort(("p1",)), 5)
        await until(lambda: _none(site.held()))
        for name in ("busy1", "busy2"):  # max_sequences
            await d.call("Submit", Submit("router", DecodeJob(generation(name, new=400))), 5)
        handoff = (await prefill(p, "p2", prompt=tuple(range(100, 150)))).handoff
        waiting = DecodeJob(generation("d2", prompt=tuple(range(100, 150))), handoff)
        await d.call("Submit", Submit("router", waiting), 5)
        await until(lambda: site.load("d").waiting == 1)
        assert await site.held() > 0
        await d.call("Abort", Abort(("d2", "busy1", "busy2")), 5)
        await until(lambda: _none(site.held()))

    run(body, redis)


def test_a_full_queue_and_jobs_that_make_no_sense_are_refused(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        client = await site.worker("w", step_s=0.01)

        async def refusal(prompt: tuple[int, ...], router: str = "router") -> str:
            answer = await client.call("Submit", Submit(router, DecodeJob(generation("x", prompt, 400))), 5)
            return answer.code if isinstance(answer, Refused) else ""

        assert await refusal(PROMPT, router="stranger") == "service_unavailable"
        assert await refusal(()) == "invalid_value"
        assert await refusal(tuple(range(CONTEXT))) == "invalid_value"
        assert await refusal((1, VOCAB)) == "invalid_value"
        for number in range(CONFIG.max_sequences + CONFIG.max_queue):
            job = DecodeJob(generation(f"d{number}", (number + 1,), 400))
            assert isinstance(await client.call("Submit", Submit("router", job), 5), Accepted)
        await until(lambda: site.load("w").waiting == CONFIG.max_queue)
        await until(lambda: _equal(refusal(PROMPT), "server_overloaded"))

    run(body, redis)


async def _equal(answer: Awaitable[str], wanted: str) -> bool:
    return await answer == wanted


def test_a_role_change_is_a_message(redis: EmbeddedRedis) -> None:
    async def body(site: Site) -> None:
        client = await site.worker("w")
        assert site.load("w").role == "both"
        assert await client.call("SetRole", SetRole("prefill"), 5) == Ack()
        await until(lambda: site.load("w").role == "prefill")

    run(body, redis)
