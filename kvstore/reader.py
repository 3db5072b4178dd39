"""The decode end of a handoff: blocks come from a store into a worker's KV cache as they are sealed.

On the store's machine they are copied out of its memory, guarded by the slab's generation; from elsewhere they come in
frames, guarded by the writer's checksums. Either way what is reported valid is a prefix of good blocks: a reader never
fails, it only receives less.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cluster.errors import (
    Corrupt,
    DeadlineExceeded,
    EpochMismatch,
    Expired,
    ProtocolError,
    StoreError,
    TandemError,
    WorkerLost,
    subclasses,
)
from cluster.messages import Handoff
from cluster.store_messages import Follow, FollowEnd, Fragment, Held, Hold, Release
from kvstore.arena import Arena
from kvstore.client import StoreClient
from kvstore.copying import Block, checksums, in_thread
from kvstore.layout import Layout

MESSAGES_AHEAD = 16  # buffered while a copy runs: at most 16 MiB of frames
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Received:
    """What arrived. `error` says why it is less than everything."""

    valid_blocks: int  # good blocks from the beginning of the table, those before `start` included
    first_token: int | None
    bytes: int  # KV bytes of the tokens that came, unused rows of a partial block not counted
    seconds: float
    error: TandemError | None


class HandoffReader:
    """`force_inline` takes the path between machines even on one."""

    def __init__(self, secret: str, layout: Layout, *, force_inline: bool = False) -> None:
        self._secret = secret
        self._layout = layout
        self._force_inline = force_inline
        self._clients: dict[str, StoreClient] = {}  # store address -> connection to its present start
        self._connecting: dict[str, asyncio.Lock] = {}  # store address -> held while shaking hands
        self._releases: set[asyncio.Task[None]] = set()

    async def receive(
        self, handoff: Handoff, start: int, tokens: int, write_block: Callable[[int], Block], timeout_s: float
    ) -> Received:
        """Fetch the blocks `start`.. of the KV of `tokens`, waiting for those still being computed, then release the
        transfer. `write_block(position)` gives the memory [layout.block_bytes] to fill, from a thread; nothing is
        written to it once this has returned or been cancelled."""
        began = time.monotonic()
        arrival = _Arrival(self._layout, tokens, start, write_block)
        first_token: int | None = None
        error: TandemError | None = None
        try:
            async with asyncio.timeout(timeout_s):
                client = await self._client(handoff)
                first_token = await self._follow(client, handoff, arrival, timeout_s)
        except TimeoutError:
            error = DeadlineExceeded(f"handoff {handoff.transfer_id} did not arrive within {timeout_s:.0f} s")
        except TandemError as failure:
            error = failure
        finally:
            self._release(handoff)
        return Received(arrival.position, first_token, arrival.received_bytes, time.monotonic() - began, error)

    async def hold(self, handoff: Handoff, ttl_ms: int) -> int:
        """Keep a handoff that cannot be received yet. Returns the ms it has left. Raises Expired, EpochMismatch."""
        client = await self._client(handoff)
        held: Held = await client.call("Hold", Hold(handoff.transfer_id, ttl_ms))
        return held.remaining_ms

    async def release(self, handoff: Handoff) -> None:
        """Give up a handoff that was never received. Raises what the connection or the store answers."""
        client = await self._client(handoff)
        await client.call("Release", Release(handoff.transfer_id))

    async def close(self) -> None:
        if self._releases:
            await asyncio.wait(self._releases)
        for client in self._clients.values():
            await client.close()

    async def _follow(self, client: StoreClient, handoff: Handoff, arrival: _Arrival, timeout_s: float) -> int | None:
        arena = client.arena
        follow = Follow(handoff.transfer_id, handoff.epoch, arrival.position, inline=arena is None)
        async with contextlib.aclosing(_arrived(client.stream("Follow", follow, timeout_s))) as batches:
            async for batch in batches:
                fragments = [message for message in batch if isinstance(message, Fragment)]
                if fragments:
                    await in_thread(partial(arrival.take, fragments, arena))
                if isinstance(batch[-1], FollowEnd):
                    return arrival.end(batch[-1])
        raise AssertionError("the loop ends by return or error")

    async def _client(self, handoff: Handoff) -> StoreClient:
        async with self._connecting.setdefault(handoff.store, asyncio.Lock()):
            known = self._clients.get(handoff.store)
            if known is not None and known.epoch == handoff.epoch:
                return known
            client = StoreClient(handoff.store, self._secret, "reader", self._layout)
            try:
                await client.connect(inline=self._force_inline)
                if client.epoch != handoff.epoch:
                    raise EpochMismatch("the store has restarted since this handoff was made; recompute it")
            except BaseException:
                await client.close()
                raise
            self._clients[handoff.store] = client
        await self._forget_the_dead(known)
        return client

    async def _forget_the_dead(self, replaced: StoreClient | None) -> None:
        """A mapped arena takes memory even after its store is gone."""
        dead = [replaced] if replaced is not None else []
        for address, client in list(self._clients.items()):
            if client.arena is not None and client.arena.removed:
                dead.append(self._clients.pop(address))
        for client in dead:
            await client.close()

    def _release(self, handoff: Handoff) -> None:
        """In the background: neither the next token nor a cancellation should wait for it."""
        task = asyncio.create_task(self._release_now(handoff))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def _release_now(self, handoff: Handoff) -> None:
        client = self._clients.get(handoff.store)
        if client is None or client.epoch != handoff.epoch:
            return
        try:
            await client.call("Release", Release(handoff.transfer_id))
        except TandemError as error:
            log.info("handoff %s is not released, its hold will run out: %s", handoff.transfer_id, error.message)


class _Arrival:
    """The blocks of one handoff as they come in. `take` runs in a thread, one call at a time."""

    def __init__(self, layout: Layout, tokens: int, start: int, write_block: Callable[[int], Block]) -> None:
        self.position = start  # blocks before it are good
        self._layout = layout
        self._tokens = tokens
        self._start = start
        self._write_block = write_block
        self._offset = 0  # bytes of the block at `position` that came inline so far

    @property
    def received_bytes(self) -> int:
        size = self._layout.tokens
        return max(0, min(self.position * size, self._tokens) - self._start * size) * self._layout.token_bytes

    def take(self, fragments: Sequence[Fragment], arena: Arena | None) -> None:
        """Raises Expired, Corrupt or ProtocolError at the first that is no good; those before it count."""
        for fragment in fragments:
            expected = min(self._layout.tokens, self._tokens - self.position * self._layout.tokens)
            if (fragment.position, fragment.offset, fragment.tokens) != (self.position, self._offset, expected):
                raise ProtocolError(f"block {fragment.position} came where {self.position} was expected")
            if arena is not None:
                self._take_mapped(fragment, arena)
            else:
                self._take_inline(fragment)

    def _take_mapped(self, fragment: Fragment, arena: Arena) -> None:
        index, generation = fragment.slab.index, fragment.slab.generation
        # checked on both sides of the copy: a slab changes hands only after its generation did
        before = arena.generation(index)
        # all of a partial block too: attention multiplies what lies behind its tokens by zero, so it must be finite
        self._write_block(self.position)[:] = arena.slab(index)
        if not before == generation == arena.generation(index):
            raise Expired(f"block {self.position} was given away while it was copied")
        self.position += 1

    def _take_inline(self, fragment: Fragment) -> None:
        block = self._write_block(self.position)
        end = self._offset + len(fragment.data)
        if end > len(block) or fragment.last != (end == len(block)):
            raise ProtocolError(f"block {self.position} has {end} bytes of {len(block)}")
        block[self._offset : end] = np.frombuffer(fragment.data, np.uint8)
        self._offset = 0 if fragment.last else end
        if fragment.last:
            if checksums(block, self._layout) != fragment.checksums:
                raise Corrupt(f"block {self.position} does not match its checksums")
            self.position += 1

    def end(self, message: FollowEnd) -> int | None:
        """The first token after a whole transfer. Raises why it is not whole."""
        if message.code:
            raise subclasses(TandemError).get(message.code, StoreError)(message.message)
        if self.position * self._layout.tokens < self._tokens:
            raise ProtocolError(f"the transfer ended after {self.position} blocks, too few for {self._tokens} tokens")
        return message.first_token


async def _arrived(stream: AsyncIterator[Any]) -> AsyncGenerator[list[Any], None]:
    """What has come since the last time, at least one message: going to a thread costs as much as copying a block."""
    queue: asyncio.Queue[Any] = asyncio.Queue(MESSAGES_AHEAD)

    async def pump() -> None:
        try:
            async for message in stream:
                await queue.put(message)
            await queue.put(WorkerLost("the store ended the stream in the middle"))
        except Exception as error:  # raised below, in its turn
            await queue.put(error)

    task = asyncio.create_task(pump())
    try:
        while True:
            batch = [await queue.get()]
            while not queue.empty():
                batch.append(queue.get_nowait())
            error = batch.pop() if isinstance(batch[-1], Exception) else None
            if batch:
                yield batch
            if error is not None:
                raise error
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
