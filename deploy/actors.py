"""The plain classes that Ray turns into actors: a worker's rank 0, its other ranks, a block store.

A worker and a store are asyncio programs on a thread of their own. Construction returns at once and `ready` waits, so
that loading can be watched and every actor loads in parallel. When Ray restarts one after a crash, construction alone
brings it back: same id, new address, new incarnation or epoch, new shards.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import logs
from cluster.config import Config
from cluster.errors import ModelError, StartupError, TandemError
from cluster.identity import Identity
from cluster.messages import StoreInfo, WorkerInfo
from deploy.placement import of_shard
from deploy.shards import assemble, follow
from kvstore.layout import Layout
from kvstore.server import StoreServer
from workers.worker import Worker, WorkerSettings

STOP_S = 15.0
PLACE_S = 60.0  # for processes whose place is reserved
log = logging.getLogger(__name__)


def runtime_environment(config: Config) -> dict[str, Any]:
    """Of a shard's process. Threads are set before torch is imported: more than cores cost 20 ms at every OpenMP
    barrier."""
    return {"env_vars": {"OMP_NUM_THREADS": str(config.threads)}}


class Service(Protocol):
    async def start(self) -> WorkerInfo | StoreInfo: ...
    async def stop(self) -> None: ...


class Actor:
    """Runs one Service on an event loop of its own."""

    def __init__(self, build: Callable[[], Service], identity: Identity) -> None:
        _log(identity)
        self._build = build
        self._loop = asyncio.new_event_loop()
        self._started: Future[WorkerInfo | StoreInfo] = Future()
        self._service: Service | None = None
        threading.Thread(target=self._run, name="service", daemon=True).start()

    def ready(self, timeout_s: float) -> WorkerInfo | StoreInfo | TandemError | None:
        """The running service's address, or why it cannot start; None while it still loads."""
        try:
            return self._started.result(timeout_s)
        except TandemError as error:
            return error
        except TimeoutError:
            return None

    def stop(self) -> None:
        if self._service is not None:
            asyncio.run_coroutine_threadsafe(self._service.stop(), self._loop).result(STOP_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._service = self._build()
            self._started.set_result(self._loop.run_until_complete(self._service.start()))
        except TandemError as error:
            return self._fail(error)
        except Exception as error:  # the actor's outermost loop
            log.exception("cannot start")
            return self._fail(ModelError(f"cannot start: {type(error).__name__}: {error}"))
        self._loop.run_forever()

    def _fail(self, error: TandemError) -> None:
        if ray.get_runtime_context().was_current_actor_reconstructed:
            # nobody waits for `ready` after a restart: end, so that Ray tries again
            log.error("cannot start again: %s", error.message)
            os._exit(70)
        self._started.set_exception(error)


class WorkerActor(Actor):
    """Rank 0 of a worker. The other ranks are actors that it starts itself, beside it in its placement group, whenever
    it starts: they end with it, and one that ends takes it along."""

    def __init__(self, settings: WorkerSettings, model: Path) -> None:
        self._progress = 0.0
        self._began = time.monotonic()  # loading counts as starting
        self._room = ray.util.get_current_placement_group()
        self._shards: list[Any] = []  # an actor lives as long as somebody has its handle
        super().__init__(lambda: self._worker(settings, model), settings.identity)

    def progress(self) -> float:
        """How much of the weights is loaded, 0..1; of rank 0's part."""
        return self._progress

    def _worker(self, settings: WorkerSettings, model: Path) -> Worker:
        start = partial(self._start_shards, settings, model)  # settings as given: a shard's address is its own node's
        settings = dataclasses.replace(settings, identity=_here(settings.identity))
        self._assembled = assemble(settings, model, start, self._report)
        return self._assembled.worker(settings, self._began)

    def _start_shards(self, settings: WorkerSettings, model: Path, address: str) -> list[int]:
        config, room = settings.config, self._room
        assert room is not None, "a worker of several shards is started in a placement group"
        tp, pp = config.grid(settings.role)
        for rank in range(1, tp * pp):
            place = PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=rank // tp)
            actor = ray.remote(ShardActor).options(
                **of_shard(config),
                max_restarts=0,
                runtime_env=runtime_environment(config),
                scheduling_strategy=place,
            )
            self._shards.append(actor.remote(settings, model, rank, address))
        try:
            pids: list[int] = ray.get([shard.pid.remote() for shard in self._shards], timeout=PLACE_S)
        except ray.exceptions.GetTimeoutError:
            raise StartupError(f"Ray did not start the shards of {settings.id} within {PLACE_S:.0f} s") from None
        except ray.exceptions.RayActorError as error:
            raise StartupError(f"a shard of {settings.id} died while starting: {str(error).splitlines()[0]}") from None
        return pids

    def _report(self, fraction: float) -> None:
        self._progress = fraction


class ShardActor:
    """Any other rank of a worker. Ray starts it and looks after its process; everything else is said between ranks."""

    def __init__(self, settings: WorkerSettings, model: Path, rank: int, address: str) -> None:
        _log(settings.identity)
        settings = dataclasses.replace(settings, identity=_here(settings.identity))
        threading.Thread(target=follow, args=(settings, model, rank, address), name="shard", daemon=True).start()

    def pid(self) -> int:
        return os.getpid()


class StoreActor(Actor):
    def __init__(
        self,
        store_id: str,
        layout: Layout,
        memory: int,
        identity: Identity,
        disk: Path | None,
        disk_memory: int,
        tenant_share: float,
    ) -> None:
        here = _here(identity)
        super().__init__(lambda: StoreServer(store_id, layout, memory, here, disk, disk_memory, tenant_share), identity)


def _log(identity: Identity) -> None:
    logs.configure()
    logs.follow(identity.redis_url, identity.deployment)


def _here(identity: Identity) -> Identity:
    """With an address to bind: the one given, or this node's."""
    return identity if identity.host else dataclasses.replace(identity, host=ray.util.get_node_ip_address())
