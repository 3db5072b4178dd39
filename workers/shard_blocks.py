"""What a shard that does not lead does about blocks in stores: the gRPC service over which rank 0 has it copy its part.

It decides nothing: which blocks, which slabs and which stores come from rank 0, and how a copy ended goes back there. A
copy ends before it is answered, whatever happens meanwhile, and one for a writer that is gone is not begun.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Coroutine
from typing import Any, TypeVar

from cluster.errors import ProtocolError, TandemError, Unavailable
from cluster.identity import Identity
from cluster.messages import Ack
from cluster.rpc import Server, Unary
from cluster.shard_messages import (
    CancelBlocks,
    FetchBlocks,
    FetchedBlocks,
    FollowBlocks,
    Followed,
    WriteBlocks,
    Written,
)
from kvstore.connections import Connections
from kvstore.copying import outlast
from kvstore.presence import joined
from workers.block_mover import OwnBlocks
from workers.runner import Stage
from workers.shard_answers import error_told, fetched_blocks, followed, source_of, unpacked
from workers.stored_blocks import EncodedBlocks, StoredBlocks, exact_blocks

_GIVEN_UP = Unavailable.code, "the copy was given up"
REMEMBERED = 1024  # cancellations that came before their operation did, or after it had ended
T = TypeVar("T")


class _Kind:
    """Blocks and connections for one kind of stores."""

    def __init__(self, blocks: StoredBlocks, secret: str, force_inline: bool) -> None:
        self.readers = Connections(secret, blocks.layout, force_inline=force_inline)
        self.writers = Connections(secret, blocks.layout, force_inline=force_inline, writable=True)
        self.blocks = OwnBlocks(blocks, self.readers)

    async def close(self) -> None:
        for part in (self.blocks, self.readers, self.writers):
            await part.close()


class BlockServer:
    """`quantized`: there are stores of approximate KV too. `force_inline` takes the path between machines on one."""

    def __init__(self, stage: Stage, identity: Identity, quantized: bool, *, force_inline: bool = False) -> None:
        kinds: dict[bool, StoredBlocks] = {True: exact_blocks(stage)}
        if quantized:
            from workers.quantization import Int8Codec  # imports torch

            kinds[False] = EncodedBlocks(stage, Int8Codec(stage.shard.part(stage.layout)))
        self._kinds = {exact: _Kind(blocks, identity.secret, force_inline) for exact, blocks in kinds.items()}
        self._host = identity.host
        self._running: dict[int, asyncio.Task[Any]] = {}  # operation -> its copies
        self._cancelled: deque[int] = deque(maxlen=REMEMBERED)  # operations that are not running
        verbs: dict[str, Unary] = {
            "WriteBlocks": self._write,
            "FollowBlocks": self._follow,
            "FetchBlocks": self._fetch,
            "CancelBlocks": self._cancel,
        }
        self._server = Server(identity.secret, verbs, {})

    async def start(self) -> str:
        """Serve. Returns the address."""
        return await self._server.start(self._host)

    async def stop(self) -> None:
        """Take no more calls, cancel the copies that are under way and wait for their end."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await self._server.stop()
        await outlast([*running, *self._running.values()])
        for kind in self._kinds.values():
            await kind.close()

    # --------------------------------------------------------------------------------------------------------- calls
    async def _write(self, message: WriteBlocks, _: Any) -> Written:
        return await self._operation(message.operation, self._copy(message), Written((), *_GIVEN_UP))

    async def _follow(self, message: FollowBlocks, _: Any) -> Followed:
        return await self._operation(
            message.operation, self._receive(message), Followed(message.start, None, 0, 0.0, *_GIVEN_UP)
        )

    async def _fetch(self, message: FetchBlocks, _: Any) -> FetchedBlocks:
        start = message.sources[0].start
        return await self._operation(message.operation, self._bring(message), FetchedBlocks(start, (), *_GIVEN_UP))

    async def _cancel(self, message: CancelBlocks, _: Any) -> Ack:
        if message.operation in self._running:
            self._running[message.operation].cancel()
        else:
            self._cancelled.append(message.operation)
        return Ack()

    async def _operation(self, number: int, work: Coroutine[Any, Any, T], given_up: T) -> T:
        """Have it done; `given_up` when it was cancelled. Also when the call breaks, because rank 0 is gone or waits no
        more, it is cancelled and its end waited for."""
        task = asyncio.create_task(work)
        self._running[number] = task
        if number in self._cancelled:
            task.cancel()
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
            await outlast([task])
            del self._running[number]
        return given_up if task.cancelled() else task.result()

    # -------------------------------------------------------------------------------------------------------- copies
    async def _copy(self, message: WriteBlocks) -> Written:
        try:
            kind = self._kind(message.exact)
            client = await kind.writers.get(message.store, message.epoch)
            with contextlib.ExitStack() as stack:
                if client.arena is not None:
                    stack.enter_context(joined(client.arena.path, message.client_id))
                blocks = unpacked(message.blocks)
                return Written(tuple(await kind.blocks.write(client, message.transfer_id, blocks, message.slabs)))
        except TandemError as error:
            return Written((), *error_told(error))

    async def _receive(self, message: FollowBlocks) -> Followed:
        table, timeout_s = unpacked(message.table), message.timeout_ms / 1000
        blocks = self._kind(True).blocks  # handoffs are exact
        return followed(await blocks.follow(message.handoff, message.start, message.tokens, table, timeout_s))

    async def _bring(self, message: FetchBlocks) -> FetchedBlocks:
        table, timeout_s = unpacked(message.table), message.timeout_ms / 1000
        sources = list(map(source_of, message.sources))
        blocks = self._kind(message.exact).blocks
        return fetched_blocks(await blocks.fetch(sources, message.hashes, table, timeout_s))

    def _kind(self, exact: bool) -> _Kind:
        if exact not in self._kinds:
            raise ProtocolError(
                "this shard has no approximate KV; start all of a worker's shards with one configuration"
            )
        return self._kinds[exact]
