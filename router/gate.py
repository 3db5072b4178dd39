"""Where requests wait: held here until a worker can take them, in the order of `router/fair_queue.py`.

    enter -> refused at the door
             waits -> its turn: a Pass -> placed -> computed, delivered, ... -> left
                   -> displaced, too late for its own deadline, its client gone, its time over

Decisions are `router/admission.py`'s; here are the clock, the futures and the counting. It looks whenever a worker's
report changes the fleet's table. What went through and is in no worker's figures yet counts as backlog as well. It
neither tokenizes nor places, and knows nothing of a request but its size.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Iterable, Sized
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from cluster.errors import DeadlineExceeded, Overloaded, TandemError, Unavailable
from router.admission import Limits, Outlook, Throughput, admit, alone_ms, hopeless, may_go, outlook, refusal, too_late
from router.expectations import ComputedShare
from router.fair_queue import OUTPUT_WEIGHT, FairQueue, Waiting
from router.metrics import Metrics
from router.table import FleetTable

POLL_S = 0.25  # it looks at least this often while something waits: a worker that hangs sends no report
PAUSE_S = 0.002  # and at most this often: a large fleet reports thousands of times a second
NOBODY_S = 2.0  # a worker that was lost comes back, or another in its stead
UNPLACED_S = 5.0  # a request that is not placed by then has ended before

log = logging.getLogger(__name__)


class Workers(Protocol):
    """What the gate sees of the fleet; `router.fleet.Fleet` is one."""

    table: FleetTable
    changed: asyncio.Event  # set whenever a worker has reported, come or gone; the gate clears it


@dataclass(frozen=True, slots=True)
class GateSettings:
    """`hold_for_start`: where there is no worker, requests wait for one, because then one is started."""

    limits: Limits
    max_sequences: int  # of one worker
    request_timeout_s: float
    hold_for_start: bool = False


@dataclass(frozen=True, slots=True)
class Entering:
    """A request at the door."""

    id: str
    tenant: str
    priority: int
    prompt_tokens: int  # as estimated: it is not tokenized yet
    sequences: int = 1  # prompts times choices
    ttft_s: float | None = None  # in which it asks for its first token


class Pass:
    """What a request has that had its turn."""

    def __init__(self, gate: Gate, item: Waiting, entering: Entering, now_s: float) -> None:
        self.item = item
        self.sequences = entering.sequences
        self._gate = gate
        self._estimate = entering.prompt_tokens
        self._decisions: tuple[Sized, ...] = ()
        self._expires_s = now_s + UNPLACED_S
        self._charged = item.tokens  # for prompts nobody has computed yet

    def watch(self, decisions: Iterable[Sized]) -> None:
        """One container per sequence, empty until it is placed."""
        self._decisions = tuple(decisions)

    def is_placed(self, now_s: float) -> bool:
        """Whether its jobs count at the workers. One that ended before it was placed is forgotten after a while."""
        return bool(self._decisions and all(map(len, self._decisions))) or now_s > self._expires_s

    def computed(self, tokens: int) -> None:
        """So many tokens of one more prompt were in no cache: its tenant pays for those instead of for the estimate."""
        self._charge(tokens - self._charged)
        self._gate.served(self._charged)
        self._charged = 0
        self._gate.learn(self._estimate, tokens * self.sequences)

    def failed(self) -> None:
        """It ended in an error before anything came of it: what its tenant was charged is given back."""
        self._charge(-self._charged)
        self._charged = 0

    def delivered(self, tokens: int) -> None:
        """Its tenant has got so many output tokens."""
        self._charge(OUTPUT_WEIGHT * tokens)

    def withdraw(self) -> None:
        """It has ended without being placed."""
        self._gate.withdrawn(self)

    def _charge(self, tokens: int) -> None:
        self._gate.queue.charge(self.item.tenant, tokens, self.item.priority)


@dataclass(frozen=True, slots=True)
class _Place:
    """A request in the queue."""

    item: Waiting
    entering: Entering
    alone_ms: float  # of one with a deadline: its prefill with nothing in front of it, as predicted when it came
    turn: asyncio.Future[Pass]


class Gate:
    """One queue in front of one fleet. Start, use and close it in the loop that serves."""

    def __init__(self, workers: Workers, settings: GateSettings, metrics: Metrics) -> None:
        self.queue = FairQueue()
        self._workers = workers
        self._settings = settings
        self._metrics = metrics
        self._throughput = Throughput()
        self._computed = ComputedShare()
        self._places: dict[str, _Place] = {}  # request id -> who waits
        self._through: dict[str, Pass] = {}  # request id -> who went, and is in no worker's figures yet
        self._something_waits = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        metrics.watch(self.queue)

    async def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="gate")

    async def close(self) -> None:
        """Whoever waits is told to come back."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for item in list(self.queue):
            self._give_up(item, Unavailable("this router is shutting down; retry"), "closed")

    @property
    def needs_a_worker(self) -> bool:
        """Something waits and there is no worker at all."""
        return bool(self.queue) and not len(self._workers.table)

    async def enter(self, entering: Entering) -> Pass:
        """Return when it is this request's turn; cancelling takes it out of the queue.

        Raises Overloaded when it may not wait, or not any more, Unavailable when there is no worker, and
        DeadlineExceeded when its turn has not come within the request timeout.
        """
        view = self._outlook()
        self._look(view)  # who came before goes before
        place = self._admitted(entering, view)
        item = place.item
        self._places[item.id] = place
        self.queue.push(item)
        self._something_waits.set()
        self._look(view)
        try:
            if not place.turn.done():
                async with asyncio.timeout(self._settings.request_timeout_s):
                    await place.turn
            passage = place.turn.result()
        except (TimeoutError, asyncio.CancelledError) as error:
            self._through.pop(item.id, None)  # its turn may have come in this very moment
            if isinstance(error, asyncio.CancelledError):
                raise
            self._metrics.refused("timeout")
            raise DeadlineExceeded("no worker could take the request within this server's request_timeout") from None
        finally:
            self.queue.remove(item.id)
            del self._places[item.id]
        self._metrics.waited(time.monotonic() - item.arrival_s)
        return passage

    def withdrawn(self, passage: Pass) -> None:
        self._through.pop(passage.item.id, None)

    def learn(self, estimated: int, computed: int) -> None:
        """What was taken for so many prompt tokens came to so many that were computed."""
        self._computed.observe(estimated, computed)

    def served(self, tokens: int) -> None:
        """A prompt that was taken for so many tokens has its first output."""
        self._throughput.served(tokens)

    def _admitted(self, entering: Entering, view: Outlook) -> _Place:
        """Its place, once those have left that make room for it."""
        now_s = time.monotonic()
        if math.isinf(view.backlog_ms) and not self._settings.hold_for_start:
            raise _nobody()
        tokens = self._computed.of(entering.prompt_tokens)
        deadline_s = None if entering.ttft_s is None else now_s + entering.ttft_s
        item = Waiting(entering.id, entering.tenant, entering.priority, tokens, now_s, deadline_s)
        alone = 0.0 if deadline_s is None else alone_ms(self._workers.table, tokens)
        try:
            displaced = admit(self.queue, item, self._settings.limits, view, alone, now_s, random.random())
        except Overloaded:
            self._metrics.refused("door")
            raise
        for other in displaced:
            self._give_up(other, refusal(self.queue, view, random.random()), "displaced")
        return _Place(item, entering, alone, asyncio.get_running_loop().create_future())

    def _outlook(self) -> Outlook:
        return outlook(self._workers.table, self._settings.max_sequences, self._throughput)

    async def _watch(self) -> None:
        while True:
            await self._something_waits.wait()
            self._workers.changed.clear()
            try:
                self._look(self._outlook())
            except Exception:  # a bug of ours must not leave everybody waiting until their time is over
                log.exception("the gate failed to look; it looks again")
            if not self.queue:
                self._something_waits.clear()
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._workers.changed.wait()
            await asyncio.sleep(PAUSE_S)

    def _look(self, view: Outlook) -> None:
        """Let through who may go now, and give up whom waiting cannot help any more."""
        if not self.queue:
            return
        now_s = time.monotonic()
        if math.isinf(view.backlog_ms) and not self._settings.hold_for_start:
            for item in list(self.queue):
                self._give_up(item, _nobody(), "nobody")
        for item in self.queue.with_deadline():
            alone = self._places[item.id].alone_ms
            if hopeless(item, view, alone, now_s):
                error = too_late(self.queue, item, view, view.backlog_ms + alone, random.random())
                self._give_up(item, error, "late")
        if math.isinf(view.backlog_ms):
            self._throughput.pause()
            return
        self._let_through(view, now_s)
        self._throughput.advance(now_s, bool(self.queue))

    def _let_through(self, view: Outlook, now_s: float) -> None:
        self._through = {name: passage for name, passage in self._through.items() if not passage.is_placed(now_s)}
        sequences = sum(passage.sequences for passage in self._through.values())
        tokens = sum(passage.item.tokens for passage in self._through.values())
        while (item := self.queue.peek()) is not None and may_go(view, sequences, tokens):
            place = self._places[item.id]
            if place.turn.done():  # its client left in this very moment
                self.queue.remove(item.id)
                continue
            self.queue.pop()
            passage = self._through[item.id] = Pass(self, item, place.entering, now_s)
            place.turn.set_result(passage)
            sequences, tokens = sequences + passage.sequences, tokens + item.tokens

    def _give_up(self, item: Waiting, error: TandemError, reason: str) -> None:
        self.queue.remove(item.id)
        turn = self._places[item.id].turn
        if not turn.done():
            turn.set_exception(error)
            self._metrics.refused(reason)


def _nobody() -> Unavailable:
    return Unavailable("no worker is connected that could serve this; retry, and see /status", retry_after_s=NOBODY_S)
