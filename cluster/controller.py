"""The controller: sees what there is, asks the plan what to do, and has it done, twice a second, for as long as the
deployment lives.

    observe ─► DemandMeter ─► plan ─► act, on all at once ─► ControllerInfo for people

It knows neither Ray nor gRPC: a `Cluster` is its eyes and hands. It keeps nothing that cannot be seen again. What fails
is logged and left to the next plan. It serves no request and none waits for it: while it is blind or gone, everything
stays as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.demand import DemandMeter
from cluster.errors import TandemError
from cluster.logs import set_level
from cluster.messages import ControllerInfo, RouterInfo
from cluster.orders import NONE, Orders, carried_out
from cluster.plan import explain, plan
from cluster.pools import Action, ChangeRole, Member, Memory, Migrate, Spec, Start

TICK_S = 0.5
OBSERVE_S = 10.0
ACT_S = 10.0
STOP_S = 30.0
EVENTS = 32  # that are kept
RETRY_S = 10.0  # before the next start after one that failed
DAY_S = 86_400
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Observation:
    members: tuple[Member, ...]
    routers: tuple[RouterInfo, ...]
    failed: tuple[str, ...] = ()  # what did not start, in words, since the last observation
    ended: tuple[tuple[str, float], ...] = ()  # (worker that was stopped, seconds since it was told to drain)
    orders: Orders = NONE  # of operators


class Cluster(Protocol):
    """What a controller sees and does. Every method raises a TandemError when it cannot."""

    async def observe(self) -> Observation: ...

    async def act(self, action: Action) -> str:
        """Begin it. Returns what was done in words; empty: there was nothing to do."""
        ...

    async def withdraw(self, orders: Sequence[str]) -> None:
        """The orders of those names: they are carried out."""
        ...

    async def report(self, info: ControllerInfo) -> None: ...

    async def close(self) -> None: ...


class Controller:
    def __init__(self, cluster: Cluster, spec: Spec, namespace: str) -> None:
        self._cluster = cluster
        self._spec = spec
        self._meter = DemandMeter()
        self._memory = Memory()
        self._events: deque[str] = deque(maxlen=EVENTS)
        self._namespace = namespace
        self._moves = self._starts = self._stops = self._migrations = 0
        self._drain_s = 0.0
        self._no_start_before_s = 0.0
        self._trouble = ""  # what went wrong in the last round
        self._began = False  # whether a round has been gone through

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                await self._round()
                await asyncio.sleep(TICK_S)
        finally:
            await self._cluster.close()

    async def _round(self) -> None:
        trouble = ""
        try:
            await self.step(time.monotonic())
        except TimeoutError:
            trouble = "Ray or Redis does not answer"
        except TandemError as error:
            trouble = error.message
        except Exception as error:  # the outermost loop: a policy of the operator's own may raise anything
            trouble = f"{type(error).__name__}: {error}"
            if trouble != self._trouble:
                log.exception("the controller cannot go on")
        if trouble and trouble != self._trouble:
            log.warning("the controller leaves everything as it is: %s", trouble)
        self._trouble = trouble

    async def step(self, now_s: float) -> None:
        """One round. Raises TandemError or TimeoutError when it cannot see."""
        async with asyncio.timeout(OBSERVE_S):
            seen = await self._cluster.observe()
        self._hear(seen, now_s)
        set_level(seen.orders)  # of this process; the others follow by themselves
        orders = await self._open(seen)
        if seen.routers:  # no router, no word of what clients want: an index that has lost everything looks like this
            self._meter.observe(seen.routers, now_s)
            utc_s = time.time() % DAY_S
            actions, self._memory = plan(
                self._spec, seen.members, self._meter.demand(), self._memory, now_s, utc_s, orders
            )
            await self._act(actions, now_s)
        async with asyncio.timeout(OBSERVE_S):
            await self._cluster.report(self._report(seen.members))

    async def _open(self, seen: Observation) -> Orders:
        """The orders that there is something to do for. Those that are carried out are crossed out, and at the start
        those about workers of an earlier deployment."""
        over = carried_out(self._spec, seen.members, seen.orders) if self._began else seen.orders.once
        if over:
            async with asyncio.timeout(OBSERVE_S):
                await self._cluster.withdraw(over)
        orders, self._began = seen.orders if self._began else seen.orders.lasting, True
        return orders

    async def _act(self, actions: Sequence[Action], now_s: float) -> None:
        possible = [a for a in actions if not isinstance(a, Start) or now_s >= self._no_start_before_s]
        words = await asyncio.gather(*map(self._do, possible))
        done = [action for action, said in zip(possible, words, strict=True) if said]
        # a policy that fails has a reason, too, for doing nothing
        reason = explain(self._memory) if done or not actions else ""
        for said in filter(None, (reason, *words)):
            self._note(said)
        self._moves += any(isinstance(action, ChangeRole) for action in done)
        self._starts += sum(isinstance(action, Start) for action in done)
        self._migrations += sum(isinstance(action, Migrate) for action in done)

    async def _do(self, action: Action) -> str:
        """What was done, in words; empty when that made no difference, or failed."""
        try:
            async with asyncio.timeout(ACT_S):
                return await self._cluster.act(action)
        except (TandemError, TimeoutError) as error:
            self._note(f"{action} failed: {error or 'no answer in time'}")
            return ""

    def _hear(self, seen: Observation, now_s: float) -> None:
        for reason in seen.failed:
            self._no_start_before_s = now_s + RETRY_S
            self._note(f"did not start: {reason}")
        for worker_id, drain_s in seen.ended:
            self._stops += 1
            self._drain_s = drain_s
            self._note(f"{worker_id} is stopped, {drain_s:.1f} s after it was told to drain")

    def _note(self, words: str) -> None:
        log.info("%s", words)
        self._events.append(f"{time.strftime('%H:%M:%S', time.gmtime())} {words}")

    def _report(self, members: Sequence[Member]) -> ControllerInfo:
        return ControllerInfo(
            id="controller",
            namespace=self._namespace,
            pid=os.getpid(),
            moves_total=self._moves,
            starts_total=self._starts,
            stops_total=self._stops,
            migrations_total=self._migrations,
            starting=sum(member.state == "starting" for member in members),
            draining=sum(member.state == "draining" for member in members),
            last_drain_s=self._drain_s,
            events=tuple(self._events),
        )


@contextlib.contextmanager
def running(controller: Controller) -> Iterator[None]:
    """It works on a thread and an event loop of its own until the block is left."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(controller.run(), name="controller")

    def work() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()

    thread = threading.Thread(target=work, name="controller", daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(STOP_S)
