"""`/dashboard`: a page for people, and the data it shows, which `tandem top` shows in a terminal.

The page is one file without a build step or any request to elsewhere. Once a second this router notes what it knows
(`router/history.py`), so that the charts reach back ten minutes; the page asks for what is new since. With several
replicas of the router, page and data are of the replica that answers. The data tells of all tenants' load, so where
there are API keys it needs the operator's; the page itself holds nothing and is open. Nothing here changes anything.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
import time
from collections import deque
from pathlib import Path
from typing import Annotated

import orjson
from fastapi import APIRouter, Depends, Query
from starlette.responses import Response

from cluster.config import Config
from cluster.messages import ControllerInfo
from router.dashboard_data import Minute, Seen, WorkerNow, data, sample_of
from router.events import EventLog, State
from router.fair_queue import FairQueue
from router.fleet import Fleet
from router.flows import Flows
from router.history import History
from router.kv import operators_only
from router.metrics import Metrics
from router.outputs import WorkerLink
from router.watch import Watch

SAMPLE_S = 1.0
MINUTE = 60  # samples
PAGE = Path(__file__).with_name("dashboard.html")

log = logging.getLogger(__name__)


class Dashboard:
    """What one router has seen lately. Start, use and close it in the loop that serves."""

    def __init__(
        self, fleet: Fleet, watch: Watch, queue: FairQueue, metrics: Metrics, config: Config, names: tuple[str, str]
    ) -> None:
        """`names`: of the router and of the model."""
        self._fleet = fleet
        self._watch = watch
        self._queue = queue
        self._metrics = metrics
        self._slo_ms = 1000 * config.ttft_slo, 1000 * config.itl_slo
        self._router_id, self._model = names
        self._history = History()
        self._flows = Flows()
        self._events = EventLog()
        self._outcomes: deque[dict[str, int]] = deque(maxlen=MINUTE + 1)  # counters, one dict a second
        self._minute = Minute()
        self._controller: ControllerInfo | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._sample_forever(), name="dashboard")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def answer(self, sample: int, request: int) -> bytes:
        """The data as JSON, with what history and requests came after those numbers."""
        ended = [one for one in self._watch.ended if one.number > request]
        return orjson.dumps(data(self._seen(), self._history.after(sample), ended))

    def _seen(self) -> Seen:
        return Seen(
            router=self._router_id,
            model=self._model,
            redis=self._fleet.redis_reachable,
            ttft_slo_ms=self._slo_ms[0],
            itl_slo_ms=self._slo_ms[1],
            workers=self._workers(),
            controller=self._controller,
            queue_requests=len(self._queue),
            queue_tokens=self._queue.tokens,
            minute=self._minute,
            flow=self._flows.total(),
            events=self._events.latest(),
            now_s=time.monotonic(),
        )

    async def _sample_forever(self) -> None:
        next_s = time.monotonic()
        while True:
            try:
                await self._sample()
            except Exception:  # a bug of ours costs the charts a second, and no request anything
                log.exception("the dashboard missed a sample")
            next_s = max(next_s + SAMPLE_S, time.monotonic())
            await asyncio.sleep(next_s - time.monotonic())

    async def _sample(self) -> None:
        redis = self._fleet.redis_reachable
        self._controller = await self._fleet.controller() if redis else None
        now_s, links = time.monotonic(), self._fleet.links()
        self._flows.observe(
            [(link.info.id, link.info.incarnation, link.load) for link in links if link.load is not None], now_s
        )
        clock = time.strftime("%H:%M:%S", time.gmtime())  # as the controller's lines have it, for people
        if self._controller is not None:
            self._events.hear(self._controller.events)
        self._events.look({worker.id: worker.state for worker in self._workers()}, redis, clock)
        self._minute = self._last_minute(now_s)
        self._history.add(sample_of(self._seen()))

    def _workers(self) -> tuple[WorkerNow, ...]:
        return tuple(
            WorkerNow(
                link.info.id,
                link.role,
                self._state(link),
                link.info.node,
                link.load,
                link.rates,
                self._flows.of(link.info.id),
            )
            for link in sorted(self._fleet.links(), key=lambda link: link.info.id)
        )

    def _state(self, link: WorkerLink) -> State:
        if not link.alive:
            return "lost"
        return "draining" if self._fleet.table.row(link.info.id) is None else "serving"

    def _last_minute(self, now_s: float) -> Minute:
        self._outcomes.append(self._metrics.outcomes())
        first, last = self._outcomes[0], self._outcomes[-1]
        watch = self._watch
        (ended, kept), (_, prompt), (_, cached) = (
            part.sums(now_s) for part in (watch.kept, watch.prompt_tokens, watch.cached_tokens)
        )
        return Minute(
            ttft_ms=watch.ttft_ms.percentiles(now_s),
            itl_ms=watch.itl_ms.percentiles(now_s),
            slo_kept=kept / ended if ended else None,
            hit_ratio=cached / prompt if prompt else None,
            outcomes={name: count - first.get(name, 0) for name, count in last.items() if count > first.get(name, 0)},
            seconds=len(self._outcomes) - 1,
        )


def routes(dashboard: Dashboard, config: Config) -> APIRouter:
    """The routes, bound to one dashboard."""
    router = APIRouter(tags=["operations"])
    html = PAGE.read_text(encoding="utf-8")
    policy = _policy(html)
    if config.operator_key:  # the page asks for it rather than to be refused
        html = html.replace('data-operator-key="open"', 'data-operator-key="needed"')

    @router.get("/dashboard", include_in_schema=False)
    async def page() -> Response:
        """The page."""
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return Response(html, headers=headers | {"Referrer-Policy": "no-referrer"}, media_type="text/html")

    @router.get("/dashboard/data", dependencies=[Depends(operators_only(config))])
    async def latest(sample: Annotated[int, Query(ge=0)] = 0, request: Annotated[int, Query(ge=0)] = 0) -> Response:
        """What the dashboard shows; of history and requests what came after those numbers."""
        headers = {"Cache-Control": "no-store"}
        return Response(dashboard.answer(sample, request), headers=headers, media_type="application/json")

    return router


def _policy(html: str) -> str:
    """A Content-Security-Policy that lets exactly this page's own style and script run, and ask only this server."""

    def source(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; style-src {source('style')}; script-src {source('script')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
