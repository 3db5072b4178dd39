"""The routers connected to a worker, and the frames that each of them gets.

    at once            outputs, and the pages of a snapshot of the cache
    within QUIET_S     changes of the cache, and of what the load says about room; both go with outputs if there are any
    every RATES_S      what steps and fetches take, and how the node's GPUs are; a sign of life every HEARTBEAT_S

A frame is made when its router is ready for it and says everything since the one before, so a router that reads slowly
gets fewer. A stream is its router's lease on its jobs: `left` is told the key of each that ends. Runs on the event
loop, and decides nothing about jobs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cluster.messages import Gpu, JobFailed, Load, Outputs, Rates, StepOutput, TokenOutput
from workers.cache_changes import CacheChanges
from workers.step import Step

HEARTBEAT_S = 1.0
QUIET_S = 0.1  # between frames without outputs: a router has hundreds of workers to listen to
RATES_S = 1.0


@dataclass(slots=True)
class _Stream:
    key: str
    changes: CacheChanges
    outputs: list[TokenOutput | JobFailed] = field(default_factory=list)  # of the steps since the last frame
    woken: asyncio.Event = field(default_factory=asyncio.Event)  # something has to be said sooner than was thought
    news: bool = False  # there is more to say than that the worker lives
    room: tuple[object, ...] = ()  # what the last frame said of it
    told_at: float = 0.0  # when that was
    rates_at: float = float("-inf")


class Streams:
    """`limit`: names that may wait for a router. `want_names` asks for a `Step` with `names`, some day."""

    def __init__(self, load: Load, limit: int, want_names: Callable[[], None], left: Callable[[str], None]) -> None:
        self.load = load  # the newest
        self.rates: Rates | None = None
        self._gpus: tuple[Gpu, ...] = ()
        self._limit = limit
        self._want_names = want_names
        self._left = left
        self._streams: dict[str, _Stream] = {}  # router id -> its newest stream
        self._opened = 0

    def see_gpus(self, gpus: tuple[Gpu, ...]) -> None:
        """These are the node's now."""
        self._gpus = gpus

    def key(self, router_id: str) -> str | None:
        """What its jobs are known by; another one whenever it connects. None: it is not connected."""
        stream = self._streams.get(router_id)
        return stream.key if stream else None

    def connected(self, key: str) -> bool:
        return any(stream.key == key for stream in self._streams.values())

    def act(self, step: Step, load: Load, rates: Rates | None = None) -> None:
        """Tell the routers what came of a step."""
        self.load = load
        self.rates = rates or self.rates
        room = _room(load)
        streams = {stream.key: stream for stream in self._streams.values()}
        for key, output in step.outputs:
            if key in streams:
                streams[key].outputs.append(output)
        for stream in streams.values():
            stream.changes.add(step.cache)
            if step.names is not None and stream.changes.lost:
                stream.changes.restart(step.names)
            if not stream.news and (stream.changes or stream.room != room):
                stream.news = True
                stream.woken.set()
            elif stream.outputs or stream.changes.urgent:
                stream.woken.set()

    async def outputs(self, message: Outputs, context: Any) -> AsyncIterator[StepOutput]:
        """The handler of `Outputs`: the first frame comes at once, for with it a router counts itself as connected."""
        self._opened += 1
        stream = _Stream(f"{message.router_id}#{self._opened}", CacheChanges(self._limit))
        self._streams[message.router_id] = stream
        # not `finally`: it would not run before garbage collection when the stream breaks while a frame is sent
        context.add_done_callback(lambda _: self._closed(message.router_id, stream))
        while True:
            yield self._frame(stream)
            await self._due(stream)

    def _frame(self, stream: _Stream) -> StepOutput:
        if stream.changes.lost:
            self._want_names()  # now that it reads
        now = time.monotonic()
        rates = self.rates if now - stream.rates_at >= RATES_S else None
        stream.rates_at = now if rates else stream.rates_at
        outputs, stream.outputs = tuple(stream.outputs), []
        cache = stream.changes.take()
        stream.told_at, stream.room, stream.news = now, _room(self.load), bool(stream.changes)
        return StepOutput(outputs, self.load, rates, cache, self._gpus if rates else ())

    async def _due(self, stream: _Stream) -> None:
        """Until the next frame is to be sent."""
        while not (stream.outputs or stream.changes.urgent):
            left_s = stream.told_at + (QUIET_S if stream.news else HEARTBEAT_S) - time.monotonic()
            if left_s <= 0:
                return
            stream.woken.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await stream.woken.wait()

    def _closed(self, router_id: str, stream: _Stream) -> None:
        if self._streams.get(router_id) is stream:
            del self._streams[router_id]
        self._left(stream.key)


def _room(load: Load) -> tuple[object, ...]:
    """What of a worker's load routers have to know soon, so that not all of them send it their next request."""
    return (load.role, load.running, load.waiting, load.waiting_tokens, load.blocks_free)
