"""Rank 0's calls to the other shards of its worker: the same operation on all, and nothing left under way after it.

An operation copies blocks, and its memory may get another owner as soon as it has ended. So an operation that is given
up early is cancelled everywhere and still waited for. A shard that cannot be reached, or that does not answer in time,
may be copying, and nobody can know: then the worker ends as one, and its requests go elsewhere.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from cluster.errors import TandemError, WorkerLost
from cluster.rpc import Client
from cluster.shard_messages import CancelBlocks
from kvstore.copying import outlast

T = TypeVar("T")
log = logging.getLogger(__name__)


class Operation(Protocol):
    """A message of `cluster.shard_messages` that begins one."""

    @property
    def operation(self) -> int: ...


def end_process(reason: str) -> None:
    """Its shards end with it."""
    log.critical("%s; this worker ends and its requests go elsewhere", reason)
    os._exit(70)


class ShardPeers:
    """`addresses` maps rank - 1 to where that shard serves; `patience_s` is how much longer than it was given a shard
    may take. `fail` ends the worker; when it returns, which is for tests, the operation raises WorkerLost."""

    def __init__(
        self, addresses: Sequence[str], secret: str, patience_s: float, fail: Callable[[str], None] = end_process
    ) -> None:
        self._addresses = addresses
        self._secret = secret
        self._patience_s = patience_s
        self._fail = fail
        self._clients: dict[int, Client] = {}  # rank -> connection; made on the event loop
        self._operations = itertools.count(1)

    def number(self) -> int:
        """Of the next operation."""
        return next(self._operations)

    async def together(
        self, own: Coroutine[Any, Any, T], asked: Mapping[int, Operation], timeout_s: float = 0.0
    ) -> tuple[T, dict[int, Any]]:
        """Do `own` here while the shards `asked` (rank -> message) do theirs. Returns its result and theirs when all
        have ended. Raises what `own` raised, then, and WorkerLost."""
        mine = asyncio.create_task(own)
        theirs = {
            rank: asyncio.create_task(self._ask(rank, message, timeout_s + self._patience_s))
            for rank, message in asked.items()
        }
        tasks: list[asyncio.Task[Any]] = [mine, *theirs.values()]
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            mine.cancel()
            await self._end_early(asked, tasks)
            raise
        for error in [task.exception() for task in reversed(tasks)]:  # a shard that is lost is the worse news
            if error is not None:
                raise error
        return mine.result(), {rank: task.result() for rank, task in theirs.items()}

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()

    async def _ask(self, rank: int, message: Operation, timeout_s: float) -> Any:
        try:
            return await self._client(rank).call(type(message).__name__, message, timeout_s)
        except TandemError as error:  # what went wrong with a store is in the answer
            self._fail(f"shard {rank} of this worker is lost: {error.message}")
            raise WorkerLost(f"shard {rank} is lost: {error.message}") from None

    async def _end_early(self, asked: Mapping[int, Operation], tasks: Collection[asyncio.Task[Any]]) -> None:
        cancels = [asyncio.create_task(self._cancel(rank, message.operation)) for rank, message in asked.items()]
        loop = asyncio.get_running_loop()
        stalled = f"a copy that was cancelled did not end within {self._patience_s:.0f} s"
        late = loop.call_later(self._patience_s, self._fail, stalled)
        try:
            await outlast([*tasks, *cancels])
        finally:
            late.cancel()
        for task in tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                log.warning("a copy failed after it had been cancelled: %r", error)

    async def _cancel(self, rank: int, operation: int) -> None:
        try:
            await self._client(rank).call("CancelBlocks", CancelBlocks(operation), self._patience_s)
        except TandemError as error:  # then the operation does not answer either
            log.warning("shard %d cannot be told to end a copy: %s", rank, error.message)

    def _client(self, rank: int) -> Client:
        if rank not in self._clients:
            self._clients[rank] = Client(self._addresses[rank - 1], self._secret)
        return self._clients[rank]
