"""Blocks as they arrive from a store, over one stream: a handoff that is followed, or blocks that are fetched.

On the store's machine they are copied out of its memory, guarded by the slab's generation; from elsewhere they come in
frames, guarded by the writer's checksums. What counts as arrived is a prefix of good blocks; the first bad one ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from cluster.errors import Corrupt, Expired, ProtocolError, StoreError, TandemError, WorkerLost, subclasses
from cluster.store_messages import Fetch, Follow, FollowEnd, Fragment, Fragments
from kvstore.arena import Arena
from kvstore.client import StoreClient
from kvstore.copying import Block, copy, in_thread
from kvstore.part import Part

MESSAGES_AHEAD = 16  # buffered while a copy runs: at most 16 MiB of frames
MESSAGES_AT_ONCE = 4  # copied by one call of a thread, which nobody can interrupt


class Arrival:
    """One part of the blocks of one stream as they come in. `take` runs in a thread, one call at a time."""

    def __init__(self, part: Part, tokens: int, start: int, write_block: Callable[[int], Block]) -> None:
        self.position = start  # blocks before it are good
        self.part = part
        self._layout = part.own
        self._tokens = tokens
        self._start = start
        self._write_block = write_block
        self._offset = 0  # bytes of the block at `position` that came inline so far
        self._checksums = b""  # of its cells that came

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
        if not 0 <= index < arena.slabs:
            raise ProtocolError(f"block {self.position} is said to be in slab {index} of {arena.slabs}")
        # checked on both sides of the copy: a slab changes hands only after its generation did
        before = arena.generation(index)
        # all of a partial block too: attention multiplies what lies behind its tokens by zero, so it must be finite
        self.part.read(self._write_block(self.position), arena.slab(index))
        if not before == generation == arena.generation(index):
            raise Expired(f"block {self.position} was given away while it was copied")
        self.position += 1

    def _take_inline(self, fragment: Fragment) -> None:
        block = self._write_block(self.position)
        end = self._offset + len(fragment.data)
        if end > len(block) or fragment.last != (end == len(block)):
            raise ProtocolError(f"block {self.position} has {end} bytes of {len(block)}")
        if len(fragment.data) % self._layout.cell_bytes:
            raise ProtocolError(f"block {self.position} came in pieces that are no whole cells")
        self._checksums += copy(block[self._offset : end], np.frombuffer(fragment.data, np.uint8), self._layout)
        self._offset = end
        if fragment.last:
            if self._checksums != fragment.checksums:
                raise Corrupt(f"block {self.position} does not match its checksums")
            self.position += 1
            self._offset, self._checksums = 0, b""

    def end(self, message: FollowEnd) -> int | None:
        """The first token after a whole transfer. Raises why it is not whole."""
        if message.code:
            raise subclasses(TandemError).get(message.code, StoreError)(message.message)
        if self.position * self._layout.tokens < self._tokens:
            raise ProtocolError(f"the transfer ended after {self.position} blocks, too few for {self._tokens} tokens")
        return message.first_token


async def arrive(
    client: StoreClient, request: Follow | Fetch, arrival: Arrival, timeout_s: float, channel: int = 0
) -> int | None:
    """Take in what the store sends for the request. Returns the first token that a transfer ends with. Raises why it is
    less than everything; what came before it is in `arrival`."""
    arena = None if request.inline else client.arena
    stream = client.stream(type(request).__name__, request, timeout_s, channel)
    async with contextlib.aclosing(_arrived(stream)) as batches:
        async for batch in batches:
            fragments = [part for message in batch if isinstance(message, Fragments) for part in message.fragments]
            if fragments:
                await in_thread(partial(arrival.take, fragments, arena))
            if isinstance(batch[-1], FollowEnd):
                return arrival.end(batch[-1])
    raise AssertionError("the loop ends by return or error")


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
            while not queue.empty() and len(batch) < MESSAGES_AT_ONCE:
                batch.append(queue.get_nowait())
            error = batch.pop() if isinstance(batch[-1], Exception) else None
            if batch:
                yield batch
            if error is not None:
                raise error
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
