"""Workers of several shards in processes of their own, put together as a deployment does, without Ray.

Processes are forked from a server that has imported what takes seconds, so that a dozen of them cost what one does.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from cluster.messages import WorkerInfo
from deploy.shards import assemble, follow
from kvstore import locate
from workers import fetching, tier
from workers import streams as streams_module
from workers.model_runner import ModelRunner
from workers.runner import Chunk
from workers.worker import WorkerSettings

TOKEN_S = 0.001
START_S = 60.0
STOP_S = 20.0
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


class Remote:
    """A worker that runs elsewhere; the same calls start and stop it as one that runs here."""

    def __init__(self, settings: WorkerSettings, model: Path) -> None:
        self._settings, self._model = settings, model
        self._told, theirs = _processes.Pipe()
        self._processes = [self._start(_lead, settings, model, theirs)]
        theirs.close()

    async def start(self) -> WorkerInfo:
        """Where it serves, once it does."""
        address = await self._answer()
        tp, pp = self._settings.config.grid(self._settings.role)
        if isinstance(address, str):
            for rank in range(1, tp * pp):
                self._processes.append(self._start(_follower, self._settings, self._model, rank, address))
            self._told.send([process.pid for process in self._processes[1:]])
        info = await self._answer() if isinstance(address, str) else address
        assert isinstance(info, WorkerInfo)
        return info

    async def stop(self) -> None:
        """Ask it to end; its shards end with it."""
        self._told.send("stop")
        for process in self._processes:
            await asyncio.to_thread(process.join, STOP_S)
        codes = [process.exitcode for process in self._processes]
        assert codes == [0] * len(codes), f"{self._settings.id}: {codes}"

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join(STOP_S)

    async def _answer(self) -> Any:
        assert await asyncio.to_thread(self._told.poll, START_S), "nothing was said in time"
        return self._told.recv()

    @staticmethod
    def _start(*target: Any) -> BaseProcess:
        process = _processes.Process(target=target[0], args=target[1:], daemon=True)
        process.start()
        return process


@contextmanager
def remote(settings: WorkerSettings, model: Path) -> Iterator[Remote]:
    made = Remote(settings, model)
    try:
        yield made
    finally:
        made.kill()


def _lead(settings: WorkerSettings, model: Path, told: Connection[Any, Any]) -> None:
    _be_slow()
    _be_patient()
    streams_module.HEARTBEAT_S = 0.05

    def start(address: str) -> list[int]:
        told.send(address)
        pids: list[int] = told.recv()
        return pids

    assembled = assemble(settings, model, start)

    async def serve() -> None:
        worker = assembled.worker(settings)
        told.send(await worker.start())
        await asyncio.to_thread(told.recv)
        await worker.stop()

    asyncio.run(serve())


def _follower(settings: WorkerSettings, model: Path, rank: int, address: str) -> None:
    _be_slow()
    follow(settings, model, rank, address)


def _be_patient() -> None:
    """What a busy machine does not bring in time is computed, which would be right and not what is tested."""
    locate.FIND_S = tier.LOCATE_S = fetching.MIN_TIMEOUT_S = START_S


def _be_slow() -> None:
    """A tiny model computes faster than anything can be fetched; one that takes its time makes fetching worth it."""
    compute = ModelRunner.run

    def run(self: ModelRunner, chunks: list[Chunk]) -> list[int | None]:
        time.sleep(TOKEN_S * sum(chunk.take for chunk in chunks))
        return compute(self, chunks)

    ModelRunner.run = run  # type: ignore[method-assign]
