"""Blocks fetched from real stores over real gRPC: whatever sources say, what is reported valid has the right bytes."""

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np
import pytest

from cluster.errors import Corrupt, DeadlineExceeded, EpochMismatch, Expired, Unauthorized, Unavailable, WorkerLost
from kvstore.connections import Connections
from kvstore.fetcher import BlockFetcher, Fetched, Path, Source
from kvstore.layout import Layout
from kvstore.writer import HandoffWriter
from tests.kvstore.rig import (
    LAYOUT,
    Block,
    Process,
    Target,
    block_of,
    connections,
    hashes_for,
    stat,
    store,
    store_process,
    until,
    writer,
)

HOLD_MS = 30_000
T = TypeVar("T")
LARGE = Layout(heads=3, layers=30, tokens=16, dim=64, dtype="float32", itemsize=4)
VAST = Layout(heads=8, layers=16, tokens=16, dim=128, dtype="float32", itemsize=4)  # 2 MiB: three frames and more
both_paths = pytest.mark.parametrize("inline", [False, True], ids=["mapped", "inline"])


def run(test: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(60):
            return await test

    return asyncio.run(bounded())


@asynccontextmanager
async def fetcher(inline: bool = False, layout: Layout = LAYOUT) -> AsyncIterator[tuple[BlockFetcher, Connections]]:
    async with connections(inline, layout) as shared:
        made = BlockFetcher(shared)
        try:
            yield made, shared
        finally:
            await made.close()


@asynccontextmanager
async def two_stores(slabs: int) -> AsyncIterator[tuple[str, HandoffWriter, str, HandoffWriter]]:
    async with store(slabs) as (one, _), store(slabs) as (two, _), writer(one) as w, writer(two) as v:
        yield one, w, two, v


async def put(w: HandoffWriter, blocks: int, chain: int = 0, first: int = 0, layout: Layout = LAYOUT) -> int:
    """Leave the blocks `first`..`blocks` of a chain in the store; block i has the bytes of id 1000 * chain + i."""
    hashes = hashes_for(blocks * layout.tokens, chain, layout)[first:]
    handoff = await w.reserve(f"put-{chain}-{first}", hashes, len(hashes) * layout.tokens, HOLD_MS)
    await w.send(handoff.transfer_id, [(i, 1000 * chain + first + i) for i in range(len(hashes))])
    await w.finish(handoff.transfer_id, None)
    await w.revoke(handoff.transfer_id, "it is in the cache")
    return handoff.epoch


def assert_right(target: Target, valid: int, chain: int = 0, start: int = 0) -> None:
    assert all((target.blocks[i] == block_of(1000 * chain + i, target.layout)).all() for i in range(start, valid))


@both_paths
@pytest.mark.parametrize("layout", [LAYOUT, LARGE, VAST], ids=["small", "large", "vast"])
def test_every_block_comes(inline: bool, layout: Layout) -> None:
    async def body() -> None:
        async with store(9, layout) as (address, _), writer(address, layout) as w, fetcher(inline, layout) as (f, _):
            epoch = await put(w, 7, layout=layout)
            hashes = hashes_for(7 * layout.tokens, layout=layout)
            target = Target(layout)
            fetched = await f.fetch([Source(address, epoch, 2, 7, "memory")], hashes, target, 20)
            assert (fetched.valid_blocks, fetched.error) == (7, None)
            ((source, blocks, seconds),) = fetched.parts
            assert (source.path, blocks) == ("remote" if inline else "memory", 5)
            assert seconds > 0
            assert sorted(target.blocks) == [2, 3, 4, 5, 6]
            assert_right(target, 7, start=2)
            await until(lambda: quiet(address), "no pin is left")

    run(body())


async def quiet(address: str) -> bool:
    s = await stat(address)
    return (s.held, s.reserved, s.transfers, s.quarantined) == (0, 0, 0, 0)


def source(address: str, epoch: int, start: int, stop: int, path: Path = "memory") -> Source:
    return Source(address, epoch, start, stop, path)


def test_runs_of_several_stores_are_joined() -> None:
    async def body() -> None:
        async with two_stores(9) as (one, w, two, v), fetcher() as (f, _):
            a, b = await put(w, 9), await put(v, 6, first=3)
            target = Target()
            runs = [source(one, a, 0, 3), source(two, b, 3, 6, "remote"), source(one, a, 6, 9)]
            fetched = await f.fetch(runs, hashes_for(36), target, 20)
            assert (fetched.valid_blocks, fetched.error) == (9, None)
            assert [(s.path, blocks) for s, blocks, _ in fetched.parts] == [("memory", 3)] * 3, "by the path it took"
            assert_right(target, 9)

    run(body())


def test_nothing_to_fetch_is_nothing_fetched() -> None:
    async def body() -> None:
        async with fetcher() as (f, _):
            fetched = await f.fetch([], [], Target(), 1)
            assert (fetched.valid_blocks, fetched.parts, fetched.error) == (0, (), None)

    run(body())


# ----------------------------------------------------------------------------------------------- sources that are wrong
@both_paths
def test_a_block_that_was_evicted_ends_the_fetch_there(inline: bool) -> None:
    async def body() -> None:
        async with store(8) as (address, _), writer(address) as w, fetcher(inline) as (f, _):
            epoch = await put(w, 5)
            target = Target()
            fetched = await f.fetch([source(address, epoch, 0, 7)], hashes_for(28), target, 20)
            assert fetched.valid_blocks == 5
            assert isinstance(fetched.error, Expired)
            assert_right(target, 5)

    run(body())


@both_paths
def test_what_comes_after_a_hole_does_not_count(inline: bool) -> None:
    async def body() -> None:
        async with two_stores(8) as (one, w, two, v), fetcher(inline) as (f, _):
            a, b = await put(w, 2), await put(v, 8, first=4)
            target = Target()
            runs = [source(one, a, 0, 4), source(two, b, 4, 8)]
            fetched = await f.fetch(runs, hashes_for(32), target, 20)
            assert fetched.valid_blocks == 2
            assert_right(target, 2)
            await until(lambda: quiet(two), "no pin is left")

    run(body())


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nobody.invalid:1", "rubbish", ""])
def test_an_address_of_nobody_is_a_miss_and_is_left_alone_for_a_while(address: str) -> None:
    async def body() -> None:
        async with fetcher() as (f, shared):
            fetched = await f.fetch([source(address, 1, 3, 5)], hashes_for(20), Target(), 3)
            assert (fetched.valid_blocks, fetched.parts) == (3, ())
            assert isinstance(fetched.error, Unavailable)
            assert shared.reputation.avoided(address, time.monotonic())
            again = await f.fetch([source(address, 1, 3, 5)], hashes_for(20), Target(), 3)
            assert "left alone" in str(again.error)

    run(body())


def test_another_epoch_is_a_miss_and_does_not_hurt_the_right_one() -> None:
    async def body() -> None:
        async with store(8) as (address, _), writer(address) as w, fetcher() as (f, shared):
            epoch = await put(w, 2)
            for wrong in (epoch + 1, 0):
                fetched = await f.fetch([source(address, wrong, 0, 2)], hashes_for(8), Target(), 20)
                assert (fetched.valid_blocks, type(fetched.error)) == (0, EpochMismatch)
            assert not shared.reputation.avoided(address, time.monotonic())
            assert (await f.fetch([source(address, epoch, 0, 2)], hashes_for(8), Target(), 20)).valid_blocks == 2

    run(body())


def test_a_wrong_secret_is_a_miss() -> None:
    async def body() -> None:
        async with store(4) as (address, _):
            shared = Connections("wrong", LAYOUT)
            f = BlockFetcher(shared)
            fetched = await f.fetch([source(address, 1, 0, 2)], hashes_for(8), Target(), 20)
            assert (fetched.valid_blocks, type(fetched.error)) == (0, Unauthorized)
            await shared.close()

    run(body())


def test_a_bit_that_flips_costs_that_block_and_its_owner_is_told() -> None:
    async def body() -> None:
        async with store(8) as (address, server), writer(address) as w, fetcher(True) as (f, shared):
            epoch = await put(w, 6)
            arena = server._arena
            (slab,) = [i for i in range(arena.slabs) if (arena.slab(i) == block_of(3)).all()]
            arena.slab(slab)[7] ^= 4
            target = Target()
            fetched = await f.fetch([source(address, epoch, 0, 6)], hashes_for(24), target, 20)
            assert (fetched.valid_blocks, type(fetched.error)) == (3, Corrupt)
            assert_right(target, 3)
            assert shared.reputation.corrupt_blocks == 1
            await until(lambda: corrupt(address, 1), "the store has dropped it")
            again = await f.fetch([source(address, epoch, 0, 6)], hashes_for(24), target, 20)
            assert (again.valid_blocks, type(again.error)) == (3, Expired)
            await put(w, 4, first=3)  # computed again
            assert (await f.fetch([source(address, epoch, 0, 6)], hashes_for(24), target, 20)).valid_blocks == 6
            assert_right(target, 6)

    async def corrupt(address: str, count: int) -> bool:
        return (await stat(address)).corrupt_total == count

    run(body())


# --------------------------------------------------------------------------------------- stores that fail in the middle
class Relay:
    """A proxy in front of a store that cuts, or holds back, its answers after a number of bytes."""

    def __init__(self, address: str, limit: int, *, cut: bool) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._left = limit
        self._cut = cut
        self._writers: list[asyncio.StreamWriter] = []
        self.go_on = asyncio.Event()
        self.reached = False

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self.go_on.set()
        self._server.close()
        for each in self._writers:
            each.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(self._host, int(self._port))
        self._writers += [writer, up_writer]
        await asyncio.gather(self._pass(reader, up_writer, False), self._pass(up_reader, writer, True))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limited: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(4096):
                if limited and len(data) > self._left and not self.go_on.is_set():
                    self.reached = True
                    if self._cut:
                        for each in self._writers:
                            each.close()
                        return
                    await self.go_on.wait()
                self._left -= len(data)
                writer.write(data)
                await writer.drain()


BYTES = 12 * (VAST.block_bytes // 2)  # of the six blocks below, in half blocks: every frame's beginning and middle


@pytest.mark.parametrize("share", range(0, 13, 2))
@pytest.mark.parametrize("cut", [True, False], ids=["cut", "silent"])
def test_a_stream_that_breaks_anywhere_leaves_a_prefix_of_good_blocks(share: int, cut: bool) -> None:
    async def body() -> None:
        async with store(7, VAST) as (address, _), writer(address, VAST) as w, fetcher(True, VAST) as (f, _):
            epoch = await put(w, 6, layout=VAST)
            relay = Relay(address, 2048 + share * BYTES // 12 if share < 12 else 2 * BYTES, cut=cut)
            target = Target(VAST)
            runs = [source(await relay.start(), epoch, 0, 6)]
            fetched = await f.fetch(runs, hashes_for(6 * VAST.tokens, layout=VAST), target, 20 if cut else 0.7)
            assert relay.reached == (share < 12)
            assert fetched.valid_blocks < 6 or share == 12
            assert (fetched.error is None) == (share == 12)
            assert_right(target, fetched.valid_blocks)
            assert fetched.valid_blocks >= 1 or share < 8 or not cut
            before = {position: block.copy() for position, block in target.blocks.items()}
            relay.go_on.set()  # the rest is delivered, to nobody
            await until(lambda: quiet(address), "no pin is left")
            assert all((target.blocks[position] == block).all() for position, block in before.items())
            await relay.stop()

    run(body())


def test_a_store_that_was_only_too_slow_is_asked_again() -> None:
    async def body() -> None:
        async with store(7, VAST) as (address, _), writer(address, VAST) as w, fetcher(True, VAST) as (f, shared):
            epoch = await put(w, 6, layout=VAST)
            relay = Relay(address, BYTES * 5 // 6, cut=False)
            slow = await relay.start()
            runs = [source(slow, epoch, 0, 5), source(slow, epoch, 5, 6)]
            fetched = await f.fetch(runs, hashes_for(6 * VAST.tokens, layout=VAST), Target(VAST), 2.0)
            assert 1 <= fetched.valid_blocks <= 5
            assert isinstance(fetched.error, DeadlineExceeded)
            assert not shared.reputation.avoided(slow, time.monotonic())
            await relay.stop()

    run(body())


@both_paths
def test_a_store_that_is_stopped_costs_the_deadline_and_writes_nothing_later(inline: bool) -> None:
    async def body() -> None:
        async with store_process(40) as (address, epoch, child), writer(address) as w, fetcher(inline) as (f, shared):
            await put(w, 40)
            hashes = hashes_for(160)
            warm = Target()
            assert (await f.fetch([source(address, epoch, 0, 40)], hashes, warm, 20)).valid_blocks == 40
            target = Target()

            def write_block(position: int) -> Block:
                if position == 0:
                    os.kill(child.pid, signal.SIGSTOP)
                return target(position)

            fetched = await f.fetch([source(address, epoch, 0, 40)], hashes, write_block, 1.0)
            assert_right(target, fetched.valid_blocks)
            before = {position: block.copy() for position, block in target.blocks.items()}
            if fetched.valid_blocks < 40:
                assert isinstance(fetched.error, DeadlineExceeded)
            nothing = await f.fetch([source(address, epoch, 0, 40)], hashes, Target(), 0.3)
            assert (nothing.valid_blocks, type(nothing.error)) == (0, DeadlineExceeded)
            assert shared.reputation.avoided(address, time.monotonic())
            os.kill(child.pid, signal.SIGCONT)
            await until(lambda: quiet(address), "no pin is left")
            assert all((target.blocks[position] == block).all() for position, block in before.items())

    run(body())


@both_paths
def test_a_store_that_is_killed_in_the_middle_leaves_a_prefix(inline: bool) -> None:
    async def body() -> None:
        for at in (0, 1, 7, 30):
            async with store_process(40) as (address, epoch, child), writer(address) as w, fetcher(inline) as (f, _):
                await put(w, 40)
                target = Target()

                def write_block(position: int, at: int = at, child: Process = child, target: Target = target) -> Block:
                    if position == at:
                        child.kill()
                    return target(position)

                fetched = await f.fetch([source(address, epoch, 0, 40)], hashes_for(160), write_block, 20)
                # what was on its way, or is mapped, may still come
                assert fetched.valid_blocks == 40 or isinstance(fetched.error, (WorkerLost, Expired))
                assert_right(target, fetched.valid_blocks)

    run(body())


def test_a_store_that_is_killed_at_any_frame_leaves_a_prefix() -> None:
    """Blocks of a frame each, on two streams; each time the process is killed while another block is taken in."""
    layout = Layout(heads=8, layers=16, tokens=16, dim=64, dtype="float32", itemsize=4)  # 1 MiB
    blocks, short = 16, 0

    async def body(at: int) -> int:
        async with (
            store_process(blocks, layout=layout) as (address, epoch, child),
            writer(address, layout) as w,
            fetcher(True, layout) as (f, _),
        ):
            await put(w, blocks, layout=layout)
            target = Target(layout)

            def write_block(position: int) -> Block:
                if position == at:
                    child.kill()
                return target(position)

            hashes = hashes_for(blocks * layout.tokens, layout=layout)
            fetched = await f.fetch([source(address, epoch, 0, blocks)], hashes, write_block, 20)
            assert fetched.valid_blocks == blocks or isinstance(fetched.error, WorkerLost)
            assert_right(target, fetched.valid_blocks)
            return fetched.valid_blocks

    for at in range(blocks):
        short += run(body(at)) < blocks
    assert short > 0, "no kill came in time: make the blocks larger"


def test_a_store_that_restarts_between_lookup_and_fetch_is_a_miss() -> None:
    async def body() -> None:
        async with fetcher() as (f, _):
            async with store_process(8) as (address, old, child), writer(address) as w:
                await put(w, 4)
                assert (await f.fetch([source(address, old, 0, 4)], hashes_for(16), Target(), 20)).valid_blocks == 4
                child.kill()
            async with store_process(8, port=int(address.rpartition(":")[2])) as (address, new, _):
                await until(lambda: answers(address), "it is back")
                missed = await f.fetch([source(address, old, 0, 4)], hashes_for(16), Target(), 20)
                assert (missed.valid_blocks, type(missed.error)) == (0, EpochMismatch)
                async with writer(address) as w:
                    await put(w, 4)
                    target = Target()
                    assert (await f.fetch([source(address, new, 0, 4)], hashes_for(16), target, 20)).valid_blocks == 4
                    assert_right(target, 4)

    async def answers(address: str) -> bool:
        with contextlib.suppress(Unavailable):
            return (await stat(address)).free == 8
        return False

    run(body())


# ------------------------------------------------------------------------------------ cancellation, lies, at random
@both_paths
def test_a_fetch_that_is_cancelled_at_any_moment_leaves_nothing(inline: bool) -> None:
    async def body() -> None:
        rng = np.random.default_rng(5)
        async with store(40) as (address, server), writer(address) as w, fetcher(inline) as (f, _):
            epoch = await put(w, 40)
            for _ in range(40):
                target = Target()
                fetching = asyncio.create_task(f.fetch([source(address, epoch, 0, 40)], hashes_for(160), target, 20))
                for _ in range(int(rng.integers(0, 60))):
                    await asyncio.sleep(0)
                fetching.cancel()
                fetching.cancel()
                (result,) = await asyncio.gather(fetching, return_exceptions=True)
                assert isinstance(result, (Fetched, asyncio.CancelledError))
                count = len(target.blocks)
                await stat(address)
                assert len(target.blocks) == count, "nothing is written to it any more"
            await until(lambda: quiet(address), "no pin is left")
            server._ledger.slabs.check()

    run(body())


@both_paths
def test_whatever_sources_say_what_is_valid_is_right(inline: bool) -> None:
    async def body() -> None:
        rng = np.random.default_rng(11)
        async with two_stores(30) as (one, w, two, v), fetcher(inline) as (f, _):
            epochs = {one: await put(w, 12), two: await put(v, 12, first=4), "127.0.0.1:1": 5}
            await put(w, 10, chain=1)
            hits = 0
            for _ in range(120):
                chain = int(rng.integers(0, 2))
                cuts = sorted(rng.choice(15, size=int(rng.integers(2, 6)), replace=False).tolist())
                runs = []
                for start, stop in itertools.pairwise(cuts):
                    address = str(rng.choice([*epochs], p=[0.48, 0.48, 0.04]))
                    epoch = epochs[address] + int(rng.choice([0, 1], p=[0.9, 0.1]))
                    path: Path = rng.choice(["memory", "disk", "remote"])
                    runs.append(source(address, epoch, start, stop, path))
                target = Target()
                fetched = await f.fetch(runs, hashes_for(60, chain=chain), target, 5)
                assert cuts[0] <= fetched.valid_blocks <= cuts[-1]
                assert (fetched.error is None) == (fetched.valid_blocks == cuts[-1])
                assert_right(target, fetched.valid_blocks, chain, cuts[0])
                hits += fetched.valid_blocks > cuts[0]
            assert hits > 20
            await until(lambda: quiet(one), "no pin is left")
            await until(lambda: quiet(two), "no pin is left")

    run(body())
