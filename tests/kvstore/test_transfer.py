"""Handoffs through a real store over real gRPC: every byte arrives, and every failure costs blocks and nothing else."""

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import (
    Corrupt,
    DeadlineExceeded,
    EpochMismatch,
    Expired,
    LayoutMismatch,
    NoSpace,
    StoreError,
    Unauthorized,
    WorkerLost,
)
from cluster.messages import Handoff
from cluster.store_messages import Reserve
from kvstore.client import StoreClient
from kvstore.connections import Connections
from kvstore.layout import Layout
from kvstore.part import Part
from kvstore.reader import HandoffReader
from kvstore.server import StoreServer
from kvstore.slab_writer import SlabWriter
from kvstore.writer import SEAL_BYTES, HandoffWriter
from tests.kvstore.rig import (
    LAYOUT,
    SECRET,
    Block,
    Target,
    block_of,
    hashes_for,
    process,
    reader,
    stat,
    store,
    store_process,
    until,
    writer,
)

HOLD_MS = 30_000
LARGE = Layout(heads=3, layers=30, tokens=16, dim=64, dtype="float32", itemsize=4)
VAST = Layout(heads=8, layers=16, tokens=16, dim=128, dtype="float32", itemsize=4)  # 2 MiB: three frames and more
both_paths = pytest.mark.parametrize("inline", [False, True], ids=["mapped", "inline"])


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(bounded())


def arena_files() -> set[str]:
    """Of the store processes that these tests have started; other tests run beside them."""
    return {path.name for path in Path("/dev/shm").glob(f"tandem-test-{os.getpid()}-*.arena")}


def pairs(*positions: int) -> list[tuple[int, int]]:
    """Block ids are their positions plus 100, so that nothing works by accident."""
    return [(position, position + 100) for position in positions]


async def handed_over(w: HandoffWriter, name: str, tokens: int, chain: int = 0, layout: Layout = LAYOUT) -> Handoff:
    handoff = await w.reserve(name, hashes_for(tokens, chain, layout), tokens, HOLD_MS)
    await w.send(name, pairs(*range(-(-tokens // layout.tokens))))
    await w.finish(name, 7)
    return handoff


def assert_arrived(target: Target, tokens: int, start: int = 0) -> None:
    """Blocks `start`.. hold the writer's bytes, as far as tokens go."""
    layout = target.layout
    count = -(-tokens // layout.tokens)
    assert sorted(target.blocks) == list(range(start, count))
    rows = (2 * layout.cells, layout.tokens, layout.dim * layout.itemsize)
    for position, block in target.blocks.items():
        valid = min(layout.tokens, tokens - position * layout.tokens)
        expected = block_of(position + 100, layout).reshape(rows)[:, :valid]
        assert (block.reshape(rows)[:, :valid] == expected).all(), f"block {position}"


# ------------------------------------------------------------------------------------------------------- what works
@both_paths
@pytest.mark.parametrize("layout", [LAYOUT, LARGE, VAST], ids=["small", "large", "vast"])
def test_every_byte_arrives_and_the_count_is_token_exact(inline: bool, layout: Layout) -> None:
    async def body() -> None:
        tokens = 2 * layout.tokens + 3
        async with store(4, layout) as (address, _), writer(address, layout) as w, reader(inline, layout) as r:
            handoff = await handed_over(w, "t", tokens, layout=layout)
            target = Target(layout)
            received = await r.receive(handoff, 0, tokens, target, 20)
            assert (received.valid_blocks, received.first_token, received.error) == (3, 7, None)
            assert received.bytes == tokens * layout.token_bytes
            assert_arrived(target, tokens)
            await until(lambda: released(address), "released")

    async def released(address: str) -> bool:
        s = await stat(address)
        return (s.transfers, s.held, s.cached) == (0, 0, 2)

    run(body())


@both_paths
def test_blocks_arrive_while_later_ones_are_still_computed(inline: bool) -> None:
    async def body() -> None:
        async with store(8) as (address, _), writer(address) as w, reader(inline) as r:
            handoff = await w.reserve("t", hashes_for(18), 18, HOLD_MS)
            target = Target()
            receiving = asyncio.create_task(r.receive(handoff, 0, 18, target, 20))
            for position in range(5):
                assert position not in target.blocks
                await w.send("t", pairs(position))
                await until(lambda p=position: p in target.blocks, f"block {position}")
            assert not receiving.done()
            await w.finish("t", None)
            received = await receiving
            assert (received.valid_blocks, received.first_token, received.error) == (5, None, None)
            assert_arrived(target, 18)

    run(body())


@both_paths
def test_a_reader_that_has_the_head_fetches_the_rest(inline: bool) -> None:
    async def body() -> None:
        async with store(8) as (address, _), writer(address) as w, reader(inline) as r:
            handoff = await handed_over(w, "t", 18)
            target = Target()
            received = await r.receive(handoff, 3, 18, target, 20)
            assert (received.valid_blocks, received.bytes) == (5, (18 - 12) * LAYOUT.token_bytes)
            assert_arrived(target, 18, start=3)

    run(body())


def test_a_reader_that_has_everything_still_gets_the_first_token() -> None:
    async def body() -> None:
        async with store(8) as (address, _), writer(address) as w, reader() as r:
            received = await r.receive(await handed_over(w, "t", 8), 2, 8, Target(), 20)
            assert (received.valid_blocks, received.first_token, received.bytes, received.error) == (2, 7, 0, None)

    run(body())


def test_what_the_store_has_is_not_copied_again() -> None:
    async def body() -> None:
        copied: list[int] = []

        def read(block_id: int) -> Block:
            copied.append(block_id)
            return block_of(block_id)

        async with store(8) as (address, _), reader() as r:
            w = HandoffWriter(StoreClient(address, SECRET, "writer", LAYOUT), LAYOUT, SlabWriter(Part(LAYOUT), read))
            await w.connect()
            first = await handed_over(w, "a", 10)
            second = await handed_over(w, "b", 14)
            assert copied == [100, 101, 102, 102, 103]
            assert (await stat(address)).sealed_bytes_total == 5 * LAYOUT.block_bytes
            for handoff, tokens in ((first, 10), (second, 14)):
                target = Target()
                assert (await r.receive(handoff, 0, tokens, target, 20)).error is None
                assert_arrived(target, tokens)
            await w.close()

    run(body())


def test_two_readers_of_one_transfer_both_get_it() -> None:
    async def body() -> None:
        async with store(8) as (address, _), writer(address) as w, reader() as r, reader(True) as q:
            handoff = await w.reserve("t", hashes_for(18), 18, HOLD_MS)
            targets = [Target(), Target()]
            tasks = [
                asyncio.create_task(x.receive(handoff, 0, 18, t, 20)) for x, t in zip((r, q), targets, strict=True)
            ]
            await w.send("t", pairs(0))
            await until(lambda: all(0 in t.blocks for t in targets), "both follow")
            await w.send("t", pairs(1, 2, 3, 4))
            await w.finish("t", 7)
            for received, target in zip(await asyncio.gather(*tasks), targets, strict=True):
                assert received.error is None
                assert_arrived(target, 18)
            assert (await stat(address)).held == 0

    run(body())


def test_a_hold_can_be_renewed_and_runs_out() -> None:
    async def body() -> None:
        async with store(8) as (address, _), writer(address) as w, reader() as r:
            handoff = await w.reserve("t", hashes_for(8), 8, 500)
            await w.send("t", pairs(0, 1))
            await w.finish("t", 7)
            assert 30_000 < await r.hold(handoff, 60_000) <= 60_000
            late = await w.reserve("u", hashes_for(9, chain=1), 9, 300)
            await w.send("u", pairs(0, 1, 2))
            await w.finish("u", 7)
            await until(lambda: expired(address), "expired by itself")
            received = await r.receive(late, 0, 9, Target(), 20)
            assert isinstance(received.error, Expired)
            assert (received.valid_blocks, received.bytes, received.first_token) == (0, 0, None)
            with pytest.raises(Expired):
                await r.hold(late, 1000)
            assert (await r.receive(handoff, 0, 8, Target(), 20)).error is None

    async def expired(address: str) -> bool:
        return (await stat(address)).expired_total == 1

    run(body())


def test_a_large_send_is_sealed_in_parts() -> None:
    async def body() -> None:
        count, tokens = 20, 20 * VAST.tokens
        part = SEAL_BYTES // VAST.block_bytes
        assert part < count
        async with store(count, VAST) as (address, _), reader(True, VAST) as r:
            target = Target(VAST)

            def read(block_id: int) -> Block:
                deadline = time.monotonic() + 20
                while block_id >= 100 + part and len(target.blocks) < part and time.monotonic() < deadline:
                    time.sleep(0.001)  # the first part can be read before the second is copied
                return block_of(block_id, VAST)

            w = HandoffWriter(StoreClient(address, SECRET, "writer", VAST), VAST, SlabWriter(Part(VAST), read))
            await w.connect()
            handoff = await w.reserve("t", hashes_for(tokens, layout=VAST), tokens, HOLD_MS)
            receiving = asyncio.create_task(r.receive(handoff, 0, tokens, target, 30))
            began = time.monotonic()
            await w.send("t", pairs(*range(count)))
            assert time.monotonic() - began < 20
            await w.finish("t", None)
            assert (await receiving).valid_blocks == count
            assert_arrived(target, tokens)
            await w.close()

    run(body())


# ---------------------------------------------------------------------------------------------- refusals and failures
def test_a_transfer_that_ends_between_the_parts_of_a_send_leaks_nothing() -> None:
    async def body() -> None:
        count = 20
        async with store(count, VAST) as (address, server):
            loop, ended = asyncio.get_running_loop(), threading.Event()

            def end() -> None:
                server._ledger.revoke("t", "by a test", 0.0)
                ended.set()

            def read(block_id: int) -> Block:
                if block_id == 100 + SEAL_BYTES // VAST.block_bytes and not ended.is_set():
                    loop.call_soon_threadsafe(end)
                    assert ended.wait(20)
                return block_of(block_id, VAST)

            w = HandoffWriter(StoreClient(address, SECRET, "writer", VAST), VAST, SlabWriter(Part(VAST), read))
            await w.connect()
            await w.reserve("t", hashes_for(count * VAST.tokens, layout=VAST), count * VAST.tokens, HOLD_MS)
            with pytest.raises(Expired):
                await w.send("t", pairs(*range(count)))
            s = await stat(address)
            assert (s.reserved, s.held, s.quarantined, s.transfers) == (0, 0, 0, 0)
            await w.close()

    run(body())


def test_two_handoffs_in_an_arena_for_one_and_a_half() -> None:
    async def body() -> None:
        async with store(6) as (address, _), writer(address) as w, writer(address) as v, reader() as r:
            one = await w.reserve("a", hashes_for(14), 14, HOLD_MS)
            with pytest.raises(NoSpace, match="4 slabs are needed and 2 of 6"):
                await v.reserve("b", hashes_for(14, chain=1), 14, HOLD_MS)
            s = await stat(address)
            assert (s.free, s.reserved, s.transfers) == (2, 4, 1)
            await w.send("a", pairs(0, 1, 2, 3))
            await w.finish("a", 7)
            assert (await r.receive(one, 0, 14, Target(), 20)).error is None
            await until(lambda: quiet(address), "the first is released")
            two = await handed_over(v, "b", 14, chain=1)
            target = Target()
            assert (await r.receive(two, 0, 14, target, 20)).error is None
            assert_arrived(target, 14)
            await until(lambda: quiet(address), "the second is released")
            assert (await stat(address)).evictions_total > 0

    async def quiet(address: str) -> bool:
        s = await stat(address)
        return s.free + s.cached == s.slabs

    run(body())


def test_a_bit_that_flips_in_the_store_is_noticed() -> None:
    async def body() -> None:
        async with store(8) as (address, server), writer(address) as w, reader(True) as r:
            handoff = await handed_over(w, "t", 18)
            arena = server._arena
            (slab,) = [i for i in range(arena.slabs) if (arena.slab(i) == block_of(102)).all()]
            arena.slab(slab)[LAYOUT.block_bytes - 1] ^= 1
            target = Target()
            received = await r.receive(handoff, 0, 18, target, 20)
            assert isinstance(received.error, Corrupt)
            assert (received.valid_blocks, received.first_token) == (2, None)
            assert received.bytes == 8 * LAYOUT.token_bytes
            assert (target.blocks[0] == block_of(100)).all()
            assert (target.blocks[1] == block_of(101)).all()

    run(body())


def test_a_slab_that_changes_hands_during_the_copy_does_not_count() -> None:
    async def body() -> None:
        async with store(8) as (address, server), writer(address) as w, reader() as r:
            handoff = await handed_over(w, "t", 18)
            arena = server._arena
            (slab,) = [i for i in range(arena.slabs) if (arena.slab(i) == block_of(102)).all()]
            target = Target()

            def write_block(position: int) -> Block:
                if position == 2:  # after the first check of the generation, before the second
                    arena.set_generation(slab, arena.generation(slab) + 1)
                return target(position)

            received = await r.receive(handoff, 0, 18, write_block, 20)
            assert isinstance(received.error, Expired)
            assert received.valid_blocks == 2

    run(body())


@both_paths
def test_a_revoked_transfer_ends_its_followers_with_what_they_have(inline: bool) -> None:
    async def body() -> None:
        async with store(8) as (address, _), writer(address) as w, reader(inline) as r:
            handoff = await w.reserve("t", hashes_for(18), 18, HOLD_MS)
            await w.send("t", pairs(0, 1))
            target = Target()
            receiving = asyncio.create_task(r.receive(handoff, 0, 18, target, 20))
            await until(lambda: 1 in target.blocks, "two blocks")
            await w.revoke("t", "the client left")
            received = await receiving
            assert type(received.error) is StoreError
            assert "the client left" in str(received.error)
            assert received.valid_blocks == 2
            await until(lambda: quiet(address), "nothing is left of it")
            with pytest.raises(Expired):
                await w.send("t", pairs(2))

    async def quiet(address: str) -> bool:
        s = await stat(address)
        return (s.free, s.cached, s.transfers) == (6, 2, 0)

    run(body())


def test_a_reader_that_is_cancelled_lets_go_and_touches_nothing_more() -> None:
    async def body() -> None:
        async with store(8) as (address, _), writer(address) as w, reader() as r:
            handoff = await w.reserve("t", hashes_for(18), 18, HOLD_MS)
            copying, go_on = threading.Event(), threading.Event()
            target = Target()

            def slow(position: int) -> Block:
                copying.set()
                assert go_on.wait(20)
                return target(position)

            receiving = asyncio.create_task(r.receive(handoff, 0, 18, slow, 20))
            await w.send("t", pairs(0))
            await until(copying.is_set, "a copy is under way")
            receiving.cancel()
            _, pending = await asyncio.wait([receiving], timeout=0.1)
            assert pending, "not before the copy has ended"
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await receiving
            await until(lambda: released(address), "released")

    async def released(address: str) -> bool:
        s = await stat(address)
        return s.transfers == 0 and s.held == 0

    run(body())


def test_a_reservation_whose_caller_left_is_given_back() -> None:
    async def body() -> None:
        async with store(8) as (address, _), writer(address) as w:
            for turns in itertools.count():  # leave one turn of the loop later each time, until it is too late to leave
                name = f"t{turns}"
                reserving = asyncio.create_task(w.reserve(name, hashes_for(18), 18, HOLD_MS))
                for _ in range(turns):
                    await asyncio.sleep(0)
                reserving.cancel()
                (result,) = await asyncio.gather(reserving, return_exceptions=True)
                if isinstance(result, Handoff):
                    await w.revoke(name, "it was faster")
                    break
                await until(lambda: quiet(address), "nothing is left of it")
            await until(lambda: quiet(address), "nothing is left of them")

    async def quiet(address: str) -> bool:
        s = await stat(address)
        return (s.free, s.transfers) == (8, 0)

    run(body())


def test_waiting_for_a_slow_prefill_has_an_end() -> None:
    async def body() -> None:
        async with store(8) as (address, _), writer(address) as w, reader() as r:
            handoff = await w.reserve("t", hashes_for(18), 18, HOLD_MS)
            await w.send("t", pairs(0))
            received = await r.receive(handoff, 0, 18, Target(), 0.5)
            assert isinstance(received.error, DeadlineExceeded)
            assert received.valid_blocks == 1

    run(body())


def test_an_unknown_store_is_an_error_in_the_result() -> None:
    async def body() -> None:
        async with reader() as r:
            received = await r.receive(Handoff("127.0.0.1:1", 1, "t"), 1, 8, Target(), 10)
            assert isinstance(received.error, (WorkerLost, DeadlineExceeded))
            assert (received.valid_blocks, received.bytes) == (1, 0)

    run(body())


def test_strangers_are_refused() -> None:
    async def body() -> None:
        other = Layout(3, 2, 4, 8, "float32", 4)  # as many bytes, elsewhere
        async with store(4) as (address, _):
            with pytest.raises(Unauthorized):
                await StoreClient(address, "wrong", "x", LAYOUT).connect()
            with pytest.raises(LayoutMismatch, match="layout"):
                await StoreClient(address, SECRET, "x", other).connect()
            client = StoreClient(address, SECRET, "x", LAYOUT)
            await client.connect()
            with pytest.raises(StoreError, match="session"):
                await client.call("Reserve", Reserve("t", client.client_id, (), HOLD_MS))
            await client.close()

    run(body())


def test_another_hash_scheme_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with store(4) as (address, _):
            monkeypatch.setattr("kvstore.client.vectors_digest", lambda: b"older")
            with pytest.raises(LayoutMismatch, match="one version of Tandem"):
                await StoreClient(address, SECRET, "x", LAYOUT).connect()

    run(body())


def test_a_client_that_is_closed_fails_its_calls_and_cancels_nobody() -> None:
    async def body() -> None:
        async with store(4) as (address, _), writer(address) as w:
            handoff = await w.reserve("t", hashes_for(8), 8, HOLD_MS)
            shared = Connections(SECRET, LAYOUT)
            r = HandoffReader(shared)
            receiving = asyncio.create_task(r.receive(handoff, 0, 8, target := Target(), 20))
            await w.send("t", pairs(0))
            await until(lambda: 0 in target.blocks, "following")
            await shared.close()
            received = await receiving
            assert isinstance(received.error, WorkerLost)
            assert received.valid_blocks == 1

    run(body())


# ------------------------------------------------------------------------------------------- processes that are killed
@both_paths
def test_the_store_is_killed_in_the_middle(inline: bool) -> None:
    async def body() -> None:
        async with store_process(8) as (address, _, child), writer(address) as w, reader(inline) as r:
            handoff = await w.reserve("t", hashes_for(18), 18, HOLD_MS)
            target = Target()
            receiving = asyncio.create_task(r.receive(handoff, 0, 18, target, 20))
            await w.send("t", pairs(0, 1, 2))
            await until(lambda: 2 in target.blocks, "three blocks")
            child.kill()
            received = await receiving
            assert isinstance(received.error, WorkerLost)
            assert received.valid_blocks == 3
            assert all((target.blocks[i] == block_of(100 + i)).all() for i in range(3))
            await until(lambda: not w.connected, "the writer knows")
            with pytest.raises(WorkerLost):
                await w.send("t", pairs(3))
            with pytest.raises(WorkerLost):
                await w.reserve("u", hashes_for(4), 4, HOLD_MS)

    run(body())


def test_a_store_that_restarts_is_another_store() -> None:
    async def body() -> None:
        before = arena_files()
        async with store_process(8) as (address, epoch, child), writer(address) as w, reader() as r:
            old = await handed_over(w, "t", 8)
            kept = await handed_over(w, "u", 8, chain=1)
            assert (await r.receive(kept, 0, 8, Target(), 20)).error is None
            child.kill()
            async with store_process(8, port=int(address.rpartition(":")[2])) as (again, new_epoch, _):
                assert again == address
                assert new_epoch != epoch
                await until(lambda: mismatch(r, old), "the reader has connected again, and is told")
                async with writer(address) as v:
                    target = Target()
                    assert (await r.receive(await handed_over(v, "t", 8), 0, 8, target, 20)).error is None
                    assert_arrived(target, 8)
                with pytest.raises(EpochMismatch):
                    await r.hold(old, 1000)
                assert len(arena_files() - before) == 1, "the killed one's is gone"

    async def mismatch(r: HandoffReader, handoff: Handoff) -> bool:
        received = await r.receive(handoff, 0, 8, Target(), 20)
        assert received.valid_blocks == 0
        return isinstance(received.error, EpochMismatch)

    run(body())


def test_a_writer_that_is_killed_frees_what_it_had_not_sealed() -> None:
    async def body() -> None:
        async with store(8) as (address, _), reader() as r:
            settings = {"address": address, "transfer": "t", "tokens": 18, "sealed": 2, "hold_ms": HOLD_MS}
            async with process("write", **settings) as child:
                handoff = Handoff(address, int(await child.line()), "t")
                target = Target()
                receiving = asyncio.create_task(r.receive(handoff, 0, 18, target, 20))
                await until(lambda: 1 in target.blocks, "what is sealed")
                s = await stat(address)
                assert (s.reserved, s.held) == (3, 2)
                child.kill()
                received = await receiving
            assert isinstance(received.error, WorkerLost)
            assert received.valid_blocks == 2
            assert all((target.blocks[i] == block_of(i)).all() for i in range(2))
            await until(lambda: quiet(address), "its slabs are free")

    async def quiet(address: str) -> bool:
        s = await stat(address)
        return (s.free, s.cached, s.transfers) == (6, 2, 0)

    run(body())


def test_a_reader_that_is_killed_lets_go_of_its_pins() -> None:
    async def body() -> None:
        async with store(8) as (address, server), writer(address) as w, reader() as r:
            handoff = await w.reserve("t", hashes_for(18), 18, 300)
            await r.hold(handoff, HOLD_MS)  # while the child starts
            await w.send("t", pairs(0, 1, 2))
            settings = {"address": address, "epoch": handoff.epoch, "transfer": "t", "tokens": 18}
            async with process("read", **settings) as child:
                assert [await child.line() for _ in range(3)] == ["0", "1", "2"]
                server._ledger.transfers["t"].deadline = 0.0  # the hold alone is over
                s = await stat(address)
                assert (s.held, s.reserved, s.expired_total) == (3, 2, 0), "the stream keeps it"
                child.kill()
                await until(lambda: expired(address), "the pins are gone")
            s = await stat(address)
            assert (s.cached, s.quarantined, s.held) == (3, 2, 0)
            with pytest.raises(Expired):
                await w.send("t", pairs(3))
            s = await stat(address)
            assert (s.cached, s.quarantined, s.free) == (3, 0, 5), "the writer has said that it is done"

    async def expired(address: str) -> bool:
        return (await stat(address)).expired_total == 1

    run(body())


def test_a_broken_session_of_a_living_writer_quarantines() -> None:
    async def body() -> None:
        async with store(8) as (address, _), writer(address) as w:
            await w.reserve("t", hashes_for(18), 18, HOLD_MS)
            assert w._session is not None
            w._session.cancel()  # what a network hiccup does: the stream is gone, the process and its lock are not
            await until(lambda: quarantined(address, 5), "quarantined")
            await w.close()
            await until(lambda: quarantined(address, 0), "free when the writer has let go")
            assert (await stat(address)).free == 8

    async def quarantined(address: str, count: int) -> bool:
        return (await stat(address)).quarantined == count

    run(body())


def test_a_store_that_is_asked_to_stop_leaves_nothing() -> None:
    async def body() -> None:
        before = arena_files()
        async with store_process(8) as (address, _, child):
            async with writer(address) as w:
                await handed_over(w, "t", 8)
            assert len(arena_files() - before) == 1
            assert child.terminate() == 0
        assert arena_files() <= before

    run(body())


def test_many_handoffs_at_once_with_random_ends_leak_nothing() -> None:
    async def body() -> None:
        rng = np.random.default_rng(3)

        async def one(i: int, w: HandoffWriter, r: HandoffReader) -> None:
            tokens = int(rng.integers(1, 30))
            try:
                handoff = await w.reserve(f"t{i}", hashes_for(tokens, chain=i % 5), tokens, HOLD_MS)
            except NoSpace:
                return
            target = Target()
            receiving = asyncio.create_task(r.receive(handoff, 0, tokens, target, 20))
            count = -(-tokens // LAYOUT.tokens)
            end = rng.choice(["whole", "revoke", "cancel"])
            await w.send(f"t{i}", pairs(*range(count if end == "whole" else count // 2)))
            if end == "cancel":
                receiving.cancel()
            if end == "whole":
                await w.finish(f"t{i}", i)
                received = await receiving
                assert (received.error, received.valid_blocks, received.first_token) == (None, count, i)
                assert_arrived(target, tokens)
            else:
                await w.revoke(f"t{i}", "random")
                await asyncio.gather(receiving, return_exceptions=True)

        async with store(40) as (address, server), writer(address) as w, reader() as r, reader(True) as q:
            for start in range(0, 120, 12):
                await asyncio.gather(*(one(i, w, (r, q)[i % 2]) for i in range(start, start + 12)))
            await until(lambda: quiet(address), "all slabs are back")
            server._ledger.slabs.check()
            assert server._handoffs._news == {}

    async def quiet(address: str) -> bool:
        s = await stat(address)
        return s.free + s.cached == s.slabs and s.transfers == 0

    run(body())


def test_two_stores_of_one_process_do_not_meet() -> None:
    async def body() -> None:
        async with store(4) as (one, a), store(4) as (two, b):
            assert isinstance(a, StoreServer)
            assert one != two
            assert a._arena.path != b._arena.path

    run(body())
