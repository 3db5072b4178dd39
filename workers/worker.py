"""A worker: one engine on a thread of its own, and the asyncio side that feeds it and acts on what it returns.

    gRPC Submit/Abort ──► inbox ──► engine thread: apply events, step ──► act (event loop): StepOutput frames to
                            ▲                                               │ routers, blocks to and from stores
                            └── sent / received / fetched / ... ◄── tasks ◄─┘

One way round, no callbacks into the engine. A router's output stream is its lease on its jobs: when it breaks, they
are aborted. An engine that raises is a bug: the process ends, Ray starts a new one and routers re-place the requests.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster.config import Config
from cluster.errors import InvalidRequest, Overloaded, TandemError, Unavailable
from cluster.identity import Identity
from cluster.membership import Membership
from cluster.messages import (
    Abort,
    Accepted,
    Ack,
    DecodeJob,
    Handoff,
    JobFailed,
    Load,
    Outputs,
    PrefillJob,
    Refused,
    Role,
    SetRole,
    StepOutput,
    Submit,
    TokenOutput,
    WorkerInfo,
)
from cluster.rpc import Server
from kvstore.hashing import ModelKey, extend
from workers.engine import Engine
from workers.runner import Runner
from workers.sequence import Sequence
from workers.step import Step
from workers.stored_blocks import StoredBlocks
from workers.transfers import Transfers

HEARTBEAT_S = 1.0  # an idle output stream says so this often
REGISTER_S = 2.0  # membership expires after five missed registrations
IDLE_S = 0.2  # an idle engine looks at deadlines this often
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
    """`approximate`: how blocks are in the stores of approximate KV; None where there are none, and all KV is exact.
    `shard_pids`: the processes of all its ranks, where there are others than this one."""

    def __init__(
        self,
        runner: Runner,
        settings: WorkerSettings,
        approximate: StoredBlocks | None = None,
        shard_pids: tuple[int, ...] = (),
    ) -> None:
        config = settings.config
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
        )
        self._vocab_size = runner.vocab_size
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._routers: dict[str, tuple[str, asyncio.Queue[StepOutput]]] = {}  # router id -> (stream key, frames)
        self._streams = 0
        self._accepting: set[str] = set()  # ids being accepted; an abort that overtakes the acceptance removes them
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._membership = Membership(settings.identity.redis_url)
        self._transfers = Transfers(settings.id, self._engine, settings.identity, config, self._post, approximate)
        self._load = self._engine.load(self._role)
        self._tasks: list[asyncio.Task[None]] = []
        self._server = Server(
            settings.identity.secret,
            {"Submit": self._submit, "Abort": self._abort, "SetRole": self._set_role},
            {"Outputs": self._outputs},
        )

    async def start(self) -> WorkerInfo:
        """Serve and register. Returns how others reach this worker."""
        self._loop = asyncio.get_running_loop()
        address = await self._server.start(self._settings.identity.host)
        self._info = WorkerInfo(
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
        )
        self._thread.start()
        work = [self._register(), *self._transfers.work(self._info.node)]
        self._tasks = [asyncio.create_task(coroutine) for coroutine in work]
        for task in self._tasks:
            task.add_done_callback(_must_not_fail)
        return self._info

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
        try:
            await self._membership.unregister(self._info)
        except Unavailable:
            log.info("Redis is gone; the registration will expire by itself")
        await self._membership.close()

    # ---------------------------------------------------------------------------------------------- engine thread
    def _post(self, event: Callable[[], None]) -> None:
        self._inbox.put(event)

    def _run(self) -> None:
        try:
            computed = 0
            while not self._stopping.is_set():
                self._apply(wait=computed == 0)
                step = self._engine.step(time.monotonic())
                computed = step.computed
                load = self._transfers.counters.fill(self._engine.load(self._role))
                self._loop.call_soon_threadsafe(self._act, step, load)
        except Exception:  # the actor's outermost loop: crash, be restarted
            log.exception("the engine failed; this worker ends and its requests go elsewhere")
            os._exit(70)

    def _apply(self, wait: bool) -> None:
        try:
            event = self._inbox.get(timeout=IDLE_S) if wait else self._inbox.get_nowait()
            while True:
                event()
                event = self._inbox.get_nowait()
        except queue.Empty:
            return

    # -------------------------------------------------------------------------------------------------- event loop
    def _act(self, step: Step, load: Load) -> None:
        self._load = load
        frames: dict[str, list[TokenOutput | JobFailed]] = {}
        for key, output in step.outputs:
            frames.setdefault(key, []).append(output)
        for key, frame_queue in self._routers.values():
            if outputs := frames.get(key):
                frame_queue.put_nowait(StepOutput(tuple(outputs), load))
        self._transfers.act(step)

    # -------------------------------------------------------------------------------------------------------- calls
    async def _submit(self, message: Submit, _: Any) -> Accepted | Refused:
        try:
            return Accepted(await self._accept(message))
        except TandemError as error:
            return Refused(error.code, error.message, int(1000 * (error.retry_after_s or 0)))

    async def _accept(self, message: Submit) -> Handoff | None:
        if message.router_id not in self._routers:
            raise Unavailable("open the output stream before submitting")
        if self._load.waiting >= self._settings.config.max_queue:
            raise Overloaded(f"{self._load.waiting} requests are waiting for this worker", retry_after_s=1.0)
        generation = message.job.generation
        exact = generation.exact or self._all_exact
        sequence = Sequence(
            generation,
            router_id=self._routers[message.router_id][0],
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
            connected = sequence.router_id in (key for key, _ in self._routers.values())
            still_wanted = connected and sequence.id in self._accepting
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
        return Ack()

    async def _outputs(self, message: Outputs, context: Any) -> AsyncIterator[StepOutput]:
        self._streams += 1
        key = f"{message.router_id}#{self._streams}"
        frames: asyncio.Queue[StepOutput] = asyncio.Queue()
        self._routers[message.router_id] = (key, frames)
        # not `finally`: it would not run before garbage collection when the stream breaks while a frame is sent
        context.add_done_callback(lambda _: self._router_left(message.router_id, key))
        frame = StepOutput((), self._load)  # at once: a router counts a worker as connected from its first frame
        while True:
            yield frame
            try:
                frame = await asyncio.wait_for(frames.get(), HEARTBEAT_S)
            except TimeoutError:
                frame = StepOutput((), self._load)

    def _router_left(self, router_id: str, key: str) -> None:
        if self._routers.get(router_id, ("",))[0] == key:
            del self._routers[router_id]
        self._post(partial(self._abort_stream, key))

    def _abort_stream(self, key: str) -> None:
        self._engine.abort([s.id for s in self._engine.sequences.values() if s.router_id == key])

    # --------------------------------------------------------------------------------------------------- membership
    async def _register(self) -> None:
        while True:
            try:
                await self._membership.register(self._info)
            except Unavailable as error:
                log.warning("not registered, serving on: %s", error.message)
            await asyncio.sleep(REGISTER_S)


def _must_not_fail(task: asyncio.Task[None]) -> None:
    """Without one of its background tasks a worker would go on and lose blocks, or its place in the cluster."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s failed; this worker ends and its requests go elsewhere", task.get_name(), exc_info=error)
        os._exit(70)
