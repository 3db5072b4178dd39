"""The queue of blocks for the store, with a real store: what it writes, what it drops, and that it gives all back."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from kvstore.blocks import Name
from kvstore.writer import HandoffWriter
from tests.kvstore.rig import keys_for, stat, store, until, writer
from workers.counters import Counters
from workers.offload import BATCH, OffloadQueue
from workers.step import Offload


def offloads(count: int, chain: int = 0, tenant: str = "", cold: bool = False) -> list[Offload]:
    """The blocks of one chain, each with an id of its own."""
    keys = keys_for(4 * count, chain)
    return [Offload(1000 * chain + i, Name(key, tenant), cold) for i, key in enumerate(keys)]


class Queue:
    """The queue while it runs, and what it gave back."""

    def __init__(self, connection: HandoffWriter | None, limit: int) -> None:
        self.back: list[int] = []
        self.idle = asyncio.Event()
        self.idle.set()
        self.counters = Counters()
        self.queue = OffloadQueue(lambda: connection, limit, self.idle, self.done, self.counters)

    def done(self, given: Sequence[Offload]) -> None:
        self.back += [offload.block for offload in given]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.queue.run())
        try:
            await asyncio.sleep(0)
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def run(test: Callable[[str, HandoffWriter], Awaitable[None]], slabs: int = 200, tenant_share: float = 1.0) -> None:
    async def main() -> None:
        async with store(slabs, tenant_share=tenant_share) as (address, _), writer(address) as connection:
            await test(address, connection)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_blocks_are_written_once_and_given_back_with_nothing_held() -> None:
    async def body(address: str, connection: HandoffWriter) -> None:
        queue = Queue(connection, 1000)
        async with queue.running():
            queue.queue.put(offloads(70))
            queue.queue.put(offloads(10, chain=1, tenant="alice"))
            queue.queue.put(offloads(5))  # the store has these by then
            await until(lambda: len(queue.back) == 85, "all blocks are back")
        s = await stat(address)
        assert (s.cached, s.held, s.reserved, s.transfers) == (80, 0, 0, 0)
        assert (queue.counters.offloaded_blocks_total, queue.counters.offload_failures_total) == (80, 0)

    run(body)


def test_a_full_queue_keeps_the_heads_of_chains() -> None:
    async def body(address: str, connection: HandoffWriter) -> None:
        queue = Queue(connection, 50)
        async with queue.running():
            queue.queue.put(offloads(60))
            assert queue.back == list(range(50, 60))
            await until(lambda: len(queue.back) == 60, "all blocks are back")
        assert (await stat(address)).cached == 50
        assert queue.counters.offload_failures_total == 10

    run(body)


def test_a_store_without_room_costs_the_blocks_and_nothing_else() -> None:
    async def body(address: str, connection: HandoffWriter) -> None:
        await connection.reserve("busy", keys_for(4 * 90, chain=9), 4 * 90, 30_000)
        queue = Queue(connection, 1000)
        async with queue.running():
            queue.queue.put(offloads(BATCH))
            await until(lambda: len(queue.back) == BATCH, "all blocks are back")
            assert queue.counters.offload_failures_total == BATCH
            await connection.revoke("busy", "test")
            queue.queue.put(offloads(BATCH))
            await until(lambda: queue.counters.offloaded_blocks_total == BATCH, "the second attempt is written")

    run(body, slabs=100)


def test_without_a_store_blocks_come_back_at_once() -> None:
    async def main() -> None:
        queue = Queue(None, 1000)
        async with queue.running():
            queue.queue.put(offloads(40))
            await until(lambda: len(queue.back) == 40, "all blocks are back")
        assert queue.counters.offload_failures_total == 40

    asyncio.run(asyncio.wait_for(main(), 30))


def test_handoffs_go_first() -> None:
    async def body(address: str, connection: HandoffWriter) -> None:
        queue = Queue(connection, 1000)
        queue.idle.clear()
        async with queue.running():
            queue.queue.put(offloads(3, cold=True))
            await asyncio.sleep(0.1)
            assert queue.back == []
            queue.idle.set()
            await until(lambda: len(queue.back) == 3, "all blocks are back")

    run(body)


def test_when_it_is_stopped_everything_comes_back() -> None:
    async def body(address: str, connection: HandoffWriter) -> None:
        for delay_ms in (0, 1, 2, 5):
            queue = Queue(connection, 1000)
            async with queue.running():
                queue.queue.put(offloads(100))
                await asyncio.sleep(delay_ms / 1000)
            assert sorted(queue.back) == list(range(100))

        async def nothing_held() -> bool:
            s = await stat(address)
            return s.held == s.reserved == s.quarantined == s.transfers == 0

        await until(nothing_held, "the store holds nothing for a writer that gave up")

    run(body)
