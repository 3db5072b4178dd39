"""One connection per store, to the start that was meant, whatever addresses and epochs are asked for."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from cluster.errors import EpochMismatch, LayoutMismatch, Unavailable, WorkerLost
from kvstore.connections import Connections
from kvstore.layout import Layout
from tests.kvstore.rig import SECRET, connections, store, store_process, until


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(bounded())


def test_all_who_ask_at_once_share_one_handshake_and_one_may_leave() -> None:
    async def body() -> None:
        async with store(4) as (address, _), connections() as shared:
            asking = [asyncio.create_task(shared.get(address, None)) for _ in range(8)]
            await asyncio.sleep(0)
            asking[0].cancel()
            first, *others = await asyncio.gather(*asking, return_exceptions=True)
            assert isinstance(first, asyncio.CancelledError)
            assert len({id(client) for client in others}) == 1
            assert others[0] is shared.known(address, None)

    run(body())


def test_a_wrong_epoch_is_an_error_and_leaves_the_right_connection_alone() -> None:
    async def body() -> None:
        async with store(4) as (address, _), connections() as shared:
            client = await shared.get(address, None)
            for _ in range(2):
                with pytest.raises(EpochMismatch):
                    await shared.get(address, client.epoch + 1)
            assert await shared.get(address, client.epoch) is client
            assert shared.known(address, client.epoch + 1) is None

    run(body())


def test_a_store_that_was_replaced_is_let_go_of() -> None:
    async def body() -> None:
        async with connections() as shared:
            async with store_process(4) as (address, old, child):
                client = await shared.get(address, old)
                assert child.terminate() == 0  # and removes its arena
                assert shared.known(address, old) is None
                assert shared.known(address, None) is None
            async with store_process(4, port=int(address.rpartition(":")[2])) as (_, new, _):
                await until(lambda: connected(shared, address, new), "the new start answers")
                assert client.arena is None, "its memory is given back"
                with pytest.raises(EpochMismatch):
                    await shared.get(address, old)

    async def connected(shared: Connections, address: str, epoch: int) -> bool:
        try:
            return (await shared.get(address, epoch)).epoch == epoch
        except Unavailable:
            return False

    run(body())


def test_what_is_forgotten_is_connected_anew() -> None:
    async def body() -> None:
        async with store(4) as (address, _), connections() as shared:
            client = await shared.get(address, None)
            await shared.forget(client)
            assert shared.known(address, None) is None
            again = await shared.get(address, client.epoch)
            assert again is not client
            await shared.forget(client)  # too late: it is not the present one
            assert shared.known(address, None) is again

    run(body())


def test_nobody_at_the_address_and_another_layout_are_errors() -> None:
    async def body() -> None:
        async with store(4) as (address, _), connections() as shared:
            with pytest.raises(Unavailable):
                await shared.get("127.0.0.1:1", None)
            other = Connections(SECRET, Layout(3, 2, 4, 8, "float32", 4))
            with pytest.raises(LayoutMismatch):
                await other.get(address, None)
            await other.close()
            with pytest.raises(WorkerLost):
                await other.get(address, None)

    run(body())
