"""A worker: one engine on a thread of its own, and the asyncio side that feeds it and acts on what it returns.

    gRPC Submit/Abort ──► inbox ──► engine thread: apply events, step ──► act (event loop): StepOutput frames to
                            ▲                                               │ routers, blocks to and from stores
                            └── sent / received / fetched / ... ◄── tasks ◄─┘

One way round, no callbacks into the engine. A router's output stream (`streams.py`) is its lease on its jobs: when it
breaks, they are aborted. An engine that raises is a bug: the process ends, Ray starts a new one and routers re-place
the requests. A worker that drains finishes what it has, unless it is told to give that up as well.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cluster.config import Config
from cluster.errors import InvalidRequest, Leaving, Overloaded, TandemError, Unavailable
from cluster.identity import Identity
from cluster.messages import (
    Abort,
    Accepted,
    Ack,
    DecodeJob,
    Drain,
    Handoff,
    Migrate,
    PrefillJob,
    Rates,
    Refused,
    Role,
    SetRole,
    Submit,
    WorkerInfo,
)
from cluster.rpc import Server
from kvstore.hashing import ModelKey, extend
from workers import gpus
from workers.cache_changes import PAGE
from workers.engine import Engine
from workers.registration import Registration
from workers.runner import Runner
from workers.sequence import Sequence
from workers.stored_blocks import StoredBlocks
from workers.streams import RATES_S, Streams
from workers.transfers import Transfers

IDLE_S = 0.2  # an idle engine looks at deadlines this often
MOVE_S = 2.0  # how long requests that are given up go on here at most, until the store has their blocks
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker is told at birth."""

    id: str
    role: Role
    key: ModelKey
    max_context: int
    identity: Identity
    config: Config


class Worker:
    """`approximate`: how blocks are in the stores of approximate KV; None where all KV is of one kind.
    `shard_pids`: the processes of all its ranks, where there are others than this one.
    `began`: when this process did, on its monotonic clock; how long starting takes is counted from there."""

    def __init__(
        self,
        runner: Runner,
        settings: WorkerSettings,
        approximate: StoredBlocks | None = None,
        shard_pids: tuple[int, ...] = (),
        began: float | None = None,
        prior: Rates | None = None,  # of the engine's performance model
    ) -> None:
        config = settings.config
        self._began = time.monotonic() if began is None else began
        self._settings = settings
        self._grid, self._shard_pids = (runner.shard.tp, runner.shard.pp), shard_pids or (os.getpid(),)
        self._keys = {True: settings.key, False: settings.key.approximate}  # sequence is exact -> root of its names
        self._all_exact = approximate is None
        self._role = settings.role
        self._engine = Engine(
            runner,
            token_budget=config.token_budget,
            max_sequences=config.max_sequences,
            max_context=settings.max_context,
            stored=approximate.layout if approximate else None,
            prior=prior,
        )
        self._vocab_size = runner.vocab_size
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._names_wanted = False
        self._accepting: set[str] = set()  # ids being accepted; an abort that overtakes the acceptance removes them
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._transfers = Transfers(settings.id, self._engine, settings.identity, config, self._post, approximate)
        self._streams = Streams(
            self._engine.load(self._role),
            max(PAGE, 2 * runner.num_blocks),
            partial(self._post, self._want_names),
            lambda key: self._post(partial(self._abort_stream, key)),
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._server = Server(
            settings.identity.secret,
            {
                "Submit": self._submit,
                "Abort": self._abort,
                "SetRole": self._set_role,
                "Drain": self._drain,
                "Migrate": self._migrate,
            },
            {"Outputs": self._streams.outputs},
        )

    async def start(self) -> WorkerInfo:
        """Serve and register. Returns how others reach this worker."""
        self._loop = asyncio.get_running_loop()
        address = await self._server.start(self._settings.identity.host)
        self._started_s = time.monotonic() - self._began
        info = WorkerInfo(
            id=self._settings.id,
            address=address,
            node=socket.gethostname(),
            pid=os.getpid(),
            role=self._role,
            namespace=self._settings.identity.namespace,
            incarnation=time.time_ns(),
            max_context=self._settings.max_context,
            block_size=self._settings.config.block_size,
            tp=self._grid[0],
            pp=self._grid[1],
            shard_pids=self._shard_pids,
            block_bytes=self._engine.runner.layout.block_bytes,
            started_s=self._started_s,
        )
        self._registration = Registration(self._settings.identity.redis_url, info)
        self._streams.rates = self._rates()
        self._thread.start()
        work = [self._registration.run(), gpus.watch(self._streams.see_gpus), *self._transfers.work(info.node)]
        self._tasks = [asyncio.create_task(coroutine) for coroutine in work]
        for task in self._tasks:
            task.add_done_callback(_must_not_fail)
        return info

    async def stop(self) -> None:
        """Stop serving; whoever still waits for tokens sees the stream end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.stop()
        self._stopping.set()
        self._post(lambda: None)
        await asyncio.to_thread(self._thread.join, 10.0)
        await self._transfers.close()
        await self._registration.close()

    # ---------------------------------------------------------------------------------------------- engine thread
    def _post(self, event: Callable[[], None]) -> None:
        self._inbox.put(event)

    def _run(self) -> None:
        try:
            computed, rates_at, ended = 0, time.monotonic(), time.monotonic()
            while not self._stopping.is_set():
                self._apply(wait=computed == 0)
                now = time.monotonic()
                names, self._names_wanted = self._names_wanted, False
                step = self._engine.step(now, names)
                idle, computed = computed == 0, step.computed
                ended = self._count_time(ended, now, idle)
                load = self._transfers.counters.fill(self._engine.load(self._role))
                rates = self._rates() if now - rates_at >= RATES_S else None
                rates_at = now if rates else rates_at
                self._loop.call_soon_threadsafe(self._streams.act, step, load, rates)
                self._loop.call_soon_threadsafe(self._transfers.act, step, now)
        except Exception:  # the actor's outermost loop: crash, be restarted
            log.exception("the engine failed; this worker ends and its requests go elsewhere")
            os._exit(70)

    def _count_time(self, began: float, stepped: float, idle: bool) -> float:
        """A turn of the engine's thread has ended, whose step began at `stepped`. Returns when the next one begins."""
        now, counters = time.monotonic(), self._engine.counters
        counters.idle_seconds_total += stepped - began if idle else 0.0
        counters.busy_seconds_total += now - (stepped if idle else began)
        return now

    def _apply(self, wait: bool) -> None:
        try:
            event = self._inbox.get(timeout=IDLE_S) if wait else self._inbox.get_nowait()
            while True:
                event()
                event = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _want_names(self) -> None:
        self._names_wanted = True

    def _abort_stream(self, key: str) -> None:
        self._engine.abort([s.id for s in self._engine.sequences.values() if s.router_id == key])

    def _rates(self) -> Rates:
        return replace(self._engine.model.rates(), start_s=self._started_s)

    # -------------------------------------------------------------------------------------------------------- calls
    async def _submit(self, message: Submit, _: Any) -> Accepted | Refused:
        try:
            return Accepted(await self._accept(message))
        except TandemError as error:
            return Refused(error.code, error.message, int(1000 * (error.retry_after_s or 0)))

    async def _accept(self, message: Submit) -> Handoff | None:
        if self._registration.withdrawn:
            raise Leaving("this worker is about to leave and no other is there yet; try again in a moment")
        key, waiting = self._streams.key(message.router_id), self._streams.load.waiting
        if key is None:
            raise Unavailable("open the output stream before submitting")
        if waiting >= self._settings.config.max_queue:
            raise Overloaded(f"{waiting} requests are waiting for this worker", retry_after_s=1.0)
        generation = message.job.generation
        exact = generation.exact or self._all_exact
        sequence = Sequence(
            generation,
            router_id=key,
            root=self._keys[exact].root(generation.salt),
            deadline=time.monotonic() + generation.deadline_ms / 1000,
            exact=exact,
        )
        if not 0 < len(sequence.tokens) < self._settings.max_context:
            raise InvalidRequest(f"{len(sequence.tokens)} tokens do not fit a context of {self._settings.max_context}")
        if min(sequence.tokens) < 0 or max(sequence.tokens) >= self._vocab_size:
            raise InvalidRequest(f"token ids must be within 0 and {self._vocab_size - 1}")
        extend(sequence.hashes, sequence.root, sequence.tokens, self._settings.config.block_size)
        handoff = None
        with self._transfers.traces.accepting(sequence, message.job):
            match message.job:
                case PrefillJob():
                    handoff = await self._reserve(sequence)
                case DecodeJob(handoff=source) if source is not None:
                    sequence.handoff = source
                    self._transfers.handoffs.expect(sequence)
            if sequence.handoff is None:
                self._transfers.locate(sequence)
            self._post(partial(self._engine.add, sequence))
        return handoff

    async def _reserve(self, sequence: Sequence) -> Handoff:
        """Room for a prefill's blocks. Whoever asked may leave meanwhile, by abort or by a broken stream."""
        sequence.transfer_id = sequence.id
        self._accepting.add(sequence.id)
        try:
            handoff = await self._transfers.handoffs.reserve(sequence)
            still_wanted = self._streams.connected(sequence.router_id) and sequence.id in self._accepting
        finally:
            self._accepting.discard(sequence.id)
        if not still_wanted:
            self._transfers.handoffs.revoke(sequence.transfer_id)
            raise Unavailable("aborted before it was accepted")
        return handoff

    async def _abort(self, message: Abort, _: Any) -> Ack:
        self._accepting.difference_update(message.ids)
        self._transfers.handoffs.abandon(message.ids)
        self._post(partial(self._engine.abort, list(message.ids)))
        return Ack()

    async def _set_role(self, message: SetRole, _: Any) -> Ack:
        self._role = message.role
        self._registration.set_role(message.role)
        self._post(lambda: None)  # an idle engine says so too
        return Ack()

    async def _drain(self, _: Drain, __: Any) -> Ack:
        self._registration.withdraw()
        return Ack()

    async def _migrate(self, _: Migrate, __: Any) -> Ack:
        self._post(partial(self._engine.migrate, time.monotonic() + MOVE_S))
        return Ack()


def _must_not_fail(task: asyncio.Task[None]) -> None:
    """Without one of its background tasks a worker would go on and lose blocks, or its place in the cluster."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s failed; this worker ends and its requests go elsewhere", task.get_name(), exc_info=error)
        os._exit(70)
