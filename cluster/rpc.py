"""gRPC without generated code: every call is one message in, one message (or a stream of them) out.

The codec is `cluster.messages`; a call is authorised by the cluster secret in its metadata, compared in constant time.
A TandemError raised by a handler reaches the caller as the same class. A call carries its caller's span, if that is
traced. Every call has a deadline; a stream's deadline
is its caller's business (`timeout=None` is allowed only there).
"""

from __future__ import annotations

import hmac
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc

from cluster import telemetry
from cluster.codec import decode, encode
from cluster.errors import DeadlineExceeded, TandemError, Unauthorized, WorkerLost, subclasses

SERVICE = "tandem.v1"
MAX_MESSAGE_BYTES = 16 * 2**20  # frames are about 1 MiB; the largest message is a job with a long prompt
KEEPALIVE_MS = 10_000
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ("grpc.so_reuseport", 0),  # a taken port must fail, not be shared
    ("grpc.enable_http_proxy", 0),
]
# a replacement for a dead peer listens on a new port, so reconnecting to the old one should not be patient
CHANNEL_OPTIONS = [*OPTIONS, ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1_000)]

Unary = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]
Stream = Callable[[Any, grpc.aio.ServicerContext], AsyncIterator[Any]]


class Server:
    """A gRPC server on one address. `unary` and `streams` map method name -> handler(message, context)."""

    def __init__(self, secret: str, unary: Mapping[str, Unary], streams: Mapping[str, Stream]) -> None:
        self._secret = secret.encode()
        # what arrives is decoded by us: gRPC would log what it cannot decode and go on without it
        one, many = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers = {name: one(self._unary(handler), None, encode) for name, handler in unary.items()}
        handlers |= {name: many(self._stream(handler), None, encode) for name, handler in streams.items()}
        self._server = grpc.aio.server(options=OPTIONS)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def start(self, host: str, port: int = 0) -> str:
        """Listen and return host:port. Raises OSError-like RuntimeError from gRPC when the port is taken."""
        bound = self._server.add_insecure_port(f"{host}:{port}")
        await self._server.start()
        return f"{host}:{bound}"

    async def stop(self, grace_s: float = 0.5) -> None:
        await self._server.stop(grace_s)

    def _authorise(self, context: grpc.aio.ServicerContext) -> None:
        metadata = dict(context.invocation_metadata() or ())
        given = metadata.get("authorization", "")
        given = given.encode() if isinstance(given, str) else given
        if not hmac.compare_digest(given, self._secret):
            raise Unauthorized("this call did not carry the cluster's secret")
        telemetry.incoming(metadata)

    def _unary(self, handler: Unary) -> Unary:
        async def call(message: bytes, context: grpc.aio.ServicerContext) -> Any:
            try:
                self._authorise(context)
                return await handler(decode(message), context)
            except TandemError as error:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{error.code}|{error.message}")

        return call

    def _stream(self, handler: Stream) -> Stream:
        async def call(message: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            try:
                self._authorise(context)
                async for item in handler(decode(message), context):
                    yield item
            except TandemError as error:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{error.code}|{error.message}")

        return call


class Client:
    """A channel to one address. Errors come out as TandemErrors: the peer's own, WorkerLost, or DeadlineExceeded."""

    def __init__(self, address: str, secret: str, *, own_connection: bool = False) -> None:
        """gRPC lets channels to one address share a connection, unless told not to."""
        self.address = address
        self._metadata = (("authorization", secret),)
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", int(own_connection))]
        self._channel = grpc.aio.insecure_channel(address, options=options)
        self._calls: dict[str, Any] = {}  # method -> multicallable

    async def call(self, method: str, message: Any, timeout_s: float) -> Any:
        if method not in self._calls:
            self._calls[method] = self._channel.unary_unary(f"/{SERVICE}/{method}", encode, None)
        try:
            metadata = telemetry.outgoing(self._metadata)
            answer = await self._calls[method](message, timeout=timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise translate(error, self.address, method) from None
        return decode(answer)

    async def stream(self, method: str, message: Any, timeout_s: float | None) -> AsyncGenerator[Any, None]:
        """Yields the peer's messages; leaving the loop early cancels the call."""
        call = self._channel.unary_stream(f"/{SERVICE}/{method}", encode, None)(
            message, timeout=timeout_s, metadata=telemetry.outgoing(self._metadata)
        )
        try:
            async for item in call:
                yield decode(item)
        except grpc.aio.AioRpcError as error:
            raise translate(error, self.address, method) from None
        finally:
            call.cancel()

    async def close(self) -> None:
        await self._channel.close()


def translate(error: grpc.aio.AioRpcError, address: str, method: str) -> TandemError:
    """The TandemError that a failed call stands for."""
    details = error.details() or ""
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION and "|" in details:
        code, message = details.split("|", 1)
        return subclasses(TandemError).get(code, TandemError)(message)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{method} at {address} did not answer in time")
    return WorkerLost(f"{method} at {address} failed: {error.code().name.lower()} {details}")
