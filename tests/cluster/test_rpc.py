"""Real gRPC on loopback: what goes wrong on one side is the same class on the other."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from cluster.errors import DeadlineExceeded, NoSpace, ProtocolError, Unauthorized, WorkerLost
from cluster.messages import Abort, Ack, Refused
from cluster.rpc import Client, Server

SECRET = "s3cret"


async def echo(message: Any, _: Any) -> Any:
    return message


async def refuse(message: Any, _: Any) -> Any:
    raise NoSpace("17 slabs are needed, 3 are free")


async def hang(message: Any, _: Any) -> Any:
    await asyncio.Event().wait()


async def count(message: Abort, _: Any) -> AsyncIterator[Any]:
    for name in message.ids:
        yield Refused(name, "")
    if not message.ids:
        raise NoSpace("none")


async def rubbish(_: Any, __: Any) -> bytes:
    return b"\xc1\xff\xff\xff\xff"


async def rubbishes(_: Any, __: Any) -> AsyncIterator[bytes]:
    yield b""


RUBBISH = grpc.method_handlers_generic_handler(
    "tandem.v1",
    {
        "Rubbish": grpc.unary_unary_rpc_method_handler(rubbish),
        "Rubbishes": grpc.unary_stream_rpc_method_handler(rubbishes),
    },
)


def run(test: Any, secret: str = SECRET) -> Any:
    async def main() -> Any:
        server = Server(SECRET, {"Echo": echo, "Refuse": refuse, "Hang": hang}, {"Count": count})
        server._server.add_generic_rpc_handlers((RUBBISH,))
        client = Client(await server.start("127.0.0.1"), secret)
        try:
            return await test(client, server)
        finally:
            await client.close()
            await server.stop()

    return asyncio.run(asyncio.wait_for(main(), 30))


def test_a_call_and_a_stream_answer() -> None:
    async def body(client: Client, _: Server) -> None:
        assert await client.call("Echo", Abort(("a",)), 5) == Abort(("a",))
        assert [r.code async for r in client.stream("Count", Abort(("x", "y")), 5)] == ["x", "y"]

    run(body)


def test_an_error_keeps_its_class_and_message() -> None:
    async def body(client: Client, _: Server) -> None:
        with pytest.raises(NoSpace, match="17 slabs"):
            await client.call("Refuse", Ack(), 5)
        with pytest.raises(NoSpace, match="none"):
            _ = [r async for r in client.stream("Count", Abort(()), 5)]

    run(body)


def test_a_wrong_secret_is_refused_by_calls_and_streams() -> None:
    async def body(client: Client, _: Server) -> None:
        with pytest.raises(Unauthorized):
            await client.call("Echo", Ack(), 5)
        with pytest.raises(Unauthorized):
            _ = [r async for r in client.stream("Count", Abort(("x",)), 5)]

    run(body, secret="wrong")


def test_a_deadline_and_a_dead_server_are_typed() -> None:
    async def body(client: Client, server: Server) -> None:
        with pytest.raises(DeadlineExceeded):
            await client.call("Hang", Ack(), 0.2)
        await server.stop(0)
        with pytest.raises(WorkerLost):
            await client.call("Echo", Ack(), 5)

    run(body)


def test_rubbish_is_a_protocol_error_on_both_sides() -> None:
    async def body(client: Client, _: Server) -> None:
        with pytest.raises(ProtocolError):
            await client.call("Rubbish", Ack(), 5)
        with pytest.raises(ProtocolError):
            _ = [r async for r in client.stream("Rubbishes", Ack(), 5)]
        async with grpc.aio.insecure_channel(client.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="protocol_error"):
                await channel.unary_unary("/tandem.v1/Echo")(b"rubbish", metadata=(("authorization", SECRET),))

    run(body)


def test_channels_of_their_own_work_side_by_side() -> None:
    async def body(client: Client, _: Server) -> None:
        others = [Client(client.address, SECRET, own_connection=True) for _ in range(3)]
        assert await asyncio.gather(*(c.call("Echo", Ack(), 5) for c in others)) == [Ack()] * 3
        for other in others:
            await other.close()

    run(body)


def test_a_taken_port_is_an_error() -> None:
    async def body(client: Client, _: Server) -> None:
        host, port = client.address.split(":")
        second = Server(SECRET, {}, {})
        with pytest.raises(RuntimeError):
            await second.start(host, int(port))

    run(body)
