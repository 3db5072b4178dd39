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
from typing import Any

from cluster import telemetry
from cluster.errors import StoreError, TandemError
from cluster.messages import Handoff
from cluster.store_messages import BlockKey
from cluster.telemetry import INVALID_SPAN, Span
from kvstore.connections import Connections
from kvstore.reader import HandoffReader
from kvstore.writer import HandoffWriter
from workers.block_mover import BlockMover
from workers.counters import Counters
from workers.node_store import NodeStore
from workers.sequence import Sequence, State
from workers.step import Send
from workers.tasks import outcome

HOLD_MS = 30_000  # how long an unclaimed handoff keeps its blocks
Sent = Callable[[list[int]], None]  # takes back the ids of blocks that nobody copies from any more
Received = Callable[[Sequence, int, int | None], None]  # sequence, good blocks from the start, first token
log = logging.getLogger(__name__)


class Handoffs:
    """Writes to `store`; asks stores over `connections`, which are their owner's to close. `idle` is set while no block
    is being written that somebody waits for."""

    def __init__(
        self,
        mover: BlockMover,
        store: NodeStore,
        connections: Connections,
        idle: asyncio.Event,
        counters: Counters,
    ) -> None:
        self._mover = mover
        self._store = store
        self._reader = HandoffReader(connections)
        self._counters = counters
        self._sends: dict[str, asyncio.Queue[tuple[Send, Sent] | None]] = {}  # transfer id -> work left; None: revoke
        self._abandoned: set[str] = set()  # of these transfers, those that nobody will follow
        self._unsent = 0  # sends that wait in there or are under way
        self._idle = idle
        self._receives: dict[str, asyncio.Task[tuple[int, int | None]]] = {}  # sequence id -> task
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        tasks: list[asyncio.Task[Any]] = [*self._tasks, *self._receives.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._reader.close()

    # ------------------------------------------------------------------------------------------------------- leaving
    async def reserve(self, sequence: Sequence) -> Handoff:
        """Room in this node's store for all of the sequence's KV. Raises StoreError when there is none."""
        writer = self._store.writer
        if writer is None:
            raise StoreError("this worker has no block store yet")
        size, tokens = self._mover.layout.tokens, len(sequence.tokens)
        # approximate KV has no name here: it is for this reader only, and whoever wants exact KV must never find it
        keys = sequence.keys(0, tokens // size, size) if sequence.exact else [BlockKey(b"", size)] * (tokens // size)
        tenant = sequence.generation.tenant
        try:
            with telemetry.span("handoff reserve", sequence.span, {"tandem.store": self._store.address}):
                handoff = await writer.reserve(sequence.transfer_id, keys, tokens, HOLD_MS, tenant)
        except asyncio.CancelledError:  # the store may have reserved all the same
            self._spawn(self._quietly(writer.revoke(sequence.transfer_id, "the router gave up")))
            raise
        self._sends[sequence.transfer_id] = asyncio.Queue()
        self._spawn(self._drain(sequence.transfer_id, writer, sequence.span))
        return handoff

    def send(self, send: Send, done: Sent) -> None:
        """Copy and seal, in the order of the calls; `done` gets the blocks back."""
        self._unsent += 1
        self._idle.clear()
        self._sends[send.transfer_id].put_nowait((send, done))

    def revoke(self, transfer_id: str) -> None:
        """The prefill will not finish."""
        if transfer_id in self._sends:
            self._sends[transfer_id].put_nowait(None)

    def abandon(self, ids: Iterable[str]) -> None:
        """Of these jobs, those that were prefills and are done need not be kept for anybody."""
        for transfer_id in ids:
            if transfer_id in self._sends:  # the engine may be done with it already: then it is not going to revoke it
                self._abandoned.add(transfer_id)
            elif (writer := self._store.writer) is not None:
                self._spawn(self._quietly(writer.revoke(transfer_id, "the request has ended")))

    async def _drain(self, transfer_id: str, writer: HandoffWriter, parent: Span) -> None:
        """Everything one transfer sends, in order; after a failure blocks are only let go of."""
        span: Span = INVALID_SPAN
        healthy, blocks, failure = True, 0, ""
        while True:
            work = await self._sends[transfer_id].get()
            span = span if span.is_recording() else telemetry.start("handoff write", parent)
            blocks += len(work[0].blocks) if work else 0
            try:
                if work is None:
                    failure = failure or "revoked"
                    await writer.revoke(transfer_id, "the prefill was aborted")
                elif healthy:
                    await writer.send(transfer_id, work[0].blocks)
                    if work[0].last:
                        await writer.finish(transfer_id, work[0].first_token)
            except TandemError as error:
                healthy, failure = False, error.code
                log.warning("handoff %s failed, its reader recomputes: %s", transfer_id, error.message)
            finally:
                if work is not None:
                    self._let_go(*work)
            if work is None or work[0].last:
                telemetry.end(span, {"tandem.blocks": blocks}, failure)
                del self._sends[transfer_id]
                if transfer_id in self._abandoned:
                    self._abandoned.discard(transfer_id)
                    await self._quietly(writer.revoke(transfer_id, "the request has ended"))
                return

    def _let_go(self, send: Send, done: Sent) -> None:
        done([block for _, block in send.blocks])
        self._unsent -= 1
        if self._unsent == 0:
            self._idle.set()

    # ------------------------------------------------------------------------------------------------------ arriving
    def expect(self, sequence: Sequence) -> None:
        """A handoff whose sequence still waits for room: keep its hold alive meanwhile."""
        self._spawn(self._renew(sequence))

    async def _renew(self, sequence: Sequence) -> None:
        while sequence.state is State.WAITING and sequence.handoff is not None and time.monotonic() < sequence.deadline:
            try:
                await self._reader.hold(sequence.handoff, HOLD_MS)
            except TandemError as error:
                log.warning("handoff %s is lost, it will be recomputed: %s", sequence.id, error.message)
                return
            await asyncio.sleep(HOLD_MS / 3000)

    def receive(self, sequence: Sequence, done: Received) -> None:
        start = sequence.computed // self._mover.layout.tokens
        task = asyncio.create_task(self._receive(sequence, start))
        self._receives[sequence.id] = task

        def ended(_: asyncio.Task[tuple[int, int | None]]) -> None:
            del self._receives[sequence.id]
            done(sequence, *outcome(task, (start, None)))

        task.add_done_callback(ended)

    def release(self, handoff: Handoff) -> None:
        """Nobody here will receive it."""
        self._spawn(self._quietly(self._reader.release(handoff)))

    def drop(self, sequence_id: str) -> None:
        if sequence_id in self._receives:
            self._receives[sequence_id].cancel()

    async def _receive(self, sequence: Sequence, start: int) -> tuple[int, int | None]:
        """Good blocks from the beginning of the table, first token."""
        handoff, table = sequence.handoff, list(sequence.block_table)
        assert handoff is not None
        timeout_s = max(0.0, sequence.deadline - time.monotonic())
        with telemetry.span("handoff follow", sequence.span, {"tandem.store": handoff.store}) as span:
            try:
                received = await self._mover.follow(handoff, start, len(sequence.tokens), table, timeout_s)
            finally:
                self._reader.release_later(handoff)
            about = {"tandem.bytes": received.bytes, "tandem.blocks": received.valid_blocks - start}
            telemetry.end(span, about, received.error.code if received.error else "")
        self._counters.handoffs_total += 1
        self._counters.handoff_bytes_total += received.bytes
        self._counters.handoff_seconds_total += received.seconds
        if received.error is not None:
            self._counters.handoff_failures_total += 1
            valid, why = received.valid_blocks, received.error.message
            log.warning("handoff %s broke after %d blocks: %s", sequence.id, valid, why)
        return received.valid_blocks, received.first_token

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
