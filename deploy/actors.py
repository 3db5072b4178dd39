"""The plain classes that Ray turns into actors: a worker and a block store, each an asyncio program on its own thread.

Construction returns at once and `ready` waits, so that loading can be watched and every actor loads in parallel. When
Ray restarts an actor after a crash, construction alone brings it back: same id, new address, new incarnation or epoch.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import ray

from cluster.errors import ModelError, TandemError
from cluster.identity import Identity
from cluster.messages import StoreInfo, WorkerInfo
from kvstore.layout import Layout
from kvstore.server import StoreServer
from workers.architecture import load_architecture
from workers.model_runner import ModelRunner
from workers.quantization import Int8Codec
from workers.runner import Runner
from workers.sim import SimRunner, Timings, sim_layout
from workers.stored_blocks import EncodedBlocks
from workers.worker import Worker, WorkerSettings

STOP_S = 15.0
log = logging.getLogger(__name__)


class Service(Protocol):
    async def start(self) -> WorkerInfo | StoreInfo: ...
    async def stop(self) -> None: ...


class Actor:
    """Runs one Service on an event loop of its own."""

    def __init__(self, build: Callable[[], Service]) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
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
    def __init__(self, settings: WorkerSettings, model: Path) -> None:
        self._progress = 0.0
        settings = dataclasses.replace(settings, identity=_here(settings.identity))
        super().__init__(lambda: self._worker(settings, model))

    def progress(self) -> float:
        """How much of the weights is loaded, 0..1."""
        return self._progress

    def _worker(self, settings: WorkerSettings, model: Path) -> Worker:
        runner = self._runner(settings, model)
        quantized = settings.config.kv_quantization == "int8"
        return Worker(runner, settings, EncodedBlocks(runner, Int8Codec(runner.layout)) if quantized else None)

    def _runner(self, settings: WorkerSettings, model: Path) -> Runner:
        config = settings.config
        if config.runner == "sim":
            layout = sim_layout(config.block_size)
            longest = -(-settings.max_context // config.block_size)
            num_blocks = longest * max(2, config.max_sequences // 4)
            timings = Timings(config.sim_step_ms / 1000, config.sim_token_ms / 1000)
            return SimRunner(layout, num_blocks, load_architecture(model).vocab_size, timings)
        return ModelRunner.load(
            model,
            dtype=config.dtype,
            block_size=config.block_size,
            kv_memory_bytes=config.kv_memory,
            max_context=settings.max_context,
            progress=self._report,
        )

    def _report(self, fraction: float) -> None:
        self._progress = fraction


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
        super().__init__(lambda: StoreServer(store_id, layout, memory, here, disk, disk_memory, tenant_share))


def _here(identity: Identity) -> Identity:
    """With an address to bind: the one given, or this node's."""
    return identity if identity.host else dataclasses.replace(identity, host=ray.util.get_node_ip_address())
