"""A shard's copies when something goes wrong in the middle: no slab gets a new owner while somebody may write to it."""

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from multiprocessing.connection import Connection

import pytest

from cluster.errors import Unauthorized, Unavailable, WorkerLost
from cluster.messages import Ack
from cluster.rpc import Client
from cluster.shard_messages import CancelBlocks, WriteBlocks, Written
from cluster.store_messages import Slab
from kvstore.copying import Block
from kvstore.layout import Layout
from kvstore.server import StoreServer
from kvstore.writer import HandoffWriter
from tests.kvstore.rig import PATIENCE_S, ask, keys_for, stat, store, until
from tests.workers.block_followers import GATE, IDENTITY, Cache, Follower, LeadSide, lead, writing
from workers.all_shards import holders
from workers.shard import Shard
from workers.shard_answers import packed
from workers.shard_blocks import BlockServer

LAYOUT = Layout(2, 3, 4, 4, "float32", 4)
GRID = (1, 2)
SLABS = 40
IDS = (1, GATE, 2)
KEYS = keys_for(4 * len(IDS))


@pytest.fixture
def mortal() -> Iterator[Follower]:
    """A process for rank 1 that the test may kill."""
    made = Follower()
    yield made
    made.close()


@pytest.fixture(scope="module")
def follower() -> Iterator[Follower]:
    made = Follower()
    yield made
    made.close()


def serve(follower: Follower) -> list[str]:
    return [follower.ask("serve", LAYOUT, GRID, 1, False, True)]


@asynccontextmanager
async def site(
    follower: Follower, patience_s: float = PATIENCE_S
) -> AsyncIterator[tuple[str, LeadSide, HandoffWriter]]:
    async with (
        store(SLABS, LAYOUT) as (address, _),
        lead(LAYOUT, GRID, [follower], serve(follower), patience_s=patience_s) as worker,
        writing(address, worker.movers[True]) as writer,
    ):
        yield address, worker, writer


async def at_the_gate(follower: Follower) -> None:
    assert await asyncio.to_thread(follower.hear) == "at the gate"


async def free(address: str, count: int = SLABS) -> bool:
    return (await stat(address)).free == count


def test_a_shard_that_is_killed_in_the_middle_ends_the_worker_and_nothing_leaks(mortal: Follower) -> None:
    async def body() -> None:
        async with site(mortal) as (address, worker, writer):
            sending = asyncio.create_task(writer.store(KEYS, IDS, ""))
            await at_the_gate(mortal)
            assert (await stat(address)).reserved == len(IDS)
            mortal.process.kill()
            with pytest.raises(WorkerLost, match="shard 1 is lost"):
                await sending
            assert len(worker.failures) == 1
            await until(lambda: free(address), "its slabs are back")

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_cancelled_copy_is_waited_for_before_its_slabs_are_given_back(follower: Follower) -> None:
    async def body() -> None:
        async with site(follower) as (address, worker, writer):
            sending = asyncio.create_task(writer.store(KEYS, IDS, ""))
            await at_the_gate(follower)
            sending.cancel()
            for _ in range(3):  # round trips: time for whatever should not happen
                assert (await stat(address)).reserved == len(IDS)
            assert not sending.done()
            follower.connection.send(("go",))
            with pytest.raises(asyncio.CancelledError):
                await sending
            await until(lambda: free(address), "its slabs are back")
            assert worker.failures == []
            assert await writer.store(KEYS, IDS, "") == len(IDS), "the shards go on"

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_shard_that_does_not_end_a_cancelled_copy_ends_the_worker(follower: Follower) -> None:
    async def body() -> None:
        async with site(follower, patience_s=0.3) as (_, worker, writer):
            sending = asyncio.create_task(writer.store(KEYS, IDS, ""))
            await at_the_gate(follower)
            sending.cancel()
            await until(lambda: bool(worker.failures), "the worker ends")
            follower.connection.send(("go",))
            with suppress(asyncio.CancelledError):
                await sending

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_shard_that_stalls_ends_the_worker(follower: Follower) -> None:
    async def body() -> None:
        async with site(follower, patience_s=0.3) as (_, worker, writer):
            with pytest.raises(WorkerLost, match="did not answer in time"):
                await writer.store(KEYS, IDS, "")
            assert len(worker.failures) == 1
            await at_the_gate(follower)
            follower.connection.send(("go",))

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_cancellation_that_overtakes_its_operation_holds(follower: Follower) -> None:
    address = serve(follower)[0]
    write = WriteBlocks(7, "127.0.0.1:1", 1, "writer", "t", True, packed([1]), (Slab(0, 1, False),))

    async def body() -> None:
        assert await ask(address, "CancelBlocks", CancelBlocks(7)) == Ack()
        written = await ask(address, "WriteBlocks", write)
        assert isinstance(written, Written)
        assert written.message == "the copy was given up"

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_caller_without_the_secret_is_refused(follower: Follower) -> None:
    address = serve(follower)[0]

    async def body() -> None:
        client = Client(address, "wrong")
        with pytest.raises(Unauthorized):
            await client.call("CancelBlocks", CancelBlocks(1), PATIENCE_S)
        await client.close()

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_shard_that_stops_ends_its_copies_first() -> None:
    gate = Gate(LAYOUT, holders(LAYOUT, *GRID)[1])

    async def body() -> None:
        server = BlockServer(gate, IDENTITY, quantized=False)
        async with (
            store(SLABS, LAYOUT) as (address, _),
            lead(LAYOUT, GRID, [], [await server.start()]) as worker,
            writing(address, worker.movers[True]) as writer,
        ):
            sending = asyncio.create_task(writer.store(KEYS, IDS, ""))
            assert await asyncio.to_thread(gate.begun.wait, PATIENCE_S)
            stopping = asyncio.create_task(server.stop())
            for _ in range(3):
                await stat(address)
            assert not stopping.done()
            gate.go.set()
            await stopping
            with pytest.raises(Unavailable):
                await sending
            await until(lambda: free(address), "its slabs are back")

    asyncio.run(asyncio.wait_for(body(), 30))


class Gate(Cache):
    """As `GatedCache`, in this process."""

    def __init__(self, layout: Layout, shard: Shard) -> None:
        super().__init__(layout, shard)
        self.begun, self.go = threading.Event(), threading.Event()

    def block(self, index: int) -> Block:
        self.begun.set()
        assert self.go.wait(PATIENCE_S)
        return super().block(index)


# ------------------------------------------------------------------------------------------------------ rank 0 is dead
def lead_main(connection: Connection, store_address: str, addresses: Sequence[str]) -> None:
    """Main of a process that is rank 0: write until killed."""

    async def main() -> None:
        async with lead(LAYOUT, GRID, [], addresses) as worker, writing(store_address, worker.movers[True]) as writer:
            handoff = await writer.reserve("t", KEYS, 4 * len(IDS), 60_000)
            connection.send(writer._client.client_id)
            await writer.send(handoff.transfer_id, list(enumerate(IDS)))

    asyncio.run(main())


def test_what_a_stopped_shard_may_write_to_stays_out_of_use_when_rank_0_is_dead(mortal: Follower) -> None:
    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    addresses = serve(mortal)

    async def body() -> None:
        async with store(SLABS, LAYOUT) as (address, server):
            rank_0 = context.Process(target=lead_main, args=(other, address, addresses), daemon=True)
            rank_0.start()
            assert await asyncio.to_thread(connection.poll, PATIENCE_S)
            client_id = connection.recv()
            await at_the_gate(mortal)
            assert mortal.process.pid is not None
            os.kill(mortal.process.pid, signal.SIGSTOP)
            try:
                rank_0.kill()
                await asyncio.to_thread(rank_0.join, PATIENCE_S)
                await until(lambda: quarantined(address, len(IDS)), "the store has noticed")
                server._handoffs.exorcise()
                assert await quarantined(address, len(IDS)), "the shard still has its lock"
            finally:
                os.kill(mortal.process.pid, signal.SIGCONT)
            mortal.connection.send(("go",))
            await until(lambda: free(address), "the shard has ended its copy")
            await refused(address, server, addresses[0], client_id)

    asyncio.run(asyncio.wait_for(body(), 60))


async def quarantined(address: str, count: int) -> bool:
    return (await stat(address)).quarantined == count


async def refused(address: str, server: StoreServer, shard: str, client_id: str) -> None:
    """A copy for the writer that is dead is not begun."""
    before = server._arena.slab(0).copy()
    epoch = (await stat(address)).epoch
    write = WriteBlocks(99, address, epoch, client_id, "t", True, packed([3]), (Slab(0, 1, False),))
    written = await ask(shard, "WriteBlocks", write)
    assert (written.code, written.checksums) == (WorkerLost.code, ())
    assert (server._arena.slab(0) == before).all()
