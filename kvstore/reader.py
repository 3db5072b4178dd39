"""The decode end of a handoff: blocks come from a store into a worker's KV cache as they are sealed.

What is reported valid is a prefix of good blocks (`kvstore/arrival.py`): a reader never fails, it only receives less.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.errors import DeadlineExceeded, TandemError
from cluster.messages import Handoff
from cluster.store_messages import Follow, Held, Hold, Release
from kvstore.arrival import Arrival, arrive
from kvstore.connections import Connections
from kvstore.copying import Block
from kvstore.part import Part

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
    """`part`: the one of every block that is read; None: all of it."""

    def __init__(self, connections: Connections, part: Part | None = None) -> None:
        self._connections = connections
        self._part = part or Part(connections.layout)
        self._releases: set[asyncio.Task[None]] = set()

    async def receive(
        self, handoff: Handoff, start: int, tokens: int, write_block: Callable[[int], Block], timeout_s: float
    ) -> Received:
        """`follow` it, then release the transfer."""
        try:
            return await self.follow(handoff, start, tokens, write_block, timeout_s)
        finally:
            self.release_later(handoff)

    async def follow(
        self, handoff: Handoff, start: int, tokens: int, write_block: Callable[[int], Block], timeout_s: float
    ) -> Received:
        """Fetch the blocks `start`.. of the KV of `tokens`, waiting for those still being computed.
        `write_block(position)` gives the memory [part.own.block_bytes] to fill, from a thread; nothing is written to it
        once this has returned or been cancelled."""
        began = time.monotonic()
        arrival = Arrival(self._part, tokens, start, write_block)
        first_token: int | None = None
        error: TandemError | None = None
        try:
            async with asyncio.timeout(timeout_s):
                client = await self._connections.get(handoff.store, handoff.epoch)
                rectangle, inline = self._part.wire, client.arena is None
                follow = Follow(handoff.transfer_id, handoff.epoch, start, inline, rectangle)
                first_token = await arrive(client, follow, arrival, timeout_s)
        except TimeoutError:
            error = DeadlineExceeded(f"handoff {handoff.transfer_id} did not arrive within {timeout_s:.0f} s")
        except TandemError as failure:
            error = failure
        return Received(arrival.position, first_token, arrival.received_bytes, time.monotonic() - began, error)

    async def hold(self, handoff: Handoff, ttl_ms: int) -> int:
        """Keep a handoff that cannot be received yet. Returns the ms it has left. Raises Expired, EpochMismatch."""
        client = await self._connections.get(handoff.store, handoff.epoch)
        held: Held = await client.call("Hold", Hold(handoff.transfer_id, ttl_ms))
        return held.remaining_ms

    async def release(self, handoff: Handoff) -> None:
        """Give up a handoff that was never received. Raises what the connection or the store answers."""
        client = await self._connections.get(handoff.store, handoff.epoch)
        await client.call("Release", Release(handoff.transfer_id))

    async def close(self) -> None:
        """Wait for the releases that are under way. The connections are their owner's to close."""
        if self._releases:
            await asyncio.wait(self._releases)

    def release_later(self, handoff: Handoff) -> None:
        """In the background: neither the next token nor a cancellation should wait for it."""
        task = asyncio.create_task(self._release_now(handoff))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def _release_now(self, handoff: Handoff) -> None:
        client = self._connections.known(handoff.store, handoff.epoch)
        if client is None:
            return
        try:
            await client.call("Release", Release(handoff.transfer_id))
        except TandemError as error:
            log.info("handoff %s is not released, its hold will run out: %s", handoff.transfer_id, error.message)
