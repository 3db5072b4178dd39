"""Every prefill grid hands over to every decode grid, and every grid finds what another has written. No Ray, no HTTP:
real workers in real processes, a real store and a real Redis, and the tokens of transformers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from pathlib import Path

import pytest

from cluster.config import Config
from cluster.messages import Accepted, DecodeJob, Submit
from kvstore.hashing import ModelKey
from kvstore.redis_server import EmbeddedRedis
from kvstore.server import StoreServer
from tests.e2e.oracle import greedy
from tests.models import tiny_model
from tests.workers.remote_workers import remote
from tests.workers.site import Site, generation, prefill, until
from workers.architecture import layout, load_architecture
from workers.worker import WorkerSettings

Grid = tuple[int, int]  # tp, pp
Pair = tuple[Grid, Grid]  # of the prefill worker, of the decode worker
GRIDS: list[Grid] = [(tp, pp) for tp in (1, 2, 3) for pp in (1, 2, 3) if tp * pp <= 4]
PAIRS: list[Pair] = list(itertools.product(GRIDS, GRIDS))
BLOCK = 4
NEW = 10
CONTEXT = 256
HELLO = (7, 7)  # what `Site.connected` has every worker compute
KEY = ModelKey(b"tiny", b"tokenizer", "float32", BLOCK)
# KV heads: one each for two ranks, two and a copy for three; layers: 2 + 1 + 1 over three stages
SIZES = {
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "hidden_size": 96,
    "intermediate_size": 100,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), seed=3, **SIZES)


def name(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"


def settings(site: Site, grid: Grid) -> WorkerSettings:
    tp, pp = grid
    config = Config(
        prefill=0, decode_tp=tp, decode_pp=pp, dtype="float32", block_size=BLOCK, kv_memory=2**23, token_budget=32,
        max_sequences=16, threads=1, step_timeout=30,
    )  # fmt: skip
    return WorkerSettings(name(grid), "both", KEY, CONTEXT, site.identity, config)


@pytest.mark.timeout(180)
def test_every_pairing_hands_over_and_every_grid_reads_what_another_has_written(model: Path) -> None:
    rng = random.Random(4)
    prompts = {pair: [rng.randrange(10, 500) for _ in range(rng.randrange(40, 75))] for pair in PAIRS}
    right = {pair: greedy(model, tuple(prompt), NEW) for pair, prompt in prompts.items()}
    blocks = layout(load_architecture(model), "float32", BLOCK)

    async def main(redis: EmbeddedRedis, stack: contextlib.ExitStack) -> None:
        site = Site(redis.url, blocks)
        site.store = StoreServer("store", blocks, 2**25, site.identity)
        site.address = (await site.store.start()).address
        workers = {grid: stack.enter_context(remote(settings(site, grid), model)) for grid in GRIDS}
        try:
            await asyncio.gather(*(site.serve(name(grid), worker) for grid, worker in workers.items()))  # type: ignore[arg-type]
            await site.connected(*map(name, GRIDS))
            await asyncio.gather(*(hand_over(site, pair, prompt) for pair, prompt in prompts.items()))
            assert {pair: site.tokens[f"decode {pair}"] for pair in prompts} == right
            computed = {grid: site.load(name(grid)).prompt_tokens_total for grid in GRIDS}
            for grid in GRIDS:  # what was handed over was not computed again
                own = [prompt for pair, prompt in prompts.items() if pair[0] == grid]
                assert computed[grid] == sum(map(len, own)) + len(HELLO), name(grid)
                assert site.load(name(grid)).handoff_failures_total == 0
            for writer in GRIDS:
                await asyncio.gather(*(read(site, (writer, grid), prompts[writer, grid]) for grid in GRIDS))
            assert {pair: site.tokens[f"read {pair}"] for pair in prompts} == right
            cached = {pair: site.cached[f"read {pair}"] for pair in prompts}
            assert cached == {pair: (len(prompt) - 1) // BLOCK * BLOCK for pair, prompt in prompts.items()}
            await site.quiet()
        finally:
            await site.close()

    with contextlib.closing(EmbeddedRedis()) as redis, contextlib.ExitStack() as stack:
        asyncio.run(main(redis, stack))


def reader(pair: Pair) -> Grid:
    """A grid that has neither computed nor received the blocks; over all pairs every other one reads from each."""
    writer, apart = GRIDS.index(pair[0]), (GRIDS.index(pair[1]) - GRIDS.index(pair[0])) % len(GRIDS)
    return GRIDS[(writer + apart % (len(GRIDS) - 1) + 1) % len(GRIDS)]


async def hand_over(site: Site, pair: Pair, prompt: list[int]) -> None:
    """One request: a prefill by one worker, followed by the other."""
    accepted = await prefill(site.clients[name(pair[0])], f"prefill {pair}", prompt=tuple(prompt), new=NEW)
    job = DecodeJob(generation(f"decode {pair}", tuple(prompt), NEW), accepted.handoff)
    await complete(site, name(pair[1]), job)


async def read(site: Site, pair: Pair, prompt: list[int]) -> None:
    await complete(site, name(reader(pair)), DecodeJob(generation(f"read {pair}", tuple(prompt), NEW)))


async def complete(site: Site, worker: str, job: DecodeJob) -> None:
    answer = await site.clients[worker].call("Submit", Submit("router", job), 5)
    assert isinstance(answer, Accepted), answer
    await until(lambda: job.generation.id in site.finished)
    assert job.generation.id not in site.failed, site.failed
