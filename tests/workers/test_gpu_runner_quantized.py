"""The GPU's runner with its KV in 8 bits, on a CPU: tokens of transformers with KV rounded the same way, whatever the
batch; how many blocks there are; what leaves a worker and arrives at another."""

import asyncio
import dataclasses
import math
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.config import Config
from cluster.errors import ModelError
from cluster.messages import Accepted, DecodeJob, Sampling, Submit
from kvstore.redis_server import EmbeddedRedis
from kvstore.server import StoreServer
from tests.workers import local_links
from tests.workers.gpu_engines import BLOCK, LIMITS, Counting, Sized, block_bytes, cpu_runner, crowded, gpu_runner
from tests.workers.site import KEY, Site, generation, prefill, until
from tests.workers.tiny_models import build, generate, prompts, reference, sequence
from workers.architecture import load_architecture, sizes
from workers.device import Device
from workers.device_blocks import DeviceBlocks
from workers.gpu_profile import Limits
from workers.gpu_runner import GpuRunner
from workers.quantization import Int8Codec
from workers.runner import Chunk
from workers.shard import shards
from workers.weights import shapes
from workers.worker import Worker, WorkerSettings

GREEDY = Sampling(temperature=0.0, max_tokens=1000)
both = pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn"])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    return build("llama", directory)


@both
@pytest.mark.parametrize("family", ["llama-multi-head", "qwen3"])
def test_greedy_tokens_are_those_of_transformers_with_rounded_kv(family: str, kv_dtype: str, tmp_path: Path) -> None:
    model, given = build(family, tmp_path), prompts([1, 16, 17, 40])
    expected = [reference(model, prompt, 8, kv_dtype) for prompt in given]
    assert generate(gpu_runner(tmp_path, kv_dtype=kv_dtype), given, 8, GREEDY, largest_chunk=30) == expected


@both
def test_chunks_prefix_hits_graphs_and_preemption_change_no_token(directory: Path, model: Any, kv_dtype: str) -> None:
    lengths, new, device = [40, 5, 33, 16], 40, Counting()
    run = crowded(gpu_runner(directory, 10, device, limits=Limits(64, 8, 128), kv_dtype=kv_dtype), lengths, new)
    given = prompts(lengths, seed=5)
    given.append([*given[0], 7, 8])
    assert run.tokens == {f"s{i}": reference(model, prompt, new, kv_dtype) for i, prompt in enumerate(given)}
    assert run.engine.scheduler.preemptions > 0
    assert run.cached["s4"] > 0
    assert device.replayed > 0


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_shards_have_the_blocks_of_one(directory: Path, model: Any, tp: int, pp: int) -> None:
    """A scale belongs to one head and layer, so it goes with the rectangle that these are in."""
    (prompt,) = prompts([32])
    alone = gpu_runner(directory, kv_dtype="int8")
    parts, links = shards(sizes(load_architecture(directory)), tp, pp), local_links.links(tp, pp)
    made = [partial(gpu_runner, directory, shard=each, links=links[each.rank], kv_dtype="int8") for each in parts]
    runners = local_links.together(made)

    def step(runner: GpuRunner) -> list[int | None]:
        return runner.run([Chunk(sequence("a", prompt, [5, 2], GREEDY), 0, 32)])

    token = step(alone)
    assert local_links.together([partial(step, runner) for runner in runners])[-1] == token
    for block in (5, 2):
        whole = np.zeros(alone.layout.block_bytes, np.uint8)
        for runner in runners:
            exact = DeviceBlocks(runner.device_cache, runner.layout, runner.shard)
            exact.part.write(whole, exact.read(block))
        here, there = _values(alone, alone.block(block)), _values(alone, whole)
        np.testing.assert_allclose(there, here, atol=0.02 * np.abs(here).max())


def _values(runner: GpuRunner, block: np.ndarray) -> np.ndarray:
    """Of a block in int8, as stores read it."""
    exact = dataclasses.replace(runner.layout, dtype="float32", itemsize=4)
    values = np.zeros(exact.block_bytes, np.uint8)
    Int8Codec(exact).decode(block, values)
    return values.view(np.float32)


@both
def test_blocks_leave_and_come_back_bit_for_bit_scales_included(directory: Path, model: Any, kv_dtype: str) -> None:
    runner = gpu_runner(directory, 12, kv_dtype=kv_dtype)
    (prompt,) = prompts([64])
    runner.run([Chunk(sequence("a", prompt, [7, 2, 11, 0], GREEDY), 0, 64)])
    blocks = DeviceBlocks(runner.device_cache, runner.layout, runner.shard)
    taken = torch.from_numpy(blocks.gather([7, 2, 11, 0]).copy())
    assert [row.numpy().tobytes() for row in taken] == [runner.block(index).tobytes() for index in (7, 2, 11, 0)]
    again = gpu_runner(directory, 12, kv_dtype=kv_dtype)
    DeviceBlocks(again.device_cache, again.layout, again.shard).scatter([3, 4, 5, 6], taken)
    longer = [*prompt, 9]
    tokens = []
    for each, table in ((runner, [7, 2, 11, 0, 1]), (again, [3, 4, 5, 6, 9])):
        (token,) = each.run([Chunk(sequence("b", longer, table, GREEDY), 64, 1)])
        tokens.append(token)
    assert tokens[0] == tokens[1] == reference(model, longer, 1, kv_dtype)[0]


def test_a_block_is_what_a_store_of_int8_would_have_of_the_same_kv(directory: Path, model: Any) -> None:
    (prompt,) = prompts([16])
    runner, exact = gpu_runner(directory, kv_dtype="int8"), cpu_runner(directory)
    for each in (runner, exact):
        each.run([Chunk(sequence("a", prompt, [3], GREEDY), 0, 16)])
    assert runner.layout == Int8Codec(exact.layout).stored
    found, expected = _values(runner, runner.block(3)), exact.block(3).view(np.float32)
    assert not np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


@both
def test_the_memory_that_is_given_counts_scales(directory: Path, model: Any, kv_dtype: str) -> None:
    cells = block_bytes(directory) // (2 * BLOCK * 16 * 4)
    assert block_bytes(directory, kv_dtype) == cells * 2 * BLOCK * (16 + 4)
    memory = 40 * block_bytes(directory)
    runner = GpuRunner.load(directory, "float32", BLOCK, memory, LIMITS, None, Device(), kv_dtype=kv_dtype)
    assert runner.num_blocks == 40 * 64 // 20


@both
def test_what_a_gpu_has_left_holds_as_many_more_blocks(directory: Path, model: Any, kv_dtype: str) -> None:
    block = block_bytes(directory, kv_dtype)
    device = Sized(10_000 * block, 5 * block, 160 * block)
    assert GpuRunner.load(directory, "float32", BLOCK, 0, LIMITS, None, device, kv_dtype=kv_dtype).num_blocks == 8840


def test_weights_are_not_in_8_bits(directory: Path, model: Any) -> None:
    """What they take is known before they are loaded, from the dtype that they are in."""
    values = sum(math.prod(shape) for shape in shapes(load_architecture(directory)).values())
    needed = 8 * block_bytes(directory, "int8")  # of the longest sequence
    total = 20 * values
    device = Sized(total, int(0.9 * total) - needed - 3 * values, 0)
    with pytest.raises(ModelError, match="fewer than one sequence of 128"):
        GpuRunner.load(directory, "float32", BLOCK, 0, LIMITS, None, device, kv_dtype="int8")
    assert device.answers == [0], "refused before the weights were loaded"


def test_a_gpu_that_cannot_read_e4m3_says_what_it_can(directory: Path, model: Any) -> None:
    old = Device()
    old.e4m3 = False
    with pytest.raises(ModelError, match=r"8\.9.*int8-cache"):
        GpuRunner.load(directory, "float32", BLOCK, 2**24, LIMITS, None, old, kv_dtype="float8_e4m3fn")
    GpuRunner.load(directory, "float32", BLOCK, 2**24, LIMITS, None, old, kv_dtype="int8")


@both
def test_workers_hand_over_through_a_store_and_another_reads_what_they_wrote(
    directory: Path, model: Any, kv_dtype: str
) -> None:
    """The store is of the workers' own layout: a block and its scales are one thing all the way."""
    config = Config(dtype="float32", block_size=BLOCK, token_budget=32, max_sequences=4, prefill=0)
    runners = {name: gpu_runner(directory, kv_dtype=kv_dtype) for name in ("first", "second")}
    layout, prompt = runners["first"].layout, tuple(prompts([70])[0])

    async def main(redis: EmbeddedRedis) -> None:
        site = Site(redis.url, layout)
        site.store = StoreServer("store", layout, 2**22, site.identity)
        site.address = (await site.store.start()).address
        try:
            for name, runner in runners.items():
                await site.serve(name, Worker(runner, WorkerSettings(name, "both", KEY, 128, site.identity, config)))
            await site.connected(*runners)
            handoff = (await prefill(site.clients["first"], "over", prompt=prompt)).handoff
            job = DecodeJob(generation("there", prompt, 6), handoff)
            assert isinstance(await site.clients["second"].call("Submit", Submit("router", job), 5), Accepted)
            await until(lambda: "there" in site.finished)
            assert site.tokens["there"] == reference(model, list(prompt), 6, kv_dtype)
            load = site.load("second")
            assert (load.handoff_failures_total, load.prompt_tokens_total) == (0, 2)  # what `connected` computes
            assert load.handoff_bytes_total >= 70 // BLOCK * layout.block_bytes
            await site.quiet()
        finally:
            await site.close()

    with closing(EmbeddedRedis()) as redis:
        asyncio.run(asyncio.wait_for(main(redis), 60))
