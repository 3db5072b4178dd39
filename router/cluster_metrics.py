"""The metrics of the cluster as a whole: who is there in which role, what the controller did, KV by tier, GPUs.

Declarations and the samples of one scrape. What is counted per worker or per store is in `worker_metrics.py` and
`store_metrics.py`; here are only sums that a query could not make of those, and what belongs to neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import Metric

from cluster.config import Config
from cluster.messages import ControllerInfo, Role
from cluster.store_messages import StoreStat
from router.families import Family, counter, gauge
from router.outputs import WorkerLink
from router.scrape import Scrape

ROLES: tuple[Role, ...] = ("prefill", "decode", "both")
STATES = ("serving", "draining", "lost")

WORKERS = gauge(
    "tandem_workers", ("role", "state"), "workers",
    "serving (connected and registered), draining (connected, to leave), lost (registered, not connected)",
    "worker lost",
)  # fmt: skip
SHARE = gauge(
    "tandem_role_ratio", ("role",), "ratio", "part of the workers that serve which has this role", "role changed"
)
WANTED = gauge(
    "tandem_role_wanted", ("role",), "0, 1",
    "1 for a role that always has to have a worker; 0 where there may be none at all", "steady",
)  # fmt: skip
REDIS_UP = gauge("tandem_redis_up", (), "0, 1", "1 while Redis answers this router", "redis lost")
CONTROLLER_UP = gauge(
    "tandem_controller_up", (), "0, 1", "1 while the controller says that it works; needs Redis", "redis lost"
)
CONTROLLER: tuple[tuple[Family, Callable[[ControllerInfo], float]], ...] = (
    (
        counter("tandem_role_changes_total", (), "times", "that the controller changed roles", "role changed"),
        lambda info: info.moves_total,
    ),
    (
        counter("tandem_worker_starts_total", (), "workers", "that the controller had started", "resized"),
        lambda info: info.starts_total,
    ),
    (
        counter("tandem_worker_stops_total", (), "workers", "that were drained and stopped", "resized"),
        lambda info: info.stops_total,
    ),
    (
        counter(
            "tandem_worker_migrations_total", (), "times", "that a worker was told to give its sequences to others",
            "resized",
        ),
        lambda info: info.migrations_total,
    ),
    (gauge("tandem_workers_starting", (), "workers", "not yet connected", "resized"), lambda info: info.starting),
    (
        gauge("tandem_workers_draining", (), "workers", "on their way out", "resized"),
        lambda info: info.draining,
    ),
    (
        gauge("tandem_drain_seconds", (), "seconds", "that the last drain took, from the order to the end", "resized"),
        lambda info: info.last_drain_s,
    ),
)  # fmt: skip
KV_BYTES = gauge(
    "tandem_kv_bytes", ("tier", "state"), "bytes",
    "of KV on the devices, in the stores' memory and on their disks: used (by sequences, transfers), cached", "served",
)  # fmt: skip
KV_LIMIT = gauge("tandem_kv_limit_bytes", ("tier",), "bytes", "room for KV in that tier", "steady")
GPU_BUSY = gauge("tandem_gpu_utilization_ratio", ("node", "gpu"), "ratio", "of the last second that kernels ran", "gpu")
GPU_MEMORY = gauge("tandem_gpu_memory_used_bytes", ("node", "gpu"), "bytes", "in use, by whomever", "gpu")
GPU_LIMIT = gauge("tandem_gpu_memory_bytes", ("node", "gpu"), "bytes", "in all", "gpu")
GPU_POWER = gauge("tandem_gpu_power_watts", ("node", "gpu"), "watts", "drawn", "gpu")

FAMILIES = (
    WORKERS, SHARE, WANTED, REDIS_UP, CONTROLLER_UP, *(family for family, _ in CONTROLLER), KV_BYTES, KV_LIMIT,
    GPU_BUSY, GPU_MEMORY, GPU_LIMIT, GPU_POWER,
)  # fmt: skip


def wanted(config: Config) -> Metric:
    """Which roles must never be without a worker."""
    always = float(config.budget[0] > 0)
    return WANTED.metric(([role], always) for role, _ in config.roles)


def collect(scrape: Scrape) -> Iterator[Metric]:
    yield from _roles(scrape.links, scrape.listed)
    yield REDIS_UP.metric([([], float(scrape.redis_reachable))])
    yield CONTROLLER_UP.metric([([], float(scrape.controller is not None))])
    if scrape.controller is not None:
        for family, read in CONTROLLER:
            yield family.metric([([], read(scrape.controller))])
    yield from _tiers(scrape.links, [stat for _, stat in scrape.stores if stat is not None])
    yield from _gpus(scrape.links)


def _roles(links: Sequence[WorkerLink], listed: frozenset[str]) -> Iterator[Metric]:
    found = Counter((link.role, _state(link, listed)) for link in links)
    serving = sum(found[role, "serving"] for role in ROLES)
    yield WORKERS.metric(([role, state], found[role, state]) for role in ROLES for state in STATES)
    yield SHARE.metric(([role], found[role, "serving"] / max(1, serving)) for role in ROLES)


def _state(link: WorkerLink, listed: frozenset[str]) -> str:
    if not link.alive:
        return "lost"
    return "serving" if link.info.id in listed else "draining"


def _tiers(links: Sequence[WorkerLink], stats: Sequence[StoreStat]) -> Iterator[Metric]:
    loads = [(link.load, link.info.block_bytes) for link in links if link.load is not None]
    used = {
        "device": sum((load.blocks_total - load.blocks_free) * size for load, size in loads),
        "memory": sum((s.slabs - s.free - s.cached) * s.block_bytes for s in stats),
        "disk": 0,
    }
    cached = {
        "device": sum(load.blocks_cached * size for load, size in loads),
        "memory": sum(s.cached * s.block_bytes for s in stats),
        "disk": sum(s.disk_bytes for s in stats),
    }
    limit = {
        "device": sum(load.blocks_total * size for load, size in loads),
        "memory": sum(s.slabs * s.block_bytes for s in stats),
        "disk": sum(s.disk_limit_bytes for s in stats),
    }
    states = {"used": used, "cached": cached}
    yield KV_BYTES.metric(([tier, state], tiers[tier]) for state, tiers in states.items() for tier in tiers)
    yield KV_LIMIT.metric(([tier], size) for tier, size in limit.items())


def _gpus(links: Sequence[WorkerLink]) -> Iterator[Metric]:
    """Workers of one node tell of the same GPUs."""
    gpus = {(link.info.node, gpu.id): gpu for link in links for gpu in link.gpus}
    yield GPU_BUSY.metric((key, gpu.utilization) for key, gpu in gpus.items())
    yield GPU_MEMORY.metric((key, gpu.memory_used) for key, gpu in gpus.items())
    yield GPU_LIMIT.metric((key, gpu.memory_total) for key, gpu in gpus.items())
    yield GPU_POWER.metric((key, gpu.power_w) for key, gpu in gpus.items())
