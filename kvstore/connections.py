"""This process's connections to block stores: one per store, shared by all who copy.

Whoever asks says which start of the store it means (its epoch); another start is an error, never a silent substitute.
A store that restarts, and a mapped arena whose store is gone, are let go of. Addresses may come from an index that
lies: a handshake that fails costs its own time and nothing else, and `reputation` says whom to leave alone.
"""

from __future__ import annotations

import asyncio
import logging
import time

from cluster.errors import EpochMismatch, TandemError, Unavailable, WorkerLost
from kvstore.buffers import keep_buffers
from kvstore.client import StoreClient
from kvstore.layout import Layout
from kvstore.reputation import Reputation

log = logging.getLogger(__name__)


class Connections:
    """`force_inline` takes the path between machines even on one; `writable` is for who copies into reserved slabs."""

    def __init__(self, secret: str, layout: Layout, *, force_inline: bool = False, writable: bool = False) -> None:
        self.layout = layout
        self.reputation = Reputation()
        self._secret = secret
        self._force_inline = force_inline
        self._writable = writable
        self._clients: dict[str, StoreClient] = {}  # store address -> connection to its present start
        self._handshakes: dict[str, asyncio.Task[StoreClient]] = {}  # store address -> the one that is under way
        self._closed = False

    def known(self, address: str, epoch: int | None) -> StoreClient | None:
        """The connection there is to that start of the store (None: to whichever was met last)."""
        client = self._clients.get(address)
        if client is None or epoch not in (None, client.epoch) or (client.arena is not None and client.arena.removed):
            return None
        return client

    async def get(self, address: str, epoch: int | None) -> StoreClient:
        """That connection, made if need be. Raises EpochMismatch, LayoutMismatch, Unauthorized, Unavailable."""
        known = self.known(address, epoch)
        if known is not None:
            return known
        if self._closed:
            raise WorkerLost("this worker has closed its connections")
        if address not in self._handshakes:
            task = asyncio.create_task(self._handshake(address), name=f"handshake with {address}")
            self._handshakes[address] = task
            task.add_done_callback(lambda done: self._shaken(address, done))
        # shielded: others may wait for the same handshake
        client = await asyncio.shield(self._handshakes[address])
        if epoch not in (None, client.epoch):
            raise EpochMismatch("the store has restarted since this was handed out; recompute it")
        return client

    async def forget(self, client: StoreClient) -> None:
        """It is of no more use: the store behind its address is another start by now."""
        if self._clients.get(client.address) is client:
            del self._clients[client.address]
            await client.close()

    async def close(self) -> None:
        self._closed = True
        handshakes = list(self._handshakes.values())
        for task in handshakes:
            task.cancel()
        await asyncio.gather(*handshakes, return_exceptions=True)
        for client in self._clients.values():
            await client.close()
        self._clients.clear()

    async def _handshake(self, address: str) -> StoreClient:
        client = StoreClient(address, self._secret, "reader", self.layout)
        try:
            await client.connect(writable=self._writable, inline=self._force_inline)
        except BaseException:
            await client.close()
            raise
        if client.arena is None:
            keep_buffers()
        known = self._clients.get(address)
        if known is not None and known.epoch == client.epoch:  # who asked for another start was wrong
            await client.close()
            return known
        self._clients[address] = client
        await self._forget_the_dead(known)
        return client

    def _shaken(self, address: str, task: asyncio.Task[StoreClient]) -> None:
        del self._handshakes[address]
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Unavailable):
            self.reputation.failed(address, time.monotonic())
        if isinstance(error, TandemError):
            log.info("no connection to the store at %s: %s", address, error.message)

    async def _forget_the_dead(self, replaced: StoreClient | None) -> None:
        """A mapped arena takes memory even after its store is gone."""
        dead = [replaced] if replaced is not None else []
        for address, client in list(self._clients.items()):
            if client.arena is not None and client.arena.removed:
                dead.append(self._clients.pop(address))
        for client in dead:
            await client.close()
