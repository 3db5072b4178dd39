"""Blocks of a KV cache that the host cannot see, on their way to stores and back: which bytes, how many at a time."""

import asyncio
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch

from cluster.config import Config
from cluster.messages import Accepted, DecodeJob, Submit
from kvstore.redis_server import EmbeddedRedis
from kvstore.server import StoreServer
from tests.workers.gpu_engines import BLOCK, cpu_runner, gpu_runner
from tests.workers.site import KEY, Site, generation, prefill, until
from tests.workers.tiny_models import build, prompts, reference
from workers.device import Device, DeviceCache
from workers.device_blocks import DeviceBlocks
from workers.quantization import Int8Codec
from workers.shard import shards
from workers.sim import SimRunner, sim_layout, sim_sizes
from workers.stored_blocks import EncodedBlocks, exact_blocks
from workers.worker import Worker, WorkerSettings

LAYOUT = sim_layout(4)
BLOCKS = 40
TABLE = [*range(30, 10, -1)]


class Copies(Device):
    """Counts the copies: what is begun together."""

    count = 0

    @contextmanager
    def copying(self) -> Iterator[None]:
        self.count += 1
        yield


class OnDevice(SimRunner):
    """A sim whose blocks can only be had through its device."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(LAYOUT, BLOCKS, 100, shard=shards(sim_sizes(LAYOUT, 100), 1, 1)[0])
        self._values = np.random.default_rng(seed).normal(size=(BLOCKS, LAYOUT.block_bytes // 4)).astype(np.float32)
        self.device_cache = DeviceCache(torch.from_numpy(self._values), Copies())

    def block(self, index: int) -> np.ndarray:
        raise AssertionError("the host has no view of it")

    def bytes_of(self, index: int) -> bytes:
        return self._values[index].tobytes()

    @property
    def copies(self) -> int:
        return self.device_cache.device.count  # type: ignore[union-attr, attr-defined, no-any-return]


def small_batches(runner: OnDevice, blocks: int = 3) -> DeviceBlocks:
    made = exact_blocks(runner)
    assert isinstance(made, DeviceBlocks)
    made.batch = blocks
    return made


def test_blocks_that_will_be_read_are_copied_several_at_a_time_and_stay_what_they_were() -> None:
    runner = OnDevice()
    ids = [7, 1, 30, 4, 5, 2, 9, 0]
    read = small_batches(runner).reader(ids)
    found = [read(block) for block in ids]
    assert runner.copies == 3
    runner._values[:] = 0
    before = OnDevice()
    assert [block.tobytes() for block in found] == [before.bytes_of(index) for index in ids]
    assert small_batches(before).read(8).tobytes() == before.bytes_of(8)


def test_a_reader_that_goes_on_in_the_middle_reads_on_from_there() -> None:
    runner = OnDevice()
    read = small_batches(runner).reader([7, 1, 30, 4, 5])
    assert [read(block).tobytes() for block in (30, 4, 5, 7)] == [runner.bytes_of(index) for index in (30, 4, 5, 7)]


def test_what_lands_is_in_the_cache_once_it_was_accepted_and_only_the_good_ones() -> None:
    source, target = OnDevice(1), OnDevice(2)
    landing = small_batches(target).landing(TABLE, 2, 12)
    for position in [*range(2, 12, 2), *range(3, 12, 2)]:  # two streams
        landing.write(position)[:] = np.frombuffer(source.bytes_of(position), np.uint8)
    untouched = OnDevice(2)
    assert all(target.bytes_of(index) == untouched.bytes_of(index) for index in range(BLOCKS))
    asyncio.run(landing.accept(9))
    assert target.copies == 3
    for position, index in enumerate(TABLE):
        expected = source.bytes_of(position) if 2 <= position < 9 else untouched.bytes_of(index)
        assert target.bytes_of(index) == expected, position


def test_nothing_good_changes_nothing() -> None:
    target = OnDevice(2)
    landing = small_batches(target).landing(TABLE, 2, 12)
    landing.write(2)[:] = 1
    asyncio.run(landing.accept(2))
    assert target.copies == 0


def test_encoded_blocks_are_those_of_a_cache_that_the_host_sees() -> None:
    codec = Int8Codec(LAYOUT)
    source, target = OnDevice(1), OnDevice(2)
    seen = SimRunner(LAYOUT, BLOCKS, 100)
    for index in range(BLOCKS):
        seen.block(index)[:] = np.frombuffer(source.bytes_of(index), np.uint8)
    stored = EncodedBlocks(source, codec)
    read = stored.reader(TABLE[:4])
    encoded = [read(block).copy() for block in TABLE[:4]]
    assert [b.tobytes() for b in encoded] == [EncodedBlocks(seen, codec).read(block).tobytes() for block in TABLE[:4]]
    landing = EncodedBlocks(target, codec).landing(TABLE, 0, 4)
    there = EncodedBlocks(seen, codec).landing(TABLE, 0, 4)
    for position, block in enumerate(encoded):
        landing.write(position)[:] = block
        there.write(position)[:] = block
    asyncio.run(landing.accept(3))
    asyncio.run(there.accept(3))
    for position in range(3):
        assert target.bytes_of(TABLE[position]) == seen.block(TABLE[position]).tobytes()
    assert target.bytes_of(TABLE[3]) == OnDevice(2).bytes_of(TABLE[3])


def test_a_part_of_a_block_is_read_as_its_shard_has_it() -> None:
    part = shards(sim_sizes(LAYOUT, 100), 2, 1)[1]
    own = part.part(LAYOUT)
    values = torch.arange(5 * own.block_bytes // 4, dtype=torch.int32).view(5, -1)
    blocks = DeviceBlocks(DeviceCache(values, Device()), LAYOUT, part)
    assert blocks.part.own == own
    assert blocks.read(3).view(np.int32).tolist() == values[3].tolist()


def test_workers_on_gpus_and_on_cpus_hand_over_to_each_other_and_read_what_the_other_wrote(tmp_path: Path) -> None:
    model = build("llama", tmp_path)
    config = Config(dtype="float32", block_size=BLOCK, token_budget=32, max_sequences=4, prefill=0)
    gpu, cpu = gpu_runner(tmp_path), cpu_runner(tmp_path)
    gpu.block = OnDevice.block.__get__(gpu)  # type: ignore[method-assign]
    first, second = (tuple(prompt) for prompt in prompts([70, 50]))
    expected = {prompt: reference(model, list(prompt), 6) for prompt in (first, second)}

    async def main(redis: EmbeddedRedis) -> None:
        site = Site(redis.url, gpu.layout)
        site.store = StoreServer("store", gpu.layout, 2**22, site.identity)
        site.address = (await site.store.start()).address
        try:
            for name, runner in (("gpu", gpu), ("cpu", cpu)):
                settings = WorkerSettings(name, "both", KEY, 128, site.identity, config)
                await site.serve(name, Worker(runner, settings))
            await site.connected("gpu", "cpu")
            for here, there, prompt in (("gpu", "cpu", first), ("cpu", "gpu", second)):
                handoff = (await prefill(site.clients[here], f"to {there}", prompt=prompt)).handoff
                job = DecodeJob(generation(f"at {there}", prompt, 6), handoff)
                assert isinstance(await site.clients[there].call("Submit", Submit("router", job), 5), Accepted)
                await until(lambda there=there: f"at {there}" in site.finished)  # type: ignore[misc]
                assert site.tokens[f"at {there}"] == expected[prompt]
                assert site.load(there).handoff_failures_total == 0
            assert site.load("cpu").prompt_tokens_total == len(second) + 2  # what `connected` computes
            assert site.load("gpu").prompt_tokens_total == len(first) + 2
            await site.quiet()
        finally:
            await site.close()

    with closing(EmbeddedRedis()) as redis:
        asyncio.run(asyncio.wait_for(main(redis), 60))
