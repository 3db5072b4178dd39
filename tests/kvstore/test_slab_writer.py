"""Blocks written from another machine than the store's, and what a store accepts of that."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest

from cluster.errors import Expired, ProtocolError
from cluster.messages import Handoff
from cluster.rpc import Client
from cluster.store_messages import Fetch, Follow, Fragment, Put, Slab
from kvstore.client import StoreClient
from kvstore.layout import Layout, Rectangle
from kvstore.part import Part
from kvstore.slab_writer import SlabWriter
from kvstore.writer import HandoffWriter
from tests.kvstore.rig import LAYOUT, SECRET, Block, Target, block_of, hashes_for, keys_for, reader, stat, store, writer

VAST = Layout(heads=3, layers=5, tokens=16, dim=512, dtype="float32", itemsize=4)  # a block is several frames


class Halves:
    """A BlockSource of two shards, both on another machine than the store."""

    def __init__(self, client: StoreClient, layout: Layout, cut: int) -> None:
        self._client = client
        upper, lower = Rectangle(0, layout.heads, 0, cut), Rectangle(0, layout.heads, cut, layout.layers)
        self._parts = [Part(layout, upper), Part(layout, lower)]
        self._layout = layout

    async def write(
        self, client: StoreClient, transfer_id: str, blocks: Sequence[int], slabs: Sequence[Slab]
    ) -> list[bytes]:
        cells = np.zeros((len(blocks), self._layout.heads, self._layout.layers), "<u4")
        for part in self._parts:
            sums = await SlabWriter(part, self._own(part)).write(self._client, transfer_id, blocks, slabs)
            r, own = part.rectangle, np.frombuffer(b"".join(sums), "<u4")
            cells[:, :, r.layer0 : r.layer1] = own.reshape(len(blocks), self._layout.heads, -1)
        return [block.tobytes() for block in cells]

    def _own(self, part: Part) -> Callable[[int], Block]:
        def read(block: int) -> Block:
            own = np.zeros(part.own.block_bytes, np.uint8)
            part.read(own, block_of(block, self._layout))
            return own

        return read


@pytest.mark.parametrize("layout", [LAYOUT, VAST])
def test_shards_on_another_machine_write_through_the_store(layout: Layout) -> None:
    async def body() -> None:
        tokens = 5 * layout.tokens + 1
        async with store(8, layout) as (address, _), reader(force_inline=True, layout=layout) as r:
            far = StoreClient(address, SECRET, "far", layout)
            await far.connect(inline=True)
            w = HandoffWriter(StoreClient(address, SECRET, "writer", layout), layout, Halves(far, layout, 2))
            await w.connect()
            handoff = await w.reserve("t", hashes_for(tokens, 0, layout), tokens, 5000)
            await w.send("t", [(position, 30 + position) for position in range(6)])
            await w.finish("t", 7)
            target = Target(layout)
            received = await r.receive(handoff, 0, tokens, target, 10.0)  # verifies the checksums
            assert (received.valid_blocks, received.first_token, received.error) == (6, 7, None)
            assert all((target.blocks[i] == block_of(30 + i, layout)).all() for i in range(6))
            await w.close()
            await far.close()

    asyncio.run(asyncio.wait_for(body(), 30))


def with_a_transfer(test: Callable[[Client, HandoffWriter, Handoff, Slab], Awaitable[None]]) -> None:
    """One block reserved, its slab, and a client that speaks for itself."""

    async def body() -> None:
        async with store(8) as (address, _), writer(address) as w:
            handoff = await w.reserve("t", keys_for(4), 4, 5000)
            client = Client(address, SECRET)
            await test(client, w, handoff, w._transfers["t"][0])
            await client.close()

    asyncio.run(asyncio.wait_for(body(), 30))


def put(slab: Slab, offset: int = 0, size: int = LAYOUT.cell_bytes, transfer: str = "t") -> Put:
    return Put(transfer, (Fragment(0, LAYOUT.tokens, slab, b"", offset, b"\xff" * size, last=False),))


def test_bytes_go_only_where_the_transfer_still_writes() -> None:
    async def body(client: Client, w: HandoffWriter, handoff: Handoff, slab: Slab) -> None:
        await client.call("Put", put(slab), 5)
        for wrong in (Slab(slab.index, slab.generation + 1, False), Slab(slab.index + 1, slab.generation, False)):
            with pytest.raises(ProtocolError, match="not reserved"):
                await client.call("Put", put(wrong), 5)
        with pytest.raises(Expired):
            await client.call("Put", put(slab, transfer="another"), 5)
        await w.send("t", [(0, 3)])
        with pytest.raises(ProtocolError, match="not reserved"):
            await client.call("Put", put(slab), 5)  # sealed: readers see it
        await w.revoke("t", "enough")
        with pytest.raises(Expired):
            await client.call("Put", put(slab), 5)
        assert (await stat(handoff.store)).free + (await stat(handoff.store)).cached == 8

    with_a_transfer(body)


def test_bytes_outside_of_a_block_are_refused_before_any_is_written() -> None:
    async def body(client: Client, _: HandoffWriter, __: Handoff, slab: Slab) -> None:
        cell, size = LAYOUT.cell_bytes, LAYOUT.block_bytes
        for offset, length in ((size, cell), (size - cell, 2 * cell), (-cell, cell), (1, cell), (0, cell - 1)):
            with pytest.raises(ProtocolError):
                await client.call("Put", put(slab, offset, length), 5)

    with_a_transfer(body)


@pytest.mark.parametrize("rectangle", [(0, 3, 0, 1), (1, 1, 0, 1), (0, 1, 2, 4), (-1, 1, 0, 1), (0, 1)])
def test_a_rectangle_that_no_block_has_is_refused(rectangle: tuple[int, ...]) -> None:
    async def body(client: Client, _: HandoffWriter, handoff: Handoff, __: Slab) -> None:
        for method, message in (
            ("Follow", Follow("t", handoff.epoch, 0, True, rectangle)),
            ("Fetch", Fetch((), handoff.epoch, True, rectangle)),
        ):
            with pytest.raises(ProtocolError, match="rectangle"):
                await anext(client.stream(method, message, 5))

    with_a_transfer(body)
