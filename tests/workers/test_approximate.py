"""Exact and approximate requests on the same workers, with a real model, real stores of both kinds and a real Redis.

Approximate ones reuse int8 blocks and go on with finite values close to the right ones; exact ones get the same bytes
and tokens as where there is no int8 at all."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.messages import Accepted, DecodeJob, Submit
from kvstore.copying import Block
from kvstore.redis_server import EmbeddedRedis
from kvstore.server import StoreServer
from tests.workers.site import CONFIG, FULL, KEY, PROMPT, Site, generation, prefill, until
from tests.workers.tiny_models import build, load, reference
from workers.model_runner import ModelRunner
from workers.quantization import Int8Codec
from workers.runner import Alone, Chunk
from workers.stored_blocks import EncodedBlocks
from workers.worker import Worker, WorkerSettings

BLOCKS = FULL // CONFIG.block_size
CONTEXT = 128
NEW = 8


class Recorder(Alone):
    """A model slow enough for fetches to be worth it; keeps the KV of each sequence's prompt as it was used."""

    def __init__(self, model: ModelRunner) -> None:
        self.layout, self.num_blocks, self.vocab_size = model.layout, model.num_blocks, model.vocab_size
        self.shard = model.shard
        self.used: dict[str, Block] = {}  # sequence id -> bytes of its prompt's full blocks
        self._model = model

    def run(self, chunks: list[Chunk]) -> list[int | None]:
        time.sleep(0.002 * sum(chunk.take for chunk in chunks))
        tokens = self._model.run(chunks)
        for sequence in (chunk.sequence for chunk in chunks if chunk.samples):
            full = sequence.prompt_length // self.layout.tokens
            if full and sequence.id not in self.used:
                self.used[sequence.id] = np.concatenate([self.block(block) for block in sequence.block_table[:full]])
        return tokens

    def block(self, index: int) -> Block:
        return self._model.block(index)

    def values(self, name: str) -> Any:
        return self.used[name][: BLOCKS * self.layout.block_bytes].view(np.float32)


class Both(Site):
    """A store of either kind, and workers that use both."""

    def __init__(self, redis_url: str, model: Path) -> None:
        self.model = model
        self.layout = load(model).layout
        super().__init__(redis_url, self.layout)
        self.tier = StoreServer("tier", Int8Codec(self.layout).stored, 2**20, self.identity.approximate)
        self.tier_address = ""
        self.runners: dict[str, Recorder] = {}

    async def start(self) -> None:
        self.address = (await self.store.start()).address
        self.tier_address = (await self.tier.start()).address

    async def model_worker(self, name: str, int8: bool = True) -> None:
        """Connected to the stores it uses."""
        self.runners[name] = recorder = Recorder(load(self.model))
        blocks = EncodedBlocks(recorder, Int8Codec(self.layout)) if int8 else None
        settings = WorkerSettings(name, "both", KEY, CONTEXT, self.identity, CONFIG)
        await self.serve(name, Worker(recorder, settings, blocks))
        await self.connected(name)
        tries = 0
        while int8 and self.load(name).offloaded_blocks_total == 0:  # no store of that kind was there for those before
            tries += 1
            assert tries < 200, "the worker never found its int8 store"
            own: dict[str, Any] = {"prompt": (tries,) * 5, "salt": name.encode(), "exact": False}
            answer = await prefill(self.clients[name], f"try-{name}-{tries}", **own)
            await self.decode(name, f"tried-{name}-{tries}", answer, new=2, **own)
            await asyncio.sleep(0.1)

    async def decode(self, worker: str, name: str, answer: Accepted, **more: Any) -> None:
        """Claim a prefill's handoff, to the last token."""
        job = DecodeJob(generation(name, **more), answer.handoff)
        assert isinstance(await self.clients[worker].call("Submit", Submit("router", job), 5), Accepted)
        await until(lambda: name in self.finished)
        assert name not in self.failed, self.failed

    async def prefilled(self, worker: str, name: str) -> None:
        """An approximate prefill, decoded by the same worker; its blocks are in int8 afterwards."""
        before = self.load(worker).offloaded_blocks_total
        answer = await prefill(self.clients[worker], f"{name}-p", exact=False)
        await self.decode(worker, f"{name}-d", answer, new=2, exact=False)
        await until(lambda: self.load(worker).offloaded_blocks_total >= before + BLOCKS)

    def fetched(self) -> int:
        return sum(self.load(name).fetched_memory_tokens_total for name in self.workers)

    async def close(self) -> None:
        await super().close()
        await self.lose_tier()

    async def lose_tier(self) -> None:
        if self.tier_address:
            self.tier_address = ""
            await self.tier.stop()


@pytest.fixture(scope="module")
def redis() -> Any:
    server = EmbeddedRedis()
    yield server
    server.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    build("llama", directory)
    return directory


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """What transformers says."""
    return reference(build("llama", tmp_path_factory.mktemp("reference")), list(PROMPT), NEW)


def run(redis: EmbeddedRedis, model: Path, test: Callable[[Both], Awaitable[None]]) -> None:
    async def main() -> None:
        site = Both(redis.url, model)
        try:
            await site.start()
            await test(site)
            await site.quiet()
            await until(lambda: _nothing_held(site))
        finally:
            await site.close()

    asyncio.run(asyncio.wait_for(main(), 60))


async def _nothing_held(site: Both) -> bool:
    return not site.tier_address or await site.held(site.tier_address) == 0


def test_approximate_requests_hit_int8_blocks_of_another_worker(
    redis: EmbeddedRedis, model: Path, right: list[int]
) -> None:
    async def body(site: Both) -> None:
        await site.model_worker("a")
        await site.model_worker("b")
        await site.prefilled("a", "first")
        assert site.tokens["first-d"] == right[:2], "a handoff is exact, whoever asked for it"
        tokens = await site.complete("b", "again", new=NEW, exact=False)
        load = site.load("b")
        assert (len(tokens), site.cached["again"], load.fetched_memory_tokens_total) == (NEW, FULL, FULL)
        assert load.fetched_bytes_total == BLOCKS * Int8Codec(site.layout).stored.block_bytes
        exact, close = site.runners["a"].values("first-p"), site.runners["b"].values("again")
        assert np.isfinite(close).all()
        assert 0 < np.abs(close - exact).max() <= np.abs(exact).max() / 127
        assert (await site.stat()).cached == 0, "exact stores keep nothing of approximate requests"

    run(redis, model, body)


def test_exact_requests_are_the_same_with_int8_on_and_off(redis: EmbeddedRedis, model: Path, right: list[int]) -> None:
    """With approximate blocks of the same prompt on the device, and in the int8 stores."""

    async def body(site: Both) -> None:
        for name in ("a", "b"):
            await site.model_worker(name)
        await site.model_worker("off", int8=False)
        await site.prefilled("a", "first")
        await site.complete("b", "fetched", exact=False)
        fetched = site.fetched()
        for name in ("off", "a", "b"):  # "a" computed approximate blocks, "b" fetched some
            assert await site.complete(name, f"exact-{name}", new=1) == right[:1]  # no store has exact blocks yet
            assert site.cached[f"exact-{name}"] == 0
            used = site.runners[name].used[f"exact-{name}"]
            assert np.array_equal(used, site.runners["off"].used["exact-off"])
            assert await site.complete(name, f"more-{name}", new=NEW, salt=name.encode()) == right
        assert site.fetched() == fetched

    run(redis, model, body)


def test_exact_blocks_are_kept_and_found_as_if_there_were_no_int8(
    redis: EmbeddedRedis, model: Path, right: list[int]
) -> None:
    async def body(site: Both) -> None:
        await site.model_worker("a")
        await site.model_worker("b")
        before = (await site.stat(site.tier_address)).cached
        answer = await prefill(site.clients["a"], "p")
        await site.decode("a", "d", answer, new=NEW)
        assert await site.complete("b", "b", new=NEW) == right
        assert site.cached["b"] == FULL
        assert np.array_equal(site.runners["a"].used["p"], site.runners["b"].used["b"])
        assert (await site.stat(site.tier_address)).cached == before
        await site.complete("a", "approximate", exact=False)  # and exact blocks are no hit for the others
        assert site.cached["approximate"] == 0

    run(redis, model, body)


def test_without_int8_stores_every_request_is_exact(redis: EmbeddedRedis, model: Path, right: list[int]) -> None:
    async def body(site: Both) -> None:
        await site.model_worker("off", int8=False)
        assert await site.complete("off", "exact", new=NEW) == right
        assert await site.complete("off", "any", new=NEW, exact=False) == right
        assert site.cached["any"] == FULL

    run(redis, model, body)


def test_a_lost_int8_store_costs_hits_only(redis: EmbeddedRedis, model: Path, right: list[int]) -> None:
    async def body(site: Both) -> None:
        await site.model_worker("a")
        await site.model_worker("b")
        await site.prefilled("a", "first")
        await site.lose_tier()
        assert await site.complete("b", "again", new=NEW, exact=False) == right  # all of it computed
        assert site.cached["again"] == 0
        answer = await prefill(site.clients["b"], "p2", exact=False)
        await site.decode("a", "d2", answer, new=2, exact=False)
        assert await site.complete("b", "exact", new=NEW) == right

    run(redis, model, body)
