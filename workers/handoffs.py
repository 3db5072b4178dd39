"""Both ends of a worker's handoffs: blocks that leave for the store, and blocks that arrive from one.

Runs on the event loop; the copies themselves run in threads. A transfer's sends keep their order in a task of their
own; a receive is a task that ends in exactly one call of `done`, cancelled or not, so the engine always gets its
blocks back.
Holds on handoffs that wait for room are renewed here, or a busy decode worker would lose them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from cluster.config import Config
from cluster.errors import StoreError, TandemError
from cluster.messages import Handoff
from kvstore.client import StoreClient
from kvstore.reader import HandoffReader
from kvstore.writer import HandoffWriter
from workers.engine import Send
from workers.runner import Runner
from workers.sequence import Sequence, State

Sent = Callable[[list[int]], None]  # takes back the ids of blocks that nobody copies from any more
Received = Callable[[Sequence, int, int | None], None]  # sequence, good blocks from the start, first token
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Stats:
    """Lifetime counters of what arrived."""

    bytes: int = 0
    seconds: float = 0.0
    failures: int = 0


class Handoffs:
    def __init__(self, client_id: str, runner: Runner, config: Config, secret: str) -> None:
        self._client_id = client_id
        self._runner = runner
        self._hold_ms = int(config.hold_timeout * 1000)
        self._secret = secret
        self._writer: HandoffWriter | None = None
        self._client: StoreClient | None = None
        self._reader = HandoffReader(secret, runner.layout)
        self._sends: dict[str, asyncio.Queue[tuple[Send, Sent] | None]] = {}  # transfer id -> work left; None: revoke
        self._receives: dict[str, asyncio.Task[None]] = {}  # sequence id -> task
        self._tasks: set[asyncio.Task[None]] = set()
        self.stats = Stats()

    @property
    def connected(self) -> bool:
        return self._writer is not None and self._writer.connected

    async def connect(self, address: str) -> None:
        """Use the store at this address from now on. Raises StoreError or Unavailable when it does not answer."""
        if self._client is not None and self._client.address == address and self.connected:
            return
        client = StoreClient(address, self._secret, self._client_id, self._runner.layout)
        writer = HandoffWriter(client, self._runner.layout, self._runner.block)
        await writer.connect()
        old, self._client, self._writer = self._writer, client, writer
        if old is not None:
            await old.close()

    async def close(self) -> None:
        for task in [*self._tasks, *self._receives.values()]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._receives.values(), return_exceptions=True)
        if self._writer is not None:
            await self._writer.close()
        await self._reader.close()

    # ------------------------------------------------------------------------------------------------------- leaving
    async def reserve(self, sequence: Sequence) -> Handoff:
        """Room in this node's store for all of the sequence's KV. Raises StoreError when there is none."""
        if self._writer is None or not self._writer.connected:
            raise StoreError("this worker has no block store yet")
        size = self._runner.layout.tokens
        hashes = sequence.hashes[: len(sequence.tokens) // size]
        writer = self._writer
        try:
            handoff = await writer.reserve(sequence.transfer_id, hashes, len(sequence.tokens), self._hold_ms)
        except asyncio.CancelledError:  # the store may have reserved all the same
            self._spawn(self._quietly(writer.revoke(sequence.transfer_id, "the router gave up")))
            raise
        self._sends[sequence.transfer_id] = asyncio.Queue()
        self._spawn(self._drain(sequence.transfer_id, writer))
        return handoff

    def send(self, send: Send, done: Sent) -> None:
        """Copy and seal, in the order of the calls; `done` gets the blocks back."""
        self._sends[send.transfer_id].put_nowait((send, done))

    def revoke(self, transfer_id: str) -> None:
        """The prefill will not finish."""
        if transfer_id in self._sends:
            self._sends[transfer_id].put_nowait(None)

    def abandon(self, ids: Iterable[str]) -> None:
        """Of these jobs, those that were prefills and are done need not be kept for anybody."""
        for transfer_id in ids:
            if transfer_id not in self._sends and self._writer is not None and self._writer.connected:
                self._spawn(self._quietly(self._writer.revoke(transfer_id, "the request has ended")))

    async def _drain(self, transfer_id: str, writer: HandoffWriter) -> None:
        """Everything one transfer sends, in order; after a failure blocks are only let go of."""
        healthy = True
        while True:
            work = await self._sends[transfer_id].get()
            try:
                if work is None:
                    await writer.revoke(transfer_id, "the prefill was aborted")
                elif healthy:
                    await writer.send(transfer_id, work[0].blocks)
                    if work[0].last:
                        await writer.finish(transfer_id, work[0].first_token)
            except TandemError as error:
                healthy = False
                log.warning("handoff %s failed, its reader recomputes: %s", transfer_id, error.message)
            finally:
                if work is not None:
                    send, done = work
                    done([block for _, block in send.blocks])
            if work is None or work[0].last:
                del self._sends[transfer_id]
                return

    # ------------------------------------------------------------------------------------------------------ arriving
    def expect(self, sequence: Sequence) -> None:
        """A handoff whose sequence still waits for room: keep its hold alive meanwhile."""
        self._spawn(self._renew(sequence))

    async def _renew(self, sequence: Sequence) -> None:
        while sequence.state is State.WAITING and sequence.handoff is not None and time.monotonic() < sequence.deadline:
            try:
                await self._reader.hold(sequence.handoff, self._hold_ms)
            except TandemError as error:
                log.warning("handoff %s is lost, it will be recomputed: %s", sequence.id, error.message)
                return
            await asyncio.sleep(self._hold_ms / 3000)

    def receive(self, sequence: Sequence, done: Received) -> None:
        task = asyncio.create_task(self._receive(sequence, done))
        self._receives[sequence.id] = task
        task.add_done_callback(lambda _: self._receives.pop(sequence.id, None))

    def release(self, handoff: Handoff) -> None:
        """Nobody here will receive it."""
        self._spawn(self._quietly(self._reader.release(handoff)))

    def drop(self, sequence_id: str) -> None:
        if sequence_id in self._receives:
            self._receives[sequence_id].cancel()

    async def _receive(self, sequence: Sequence, done: Received) -> None:
        handoff, table = sequence.handoff, list(sequence.block_table)
        assert handoff is not None
        start = sequence.computed // self._runner.layout.tokens
        valid, first_token = start, None
        try:
            received = await self._reader.receive(
                handoff,
                start,
                len(sequence.tokens),
                lambda position: self._runner.block(table[position]),
                timeout_s=max(0.0, sequence.deadline - time.monotonic()),
            )
            valid, first_token = received.valid_blocks, received.first_token
            self.stats.bytes += received.bytes
            self.stats.seconds += received.seconds
            if received.error is not None:
                self.stats.failures += 1
                log.warning("handoff %s broke after %d blocks: %s", sequence.id, valid, received.error.message)
        finally:
            done(sequence, valid, first_token)

    async def _quietly(self, work: Coroutine[Any, Any, None]) -> None:
        """Tidying up that a store forgets about by itself when it cannot be told."""
        try:
            await work
        except TandemError as error:
            log.info("a handoff is left to its hold: %s", error.message)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
