"""What operators ask of the block stores: how full, which blocks; pin them, drop them, verify them.

Every store is asked and answers for itself: one that is gone is an `error` in its place and takes nothing from the
others. Blocks belong to tenants and their presence tells what somebody asked, so once there are API keys these routes
need the operator's own.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from cluster.config import Config
from cluster.errors import Forbidden, TandemError, Unauthorized
from cluster.messages import StoreInfo
from cluster.store_messages import MEMORY, BlockInfo, Count, Drop, List, Listing, Pin, StoreStat, Verify
from kvstore.hashing import HASH_BYTES
from kvstore.mirror import Mirror
from router.fleet import Fleet
from router.json_route import JsonRoute
from router.kv_selection import Chains, DropSelection, Selection, hex_prefix
from router.middleware import Bearer
from router.streaming import ClientLeft, until_client_leaves

CALL_S = 10.0
VERIFY_S = 120.0  # for PAGE blocks, from a slow disk at worst
HASHES = 4_096  # per message: a store refuses more
PAGE = 256  # blocks listed, and verified or dropped, at a time: a store has other callers
MAX_LISTED = 4_096
TIERS = ("memory", "disk")  # in the order of cluster.store_messages.MEMORY and DISK
CLIENT_CLOSED_REQUEST = 499

Work = Callable[[StoreInfo], Awaitable[dict[str, Any]]]


def kv(fleet: Fleet, chains: Chains, config: Config, mirror: Mirror | None) -> APIRouter:
    """The routes, bound to one fleet."""
    router = APIRouter(
        prefix="/kv", tags=["block stores"], route_class=JsonRoute, dependencies=[Depends(operators_only(config))]
    )

    @router.get("")
    async def overview() -> Response:
        """Totals per tier, every store's own account, the tenants and the state of this router's index mirror."""
        stats = await fleet.store_stats()
        answer = {
            "tiers": _tiers([stat for _, stat in stats if stat is not None]),
            "stores": [_store(info, stat) for info, stat in stats],
            "tenants": list(chains.tenants),
            "index": mirror and dataclasses.asdict(mirror.stat()),
        }
        return _json(answer)

    @router.get("/blocks")
    async def blocks(prefix: str = "", limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 100) -> Response:
        """The first blocks, by hash, whose hash starts with `prefix` (hexadecimal)."""
        start = hex_prefix(prefix, "prefix")
        listed: list[tuple[BlockInfo, str]] = []

        async def one(store: StoreInfo) -> dict[str, Any]:
            listing: Listing = await fleet.ask_store(store, "List", List(start, b"", limit), CALL_S)
            listed.extend((block, store.id) for block in listing.blocks)
            return {"blocks": listing.total}

        stores = await _each(fleet, one)
        listed.sort(key=lambda item: (item[0].hash, item[1]))
        return _json({"blocks": [_block(*item) for item in listed[:limit]], "stores": stores})

    async def pinned(selection: Selection, pin: bool) -> Response:
        hashes = await chains.hashes(selection)
        return _json(await _counted(fleet, hashes, "pinned" if pin else "unpinned", "Pin", lambda h: Pin(h, pin)))

    @router.post("/pin")
    async def pin(body: Selection) -> Response:
        """Evict these blocks last, also those that no store has yet."""
        return await pinned(body, True)

    @router.post("/unpin")
    async def unpin(body: Selection) -> Response:
        """Evict these blocks like all others."""
        return await pinned(body, False)

    @router.post("/drop")
    async def drop(body: DropSelection, request: Request) -> Response:
        """Forget these blocks in every tier, except those in use."""
        if not body.all:
            return _json(await _counted(fleet, await chains.hashes(body), "dropped", "Drop", Drop))

        async def one(store: StoreInfo) -> dict[str, Any]:
            dropped = 0
            async for hashes in _pages(fleet, store):
                dropped += await _count(fleet, store, "Drop", Drop(hashes), CALL_S)
            return {"dropped": dropped}

        return await _unless_left(request, _each(fleet, one))

    @router.post("/verify")
    async def verify(request: Request) -> Response:
        """Recompute name and checksums of every block of every store; the corrupt ones are dropped."""

        async def one(store: StoreInfo) -> dict[str, Any]:
            checked = corrupt = 0
            async for hashes in _pages(fleet, store):
                corrupt += await _count(fleet, store, "Verify", Verify(hashes), VERIFY_S)
                checked += len(hashes)
            return {"checked": checked, "corrupt": corrupt}

        return await _unless_left(request, _each(fleet, one))

    return router


def operators_only(config: Config) -> Callable[[Request], None]:
    """A dependency that lets operators through: anybody where there are no keys."""
    operators = Bearer([config.operator_key] if config.operator_key else [])

    def check(request: Request) -> None:
        """Raises Forbidden when no key could open this, Unauthorized when another one would."""
        if not config.operator_key and not config.api_keys:
            return
        if not config.operator_key:
            raise Forbidden("this server has tenants and no operator key; start it with TANDEM_OPERATOR_KEY set")
        if operators.match(request.headers.get("authorization", "")) is None:
            raise Unauthorized("send the operator key as `Authorization: Bearer KEY`")

    return check


async def _each(fleet: Fleet, work: Work) -> list[dict[str, Any]]:
    """What every store answers, or its error."""

    async def one(store: StoreInfo) -> dict[str, Any]:
        try:
            return {"store": store.id, **await work(store)}
        except TandemError as error:
            return {"store": store.id, "error": error.message}

    return await asyncio.gather(*map(one, fleet.stores))


async def _count(fleet: Fleet, store: StoreInfo, method: str, message: Any, timeout_s: float) -> int:
    answer: Count = await fleet.ask_store(store, method, message, timeout_s)
    return answer.blocks


async def _counted(
    fleet: Fleet, hashes: Sequence[bytes], what: str, method: str, message: Callable[[tuple[bytes, ...]], Any]
) -> dict[str, Any]:
    async def one(store: StoreInfo) -> dict[str, Any]:
        parts = [tuple(hashes[at : at + HASHES]) for at in range(0, len(hashes), HASHES)]
        return {what: sum([await _count(fleet, store, method, message(part), CALL_S) for part in parts])}

    return {"asked": len(hashes), "stores": await _each(fleet, one)}


async def _pages(fleet: Fleet, store: StoreInfo) -> AsyncIterator[tuple[bytes, ...]]:
    """The hashes a store has, page by page; what comes in behind the page at hand is not seen."""
    after = b""
    while True:
        listing: Listing = await fleet.ask_store(store, "List", List(b"", after, PAGE), CALL_S)
        hashes = tuple(block.hash for block in listing.blocks)
        if not hashes or len(hashes[-1]) != HASH_BYTES or hashes[-1] <= after:
            return
        yield hashes
        after = hashes[-1]


async def _unless_left(request: Request, work: Awaitable[list[dict[str, Any]]]) -> Response:
    """A walk over all blocks takes long, and ends with the one who asked for it."""

    try:
        return _json({"stores": await until_client_leaves(request.receive, work)})
    except ClientLeft:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


def _tiers(stats: Sequence[StoreStat]) -> dict[str, Any]:
    sizes = [(stat.cached + stat.held, stat.slabs, stat.block_bytes) for stat in stats]
    return {
        "memory": {
            "blocks": sum(blocks for blocks, _, _ in sizes),
            "bytes": sum(blocks * size for blocks, _, size in sizes),
            "limit_bytes": sum(slabs * size for _, slabs, size in sizes),
            "pinned_blocks": sum(stat.pinned for stat in stats),
        },
        "disk": {
            "blocks": sum(stat.disk_blocks for stat in stats),
            "bytes": sum(stat.disk_bytes for stat in stats),
            "limit_bytes": sum(stat.disk_limit_bytes for stat in stats),
        },
        "found_blocks_total": sum(stat.found_blocks_total for stat in stats),
        "missed_blocks_total": sum(stat.missed_blocks_total for stat in stats),
    }


def _store(info: StoreInfo, stat: StoreStat | None) -> dict[str, Any]:
    own = dataclasses.asdict(stat) if stat else {}
    return {"store": info.id, "node": info.node, "address": info.address, "answers": stat is not None, **own}


def _block(block: BlockInfo, store: str) -> dict[str, Any]:
    return {
        "hash": block.hash.hex(),
        "parent": block.parent.hex(),
        "tokens": block.tokens,
        "store": store,
        "tier": TIERS[block.tier != MEMORY],
        "holders": block.holders,
        "pinned": block.pinned,
        "tenant": block.tenant,
    }


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
