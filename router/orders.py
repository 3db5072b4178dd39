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
    namespace = settings.namespace

    def there() -> list[Serving]:
        links = [fleet.link(worker.id) for worker in fleet.snapshot()]
        return [Serving(link.info.id, link.role, link.info.tp * link.info.pp) for link in links]

    def kept() -> OrderBook:
        if book is None:
            raise Unavailable("this router has no Redis, so nothing can be ordered; give the deployment one")
        return book

    async def opened() -> tuple[OrderBook, Orders]:
        """Raises Unavailable when nobody would carry an order out."""
        if await fleet.controller() is None:
            raise Unavailable("no controller answers, so nothing can be ordered; is `tandem serve` still running?")
        return kept(), await kept().read(namespace)

    async def given(book: OrderBook, *wanted: Order, without: tuple[str, ...] = ()) -> Response:
        await book.withdraw(namespace, without)
        for order in wanted:
            await book.give(namespace, order)
        return _json(await book.read(namespace))

    @router.get("")
    async def read() -> Response:
        """What is ordered: drains and restarts until they are done, the others until they are withdrawn."""
        return _json(await kept().read(namespace))

    @router.post("/drain")
    async def drain(body: DrainBody) -> Response:
        """That worker finishes what it has and is stopped; it is done when it is no longer in the answer of GET."""
        book, now = await opened()
        return await given(book, order_rules.drain(body.worker, there(), now))

    @router.post("/roles")
    async def roles(body: RolesBody) -> Response:
        """Keep a split, or single workers' roles, whatever the traffic; or leave both to the traffic again."""
        book, now = await opened()
        if (body.prefill is not None and body.decode is not None) + bool(body.workers) + body.auto != 1:
            raise InvalidRequest("give prefill and decode, or workers, or auto")
        if body.auto:
            return await given(book, without=now.role_names)
        if body.prefill is not None and body.decode is not None:
            order = order_rules.split(body.prefill, body.decode, there(), config)
            return await given(book, order, without=now.role_names)
        return await given(book, *order_rules.roles(body.workers or {}, there(), now, config), without=(SPLIT,))

    @router.post("/scale")
    async def scale(body: ScaleBody) -> Response:
        """Other bounds of size than the configuration's; or its own again."""
        book, _ = await opened()
        if body.auto:
            return await given(book, without=(SCALE,))
        if body.least is None or body.most is None:
            raise InvalidRequest("give least and most, or auto")
        return await given(book, order_rules.scale(body.least, body.most, config))

    @router.post("/restart")
    async def restart(body: RestartBody) -> Response:
        """Replace workers one after the other; done when it is no longer in the answer of GET."""
        book, now = await opened()
        if body.cancel:
            return await given(book, without=(RESTART,))
        return await given(book, order_rules.restart(body.workers, there(), now))

    @router.post("/log")
    async def log(body: LogBody) -> Response:
        """Log from that level on, in every process, within seconds."""
        book, _ = await opened()
        return await given(book, LogOrder(body.level))

    return router


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
