"""What operators and load balancers ask: is it alive, is it ready, who is there, how is it doing.

Liveness and readiness are apart on purpose: a router without workers is alive (restarting it would not help) and not
ready. None of these routes needs an API key except those under /v1, and none of them changes anything.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import orjson
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import Response

from cluster.errors import Unavailable, UnknownModel
from cluster.messages import StoreInfo
from cluster.store_messages import StoreStat
from kvstore.mirror import Mirror
from router.fleet import Fleet
from router.http_errors import response
from router.metrics import Metrics
from router.outputs import WorkerLink
from router.scrape import scrape
from router.settings import RouterSettings


def operations(
    fleet: Fleet, metrics: Metrics, settings: RouterSettings, router_id: str, mirror: Mirror | None
) -> APIRouter:
    """The routes, bound to one fleet and, where there is a Redis, this router's copy of the index."""
    router = APIRouter(tags=["operations"])
    model = {
        "id": settings.served_model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "tandem",
        "root": settings.served_model_name,
        "parent": None,
        "max_model_len": settings.max_context,
    }

    @router.get("/v1/models")
    async def list_models() -> Response:
        """The one model, as a list."""
        return _json({"object": "list", "data": [model]})

    @router.get("/v1/models/{model_id:path}")
    async def retrieve_model(model_id: str) -> Response:
        """The model by its name, which may contain slashes."""
        if model_id != settings.served_model_name:
            raise UnknownModel(f"the model {model_id[:100]!r} does not exist; see /v1/models", param="model")
        return _json(model)

    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> Response:
        """200 while this router works, with or without workers."""
        if not fleet.running:
            return response(Unavailable("the router has not started or is shutting down"))
        return Response()

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready")
    async def ready() -> Response:
        """200 when a request would find a worker."""
        roles = [worker.role for worker in fleet.snapshot()]
        if not roles:
            return response(Unavailable("no worker is connected yet; retry"))
        return _json({"ready": True, "workers": {role: roles.count(role) for role in ("prefill", "decode", "both")}})

    @router.head("/metrics", include_in_schema=False)
    @router.get("/metrics")
    async def prometheus() -> Response:
        """Prometheus text format."""
        page = metrics.page(await scrape(fleet, mirror))
        return Response(page, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @router.get("/status")
    async def status() -> Response:
        """Everything this router knows of the cluster."""
        return _json(
            {
                "model": settings.served_model_name,
                "namespace": settings.namespace,
                "router": router_id,
                "redis": "reachable" if fleet.redis_reachable else "unreachable",
                "index": mirror and dataclasses.asdict(mirror.stat()),
                "prefix_map": {"blocks": fleet.known_blocks},
                "workers": [_worker(link) for link in fleet.links()],
                "controller": (told := await fleet.controller()) and dataclasses.asdict(told),
                "stores": [_store(store, stat) for store, stat in await fleet.store_stats()],
            }
        )

    return router


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def _worker(link: WorkerLink) -> dict[str, Any]:
    """One worker; the figures of its load are null while it is not connected."""
    info, load = link.info, link.load
    return {
        "id": info.id,
        "role": link.role,
        "connected": link.alive,
        "node": info.node,
        "pid": info.pid,
        "tp": info.tp,
        "pp": info.pp,
        "shard_pids": info.shard_pids,
        "address": info.address,
        "incarnation": info.incarnation,
        "running": load and load.running,
        "waiting": load and load.waiting,
        "kv_blocks": load and load.blocks_total,
        "kv_blocks_used": load and load.blocks_total - load.blocks_free,
        "kv_blocks_cached": load and load.blocks_cached,
        "rates": link.rates and dataclasses.asdict(link.rates),
    }


def _store(store: StoreInfo, stat: StoreStat | None) -> dict[str, Any]:
    return {
        "id": store.id,
        "node": store.node,
        "pid": store.pid,
        "address": store.address,
        "answers": stat is not None,
        "slabs": dataclasses.asdict(stat) if stat else None,
        "kv_tiers": stat
        and {
            "memory": {"blocks": stat.cached + stat.held, "bytes": (stat.cached + stat.held) * stat.block_bytes},
            "disk": {"blocks": stat.disk_blocks, "bytes": stat.disk_bytes},
        },
    }
