"""A connection to one start of one block store: the handshake, the mapped arena and the calls.

It does not reconnect. A store that restarts has another epoch and has lost its blocks, so whoever used it makes a new
client; until then every call says so with an error of its own class.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

from cluster.errors import StoreError, WorkerLost
from cluster.rpc import Client
from cluster.store_messages import Hello, Welcome
from kvstore.arena import Arena, machine_id
from kvstore.hashing import vectors_digest
from kvstore.layout import Layout

CALL_S = 5.0
log = logging.getLogger(__name__)


class StoreClient:
    """Make one, then `connect`. Methods raise the store's StoreErrors, and Unavailable when it cannot be reached."""

    def __init__(self, address: str, secret: str, client_id: str, layout: Layout) -> None:
        self.address = address
        # unique per connection: what the store keeps for an earlier one of the same process is not this one's
        self.client_id = f"{client_id}-{secrets.token_hex(4)}"
        self.layout = layout
        self.epoch = 0
        self.arena: Arena | None = None  # set when the store's memory is mapped here
        self._secret = secret
        self._rpcs = [Client(address, secret)]  # channel -> connection, the further ones made when first used
        self._closed = False

    async def connect(self, *, writable: bool = False, inline: bool = False) -> None:
        """Shake hands, and map the arena if the store is on this machine (unless `inline`). Raises LayoutMismatch."""
        hello = Hello(self.client_id, self.layout.fingerprint, vectors_digest())
        welcome: Welcome = await self.call("Hello", hello)
        self.epoch = welcome.epoch
        if inline or welcome.machine != machine_id():
            return
        try:
            self.arena = Arena.attach(Path(welcome.arena), self.layout, welcome.epoch, writable=writable)
        except (OSError, StoreError) as error:
            # the same kernel but another container: the path means nothing, or something else, here
            log.info("the arena of the store at %s cannot be mapped: %s", self.address, error)

    async def call(self, method: str, message: Any, timeout_s: float = CALL_S) -> Any:
        with self._open():
            return await self._rpcs[0].call(method, message, timeout_s)

    async def stream(
        self, method: str, message: Any, timeout_s: float | None, channel: int = 0
    ) -> AsyncGenerator[Any, None]:
        """Streams on different channels do not wait for each other's bytes."""
        while len(self._rpcs) <= channel:
            self._rpcs.append(Client(self.address, self._secret, own_connection=True))
        with self._open():
            # leaving early cancels the call at once
            async with contextlib.aclosing(self._rpcs[channel].stream(method, message, timeout_s)) as items:
                async for item in items:
                    yield item

    async def close(self) -> None:
        """Calls that are under way fail with WorkerLost."""
        self._closed = True
        for rpc in self._rpcs:
            await rpc.close()
        if self.arena is not None:
            self.arena.close()
            self.arena = None

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """gRPC cancels whoever waits on a channel that is closed; to us that is a failed call, not a cancelled task."""
        lost = WorkerLost(f"the connection to the store at {self.address} is closed")
        if self._closed:
            raise lost
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise lost from None
            raise
