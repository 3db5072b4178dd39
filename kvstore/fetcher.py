"""Blocks of a chain, from the stores that are said to have them into a worker's KV cache.

    sources   [ own store, memory )[ own store, disk )[ another machine's store )     runs of the chain, consecutive
    result    what arrived in time and is good, as far as there is no hole

The stores are asked at once, each for its runs in order. A store that has died, restarted, lost or corrupted a block
costs the blocks from there on, and the caller computes those: a fetch never fails, it only brings less. This is the
seam for another engine of transfer: nothing else knows how the bytes of a run come here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from cluster.errors import Corrupt, DeadlineExceeded, EpochMismatch, TandemError, Unavailable
from cluster.store_messages import Fetch, Verify
from kvstore.arrival import Arrival, arrive
from kvstore.client import StoreClient
from kvstore.connections import Connections
from kvstore.copying import Block, outlast
from kvstore.part import Part

STREAMS = 2  # per run from another machine, each on a channel of its own
Path = Literal["memory", "disk", "remote"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """A run [start, stop) of a chain's blocks that one start of one store says it has."""

    store: str  # address
    epoch: int
    start: int
    stop: int
    path: Path  # memory and disk: on this machine


@dataclass(frozen=True, slots=True)
class Fetched:
    """What arrived. `error` says why it is less than everything."""

    valid_blocks: int  # good blocks from the beginning of the table, those before the first source's start included
    parts: tuple[tuple[Source, int, float], ...]  # per source tried, by the path it took: blocks that came, seconds
    error: TandemError | None


class _Run:
    """One source while it is fetched; block b of it comes on stream b % streams."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.streams: list[tuple[range, Arrival]] = []  # places in the chain, what came of them; empty: not begun
        self.seconds = 0.0
        self.error: TandemError | None = None
        self._began = 0.0

    def begin(self, client: StoreClient, part: Part, write_block: Callable[[int], Block]) -> None:
        """Divide it into streams: one where only slab numbers travel."""
        mapped = client.arena is not None
        if not mapped or self.source.path == "remote":  # who named the source could not know
            self.source = dataclasses.replace(self.source, path="memory" if mapped else "remote")
        places = range(self.source.start, self.source.stop)
        count = 1 if mapped else min(STREAMS, len(places))
        for first in range(count):
            own = places[first::count]
            arrival = Arrival(part, len(own) * part.layout.tokens, 0, partial(_nth, write_block, own))
            self.streams.append((own, arrival))
        self._began = time.monotonic()

    def end(self) -> None:
        if self.streams:
            self.seconds = time.monotonic() - self._began

    @property
    def blocks(self) -> int:
        """Good blocks from its beginning: up to the first that one of the streams misses."""
        step = len(self.streams)
        missing = [first + step * arrival.position for first, (_, arrival) in enumerate(self.streams)]
        return min([self.source.stop - self.source.start, *missing]) if missing else 0


def _nth(write_block: Callable[[int], Block], places: range, n: int) -> Block:
    return write_block(places[n])


class BlockFetcher:
    """`part`: the one of every block that is fetched; None: all of it."""

    def __init__(self, connections: Connections, part: Part | None = None) -> None:
        self._connections = connections
        self._part = part or Part(connections.layout)
        self._reports: set[asyncio.Task[None]] = set()

    async def fetch(
        self,
        sources: Sequence[Source],
        hashes: Sequence[bytes],
        write_block: Callable[[int], Block],
        timeout_s: float,
    ) -> Fetched:
        """Fill the blocks of the sources; `hashes` is the whole chain. `write_block(index in the chain)` gives the
        memory [part.own.block_bytes] to fill, from a thread; nothing is written to it once this has returned or been
        cancelled."""
        assert all(a.stop == b.start for a, b in itertools.pairwise(sources)), "sources must be consecutive"
        runs = [_Run(source) for source in sources]
        tasks: list[asyncio.Task[None]] = []
        last: dict[str, asyncio.Task[None]] = {}  # store -> its run before this one
        for run in runs:
            work = self._run(run, last.get(run.source.store), hashes, write_block, timeout_s)
            last[run.source.store] = asyncio.create_task(work)
            tasks.append(last[run.source.store])
        late: TandemError | None = None
        try:
            async with asyncio.timeout(timeout_s):
                for run, task in zip(runs, tasks, strict=True):
                    await asyncio.wait([task])
                    task.result()  # raises what is a bug of ours
                    if run.error is not None:  # what comes after a hole is of no use
                        break
        except TimeoutError:
            late = DeadlineExceeded(f"not everything was fetched within {timeout_s:.2f} s")
        finally:
            for task in tasks:
                task.cancel()
            await outlast(tasks)
        return self._result(runs, late)

    async def close(self) -> None:
        """Wait for what stores are still being told. The connections are their owner's to close."""
        if self._reports:
            await asyncio.wait(self._reports)

    async def _run(
        self,
        run: _Run,
        before: asyncio.Task[None] | None,
        hashes: Sequence[bytes],
        write_block: Callable[[int], Block],
        timeout_s: float,
    ) -> None:
        """Fetch one source, after the one before it of the same store. What the store does wrong ends up in the run."""
        if before is not None:
            await asyncio.wait([before])
        try:
            client = await self._client(run.source)
            run.begin(client, self._part, write_block)
            await self._streams(run, client, hashes, timeout_s)
        except TandemError as error:
            run.error = error
        finally:
            run.end()

    async def _client(self, source: Source) -> StoreClient:
        if self._connections.reputation.avoided(source.store, time.monotonic()):
            raise Unavailable(
                f"the store at {source.store} is left alone for a while: it did not answer, or sent rubbish"
            )
        return await self._connections.get(source.store, source.epoch)

    async def _streams(self, run: _Run, client: StoreClient, hashes: Sequence[bytes], timeout_s: float) -> None:
        """Raises the first error of its streams once all have ended."""
        inline = client.arena is None
        tasks = []
        for channel, (positions, arrival) in enumerate(run.streams):
            names = tuple(hashes[position] for position in positions)
            fetch = Fetch(names, run.source.epoch, inline, self._part.wire)
            tasks.append(asyncio.create_task(arrive(client, fetch, arrival, timeout_s, channel)))
        try:
            await asyncio.wait(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await outlast(tasks)
        errors = [task.exception() for task in tasks]
        for (positions, arrival), error in zip(run.streams, errors, strict=True):
            if isinstance(error, Corrupt):
                self._report(client, hashes[positions[arrival.position]])
            if isinstance(error, EpochMismatch):
                await self._connections.forget(client)
        for error in errors:
            if error is not None:
                raise error

    def _report(self, client: StoreClient, name: bytes) -> None:
        """Tell the owner of a block that its bytes came wrong, in the background."""
        self._connections.reputation.corrupt(client.address, time.monotonic())
        log.warning("a block from the store at %s does not match its checksums", client.address)
        task = asyncio.create_task(_verify(client, name))
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    def _result(self, runs: Sequence[_Run], late: TandemError | None) -> Fetched:
        valid = runs[0].source.start if runs else 0
        error: TandemError | None = None
        for run in runs:
            valid += run.blocks
            if run.source.start + run.blocks < run.source.stop:
                error = run.error or late
                break
        for store in _silent(runs, late):
            self._connections.reputation.failed(store, time.monotonic())
        return Fetched(valid, tuple((run.source, run.blocks, run.seconds) for run in runs if run.streams), error)


def _silent(runs: Sequence[_Run], late: TandemError | None) -> set[str]:
    """Stores that let a deadline pass without a single block. A disk may be slow while the store is well."""
    late_runs = [run for run in runs if isinstance(run.error or late, DeadlineExceeded) and run.source.path != "disk"]
    return {run.source.store for run in late_runs} - {run.source.store for run in runs if run.blocks}


async def _verify(client: StoreClient, name: bytes) -> None:
    try:
        await client.call("Verify", Verify((name,)))
    except TandemError as error:
        log.info("the store at %s could not be told: %s", client.address, error.message)
