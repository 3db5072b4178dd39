"""The routes by which operators change a running deployment: drain, roles, size, restart, log level.

A route checks an order, writes it into Redis and returns; the controller carries it out at its next ticks. What is
ordered and not yet done is the answer of `GET /orders`. Once there are keys these routes need the operator's, in the
header that other routes know it by (`x-tandem-operator-key`). They start and stop nothing themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import orjson
import pydantic
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from cluster.config import Config
from cluster.errors import Forbidden, InvalidRequest, Unauthorized, Unavailable
from cluster.order_book import OrderBook
from cluster.orders import LOG, RESTART, SCALE, SPLIT, Level, LogOrder, Order, Orders
from router import order_rules
from router.fleet import Fleet
from router.json_route import JsonRoute
from router.middleware import OPERATOR_HEADER, Bearer
from router.order_rules import Serving
from router.settings import RouterSettings


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class DrainBody(_Body):
    worker: str


class RolesBody(_Body):
    """One of: a split, roles of single workers, auto."""

    prefill: int | None = None
    decode: int | None = None
    workers: dict[str, Literal["prefill", "decode"]] | None = None
    auto: bool = False


class ScaleBody(_Body):
    """Shards of all workers together; or auto."""

    least: int | None = None
    most: int | None = None
    auto: bool = False


class RestartBody(_Body):
    """Empty: all workers. `cancel`: those that have not been drained yet stay as they are."""

    workers: list[str] = []
    cancel: bool = False


class LogBody(_Body):
    level: Level


def orders(fleet: Fleet, config: Config, settings: RouterSettings, book: OrderBook | None) -> APIRouter:
    """The routes, bound to one fleet. Without a Redis (`book`) they answer 503."""
    router = APIRouter(
        prefix="/orders", tags=["orders"], route_class=JsonRoute, dependencies=[Depends(_operators_only(config))]
    )
    desk = _Desk(fleet, config, settings.namespace, book)

    @router.get("")
    async def read() -> Response:
        """What is ordered: drains and restarts until they are done, the others until they are withdrawn."""
        return _json(await desk.ordered())

    @router.post("/drain")
    async def drain(body: DrainBody) -> Response:
        """That worker finishes what it has and is stopped; it is done when it is no longer in the answer of GET."""
        now = await desk.opened()
        return await desk.take(order_rules.drain(body.worker, desk.there(), now))

    @router.post("/roles")
    async def roles(body: RolesBody) -> Response:
        """Keep a split, or single workers' roles, whatever the traffic; or leave both to the traffic again."""
        return await desk.roles(body)

    @router.post("/scale")
    async def scale(body: ScaleBody) -> Response:
        """Other bounds of size than the configuration's; or its own again."""
        await desk.opened()
        if body.auto:
            return await desk.take(without=(SCALE,))
        if body.least is None or body.most is None:
            raise InvalidRequest("give least and most, or auto")
        return await desk.take(order_rules.scale(body.least, body.most, config))

    @router.post("/restart")
    async def restart(body: RestartBody) -> Response:
        """Replace workers one after the other; done when it is no longer in the answer of GET."""
        now = await desk.opened()
        if body.cancel:
            return await desk.take(without=(RESTART,))
        return await desk.take(order_rules.restart(body.workers, desk.there(), now))

    @router.post("/log")
    async def log(body: LogBody) -> Response:
        """Log from that level on, in every process, within seconds."""
        await desk.opened()
        return await desk.take(LogOrder(body.level))

    return router


class _Desk:
    """Where orders are taken: what is there to judge them by, and where they go."""

    def __init__(self, fleet: Fleet, config: Config, namespace: str, book: OrderBook | None) -> None:
        self._fleet = fleet
        self._config = config
        self._namespace = namespace
        self._book = book

    def there(self) -> list[Serving]:
        links = [self._fleet.link(worker.id) for worker in self._fleet.snapshot()]
        return [Serving(link.info.id, link.role, link.info.tp * link.info.pp) for link in links]

    async def ordered(self) -> Orders:
        """Raises Unavailable when that cannot be known."""
        return await self._kept().read(self._namespace)

    async def opened(self) -> Orders:
        """What is ordered already. Raises Unavailable when nobody would carry an order out."""
        if await self._fleet.controller() is None:
            raise Unavailable("no controller answers, so nothing can be ordered; is `tandem serve` still running?")
        return await self.ordered()

    async def take(self, *wanted: Order, without: tuple[str, ...] = ()) -> Response:
        """Give these orders and withdraw those of these names; answers with all that hold then."""
        return _json(await self._kept().change(self._namespace, wanted, without))

    async def roles(self, body: RolesBody) -> Response:
        now = await self.opened()
        if (body.prefill is not None and body.decode is not None) + bool(body.workers) + body.auto != 1:
            raise InvalidRequest("give prefill and decode, or workers, or auto")
        if body.auto:
            return await self.take(without=now.role_names)
        if body.prefill is not None and body.decode is not None:
            order = order_rules.split(body.prefill, body.decode, self.there(), self._config)
            return await self.take(order, without=now.role_names)
        kept = order_rules.roles(body.workers or {}, self.there(), now, self._config)
        return await self.take(*kept, without=(SPLIT,))

    def _kept(self) -> OrderBook:
        if self._book is None:
            raise Unavailable("this router has no Redis, so nothing can be ordered; give the deployment one")
        return self._book


def _json(now: Orders) -> Response:
    body: dict[str, Any] = {
        "drain": sorted(now.drain),
        "roles": dict(now.roles),
        SPLIT: now.split and {"prefill": now.split.prefill, "decode": now.split.decode},
        SCALE: now.scale and {"least": now.scale.least, "most": now.scale.most},
        RESTART: now.restart and {"workers": list(now.restart.workers), "shards": now.restart.shards},
        LOG: now.log and now.log.level,
    }
    return Response(orjson.dumps(body), media_type="application/json")


def _operators_only(config: Config) -> Callable[[Request], None]:
    operators = Bearer([config.operator_key] if config.operator_key else [])

    def check(request: Request) -> None:
        """Raises Forbidden when no key could open this, Unauthorized when another one would."""
        if not config.operator_key and not config.api_keys:
            return
        if not config.operator_key:
            raise Forbidden("this server has tenants and no operator key; start it with TANDEM_OPERATOR_KEY set")
        if operators.match(f"Bearer {request.headers.get(OPERATOR_HEADER, '')}") is None:
            raise Unauthorized(f"send the operator key as {OPERATOR_HEADER}")

    return check
