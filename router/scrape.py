"""Everything that a page of metrics says of others: what workers, stores, the index and the controller said last.

Put together for one scrape and forgotten after it, so a worker that is gone is gone from the page too. Counters of
workers and stores start again at zero when those restart, as Prometheus counters may. It only reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.messages import ControllerInfo, StoreInfo
from cluster.store_messages import StoreStat
from kvstore.mirror import Mirror, MirrorStat
from router.fleet import Fleet
from router.outputs import WorkerLink


@dataclass(frozen=True, slots=True)
class Scrape:
    links: Sequence[WorkerLink] = ()
    listed: frozenset[str] = field(default_factory=frozenset)  # ids of the workers that are registered
    stores: Sequence[tuple[StoreInfo, StoreStat | None]] = ()  # None: it did not answer
    mirror: MirrorStat | None = None  # None: there is no index
    controller: ControllerInfo | None = None  # None: there is none, or nobody can say
    redis_reachable: bool = False


async def scrape(fleet: Fleet, mirror: Mirror | None) -> Scrape:
    """Takes a second at most, when a store does not answer or Redis has just been lost."""
    # a Redis that is away is not asked: the page that says so must not be too late for Prometheus
    controller = fleet.controller() if fleet.redis_reachable else _nobody()
    stats, told = await asyncio.gather(fleet.store_stats(), controller)
    return Scrape(
        fleet.links(),
        fleet.listed,
        stats,
        None if mirror is None else mirror.stat(),
        told,
        fleet.redis_reachable,
    )


async def _nobody() -> None:
    return None
