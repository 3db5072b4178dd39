"""A worker's place in the membership: taken when it starts, kept by saying so again, and given up before it ends.

A Redis that does not answer takes nothing from a worker that serves, and an entry that could not be removed there runs
out by itself.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import replace

from cluster.errors import Unavailable
from cluster.membership import Membership
from cluster.messages import Role, WorkerInfo

REGISTER_S = 2.0  # membership expires after five missed registrations
log = logging.getLogger(__name__)


class Registration:
    def __init__(self, redis_url: str, info: WorkerInfo) -> None:
        self.info = info
        self.withdrawn = False
        self._membership = Membership(redis_url)
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Be registered until `withdraw`, then see to it that the entry is gone."""
        while not self.withdrawn:
            try:
                await self._membership.register(self.info)
            except Unavailable as error:
                log.warning("not registered, serving on: %s", error.message)
            await self._pause()
        while not await self._unregister():
            await self._pause()

    def withdraw(self) -> None:
        """For good."""
        self.withdrawn = True
        self._changed.set()

    def set_role(self, role: Role) -> None:
        self.info = replace(self.info, role=role)
        self._changed.set()

    async def close(self) -> None:
        """After `run` has been cancelled."""
        await self._unregister()
        await self._membership.close()

    async def _pause(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(REGISTER_S):
                await self._changed.wait()
        self._changed.clear()

    async def _unregister(self) -> bool:
        try:
            await self._membership.unregister(self.info)
        except Unavailable:
            log.info("Redis is gone; the registration will expire by itself")
            return False
        return True
