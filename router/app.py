"""The HTTP application: routes, their order of checks, and what lives as long as the process.

    client -> request id -> API key -> body limit -> route: validate -> admit -> tokenize -> Choices -> JSON or SSE

Served by uvicorn directly or hosted by a Ray Serve deployment (`deploy/`); it knows neither. It keeps no request:
that is `router/choices.py`, and it decides nothing about errors: that is `router/http_errors.py`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from cluster import telemetry
from cluster.config import Config
from cluster.membership import Membership
from cluster.messages import FinishReason
from cluster.order_book import OrderBook
from kvstore.mirror import Mirror
from kvstore.prefix_map import PrefixMap
from router import http_errors, tracing
from router.choices import Choices
from router.dashboard import Dashboard
from router.dashboard import routes as dashboard_routes
from router.explain import explained, explanation
from router.fleet import Fleet, Members
from router.json_route import JsonRoute
from router.kv import kv
from router.kv_selection import Chains
from router.metrics import Metrics
from router.middleware import ApiKeys, BodyLimit, RequestId
from router.openai import ChatRequest, CompletionRequest, GenerationRequest
from router.operations import operations
from router.orders import orders
from router.placement import Decision
from router.responses import DONE, ChatFormat, CompletionFormat, Format, Head, Whole
from router.service import Caller, Service
from router.settings import RouterSettings
from router.streaming import ClientLeft, EventStream, until_client_leaves

BODY_LIMIT = 16 * 2**20  # bytes
CLIENT_CLOSED_REQUEST = 499  # nobody reads it, but access logs show it


def create_app(config: Config, settings: RouterSettings, members: Members | None = None) -> FastAPI:
    """The router's application. `members` tells who has registered; by default the Redis of `settings` does.

    Connections to workers live from the application's start-up to its shutdown (ASGI lifespan). Raises ModelError when
    the model directory has no usable tokenizer.
    """
    metrics = Metrics()
    metrics.promise(config)
    router_id = f"router-{uuid.uuid4().hex[:12]}"
    members = members or Membership(settings.redis_url)
    secret, stores = settings.cluster_secret, settings.store_namespaces
    prefix_map = PrefixMap()  # what the workers' streams and the stores' index tell
    mirror = Mirror(settings.redis_url, settings.namespace, prefix_map) if settings.redis_url else None
    fleet = Fleet(
        members,
        settings.namespace,
        router_id,
        secret,
        config.worker_timeout,
        stores,
        model_key=settings.model_key,
        prefix_map=prefix_map,
        store_owners=mirror.stores if mirror is not None else tuple,
        policy=config.placement,
    )
    service = Service(config, settings, fleet, metrics, router_id)
    book = OrderBook(settings.redis_url) if settings.redis_url else None
    names = router_id, settings.served_model_name
    dashboard = Dashboard(fleet, service.watch, service.queue, metrics, config, names)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await fleet.start()
        if mirror is not None:
            await mirror.start()
        await service.start()
        await dashboard.start()
        try:
            yield
        finally:
            await dashboard.close()
            await service.close()
            await fleet.close()
            if mirror is not None:
                await mirror.close()
            if book is not None:
                await book.close()
            await asyncio.to_thread(telemetry.close)

    app = FastAPI(title="Tandem", lifespan=lifespan, redoc_url=None)
    app.router.route_class = JsonRoute
    http_errors.install(app, metrics)
    if telemetry.wanted():
        app.add_middleware(tracing.Tracing)
    app.add_middleware(BodyLimit, limit=BODY_LIMIT)  # the last added sees a request first
    app.add_middleware(ApiKeys, keys=config.api_keys, operator_key=config.operator_key)
    app.add_middleware(RequestId)
    app.include_router(operations(fleet, metrics, settings, router_id, mirror))
    app.include_router(dashboard_routes(dashboard, config))
    app.include_router(kv(fleet, Chains(config, settings, service.text), config, mirror))
    app.include_router(orders(fleet, config, settings, book))
    _add_generation(app, service, metrics, settings.served_model_name)
    return app


def _add_generation(app: FastAPI, service: Service, metrics: Metrics, model: str) -> None:
    responses: dict[int | str, dict[str, Any]] = {
        200: {"content": {"application/json": {}, "text/event-stream": {}}},
        "4XX": {"description": "The request is wrong, or must wait"},
        "5XX": {"description": "The server could not serve it"},
    }

    @app.post("/v1/chat/completions", tags=["generation"], responses=responses)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """OpenAI's chat completions."""
        choices = service.chat(body, _caller(request))
        return await _answer(body, request, choices, metrics, ChatFormat(_head("chatcmpl", model)))

    @app.post("/v1/completions", tags=["generation"], responses=responses)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """OpenAI's completions."""
        choices = service.completion(body, _caller(request))
        return await _answer(body, request, choices, metrics, CompletionFormat(_head("cmpl", model)))


def _caller(request: Request) -> Caller:
    """Raises Forbidden when the request asks for what is not for whoever sent it."""
    explained(request)
    state = request.state
    return Caller(state.tenant, state.operator, state.request_id, tracing.of(request))


def _head(prefix: str, model: str) -> Head:
    return Head(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model)


async def _answer(
    body: GenerationRequest, request: Request, choices: Awaitable[Choices], metrics: Metrics, form: Format
) -> Response:
    """`choices` are there when it is the request's turn; the client may leave before, and is then out of the queue."""
    headers = {"x-ignored-fields": body.ignored_fields} if body.ignored_fields else {}
    try:
        if body.stream:
            made = await until_client_leaves(request.receive, choices)
            late = partial(explanation, made.decisions()) if explained(request) else dict
            return EventStream(_frames(made, form, body.include_usage, metrics), headers, late)
        whole, decisions = await until_client_leaves(request.receive, _whole(choices, form))
    except ClientLeft:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if explained(request):
        headers |= explanation(decisions)
    return Response(whole, headers=headers, media_type="application/json")


async def _whole(awaited: Awaitable[Choices], form: Format) -> tuple[bytes, list[Decision]]:
    """The body, and where it came from."""
    choices = await awaited
    texts: dict[int, str] = {}  # choice -> text so far
    tokens: dict[int, list[int]] = {}
    finishes: dict[int, FinishReason | None] = {}
    async with choices:
        async for piece in choices:
            texts[piece.index] = texts.get(piece.index, "") + piece.text
            tokens.setdefault(piece.index, []).extend(piece.tokens)
            finishes[piece.index] = piece.finish
    wanted = sorted(texts)
    bodies = [Whole(texts[i], finishes[i], tokens[i] if choices.token_ids else None) for i in wanted]
    return form.whole(bodies, choices.usage()), choices.decisions()


async def _frames(choices: Choices, form: Format, include_usage: bool, metrics: Metrics) -> AsyncGenerator[bytes, None]:
    """One frame per piece, sent when it comes; the first thing of each choice is its opening."""
    opened: set[int] = set()
    try:
        async with choices:
            async for piece in choices:
                index, frame = piece.index, b""
                if index not in opened:
                    opened.add(index)
                    frame += form.opening(index)
                if piece.text or choices.token_ids:
                    frame += form.text(index, piece.text, piece.tokens if choices.token_ids else None)
                if piece.finish:
                    frame += form.finish(index, piece.finish)
                yield frame
    except Exception as error:
        if opened:  # the status is out already, so no error handler will count this
            metrics.ended(http_errors.code(error))
        raise
    yield form.usage(choices.usage()) + DONE if include_usage else DONE
