"""What this router tells the controller: how many requests came, how large, how fast, and what waits.

The report is the router's registration in the membership, repeated twice a second, and at once when something waits and
there is no worker at all, because then nothing happens before the controller has read it. Counters are this process's;
rates are for the reader to make (`cluster/demand.py`). It reads nothing and decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque

from cluster.errors import TandemError
from cluster.membership import Membership
from cluster.messages import RouterInfo
from router.gate import Gate

REPORT_S = 0.5
WATCH_S = 0.05  # how soon "at once" is
LATELY_S = 10.0  # of deliveries that the mean times are of

log = logging.getLogger(__name__)


class _Mean:
    """Of what was observed in the last `LATELY_S`, in slices of a second, so that it costs the same at any rate."""

    def __init__(self) -> None:
        self._slices: deque[tuple[int, float, int]] = deque()  # (second, sum, count)

    def observe(self, value: float, count: int, now_s: float) -> None:
        """`value` is the sum of `count` observations."""
        second = int(now_s)
        if self._slices and self._slices[-1][0] == second:
            _, total, seen = self._slices.pop()
            value, count = value + total, count + seen
        self._slices.append((second, value, count))
        self._forget(now_s)

    def value(self, now_s: float) -> float:
        """0 when there was nothing."""
        self._forget(now_s)
        count = sum(seen for _, _, seen in self._slices)
        return sum(total for _, total, _ in self._slices) / count if count else 0.0

    def _forget(self, now_s: float) -> None:
        while self._slices and self._slices[0][0] < now_s - LATELY_S:
            self._slices.popleft()


class Tally:
    """Counts of one router's lifetime."""

    def __init__(self) -> None:
        self.requests = 0
        self.prompt_tokens = 0
        self.uncached_tokens = 0
        self.output_tokens = 0
        self._ttft_ms = _Mean()
        self._itl_ms = _Mean()

    def began(self, ttft_s: float, now_s: float) -> None:
        self._ttft_ms.observe(1000 * ttft_s, 1, now_s)

    def went_on(self, seconds: float, tokens: int, now_s: float) -> None:
        """So many tokens came that long after the ones before."""
        self._itl_ms.observe(1000 * seconds, tokens, now_s)

    def info(self, router_id: str, namespace: str, gate: Gate, now_s: float) -> RouterInfo:
        return RouterInfo(
            id=router_id,
            namespace=namespace,
            pid=os.getpid(),
            requests_total=self.requests,
            prompt_tokens_total=self.prompt_tokens,
            uncached_tokens_total=self.uncached_tokens,
            output_tokens_total=self.output_tokens,
            waiting=len(gate.queue),
            waiting_tokens=gate.queue.tokens,
            ttft_ms=self._ttft_ms.value(now_s),
            itl_ms=self._itl_ms.value(now_s),
        )


class Reporter:
    """Registers a router for as long as it runs."""

    def __init__(self, redis_url: str, namespace: str, router_id: str, tally: Tally, gate: Gate) -> None:
        self._membership = Membership(redis_url)
        self._namespace = namespace
        self._router_id = router_id
        self._tally = tally
        self._gate = gate
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._report_forever(), name="report")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        try:
            await self._membership.unregister(self._info())
        except TandemError as error:
            log.info("the registration of this router runs out by itself: %s", error.message)
        await self._membership.close()

    def _info(self) -> RouterInfo:
        return self._tally.info(self._router_id, self._namespace, self._gate, time.monotonic())

    async def _report_forever(self) -> None:
        reachable, needy = True, False
        while True:
            try:
                await self._membership.register(self._info())
                reachable = True
            except TandemError as error:
                if reachable:
                    log.warning("cannot report to the controller: %s", error.message)
                reachable = False
            needy = await self._until_next(needy)

    async def _until_next(self, needy: bool) -> bool:
        """Wait `REPORT_S`, or less when a worker has come to be needed since. Returns whether one is."""
        until = time.monotonic() + REPORT_S
        while time.monotonic() < until:
            await asyncio.sleep(WATCH_S)
            if self._gate.needs_a_worker and not needy:
                return True
        return self._gate.needs_a_worker
