"""Blocks on their way between a worker and its stores: in the worker there are only those known to be good."""

import asyncio
import dataclasses
import threading
from contextlib import suppress

import numpy as np
import pytest

from kvstore.copying import Block
from kvstore.layout import Layout
from workers.quantization import Int8Codec
from workers.sim import SimRunner, sim_layout
from workers.stored_blocks import EncodedBlocks, ExactBlocks

LAYOUT = sim_layout(4)
CODEC = Int8Codec(LAYOUT)
TABLE = [5, 3, 1, 0]


def runner() -> SimRunner:
    made = SimRunner(LAYOUT, 8, 100)
    for index in range(8):
        made.block(index)[:] = (
            np.random.default_rng(index).normal(size=LAYOUT.block_bytes // 4).astype(np.float32).view(np.uint8)
        )
    return made


def test_exact_blocks_are_those_of_the_worker() -> None:
    target = runner()
    blocks = ExactBlocks(target)
    assert blocks.layout == LAYOUT
    assert np.shares_memory(blocks.read(3), target.block(3))
    landing = blocks.landing(TABLE, 1, 3)
    landing.write(2)[:] = 7
    asyncio.run(landing.accept(3))
    assert (target.block(1) == 7).all()


def test_encoded_blocks_are_decoded_when_they_are_accepted_and_only_the_good_ones() -> None:
    source, target, before = runner(), runner(), runner()
    blocks = EncodedBlocks(target, CODEC)
    assert blocks.layout == CODEC.stored
    landing = blocks.landing(TABLE, 1, 4)
    for position in (1, 2, 3):
        landing.write(position)[:] = EncodedBlocks(source, CODEC).read(7 - position)
    assert all((target.block(i) == before.block(i)).all() for i in range(8)), "what arrives lies elsewhere"
    asyncio.run(landing.accept(3))
    for position, block in enumerate(TABLE):
        if position in (1, 2):
            want, got = source.block(7 - position).view(np.float32), target.block(block).view(np.float32)
            assert np.abs(want - got).max() < 0.03
        else:
            assert (target.block(block) == before.block(block)).all()


def test_a_codec_for_another_part_is_refused() -> None:
    with pytest.raises(ValueError, match="another part"):
        EncodedBlocks(runner(), Int8Codec(dataclasses.replace(LAYOUT, heads=1)))


class Slow(Int8Codec):
    """Says when it has begun, and goes on when it may."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.begun, self.go = threading.Event(), threading.Event()

    def decode(self, stored: Block, block: Block) -> None:
        self.begun.set()
        assert self.go.wait(10)
        super().decode(stored, block)


def test_a_cancelled_acceptance_ends_before_anybody_else_may_have_the_blocks() -> None:
    async def main() -> None:
        codec, target = Slow(LAYOUT), runner()
        landing = EncodedBlocks(target, codec).landing(TABLE, 0, 2)
        for position in (0, 1):
            landing.write(position)[:] = 0
        task = asyncio.create_task(landing.accept(2))
        assert await asyncio.to_thread(codec.begun.wait, 10)
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        codec.go.set()
        with suppress(asyncio.CancelledError):
            await task
        assert not target.block(TABLE[1]).any(), "it had come to its end"

    asyncio.run(asyncio.wait_for(main(), 20))
