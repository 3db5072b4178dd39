"""A shard that is not rank 0: it follows the step plans that rank 0 sends, and computes its part of every step.

    Follower(rank, address, secret, build, serve).run()     blocks; ends the process when the worker is over

One thread takes plans and runs the stage; beside it an event loop serves what else is asked of the shard, its copies
between KV cache and stores. It decides nothing and never reconnects: when the control connection ends, or anything
raises, the process ends, whatever any of its threads waits for. That is why its own waits need no deadlines.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn, Protocol, TypeVar

from cluster.errors import ModelError, ProtocolError, TandemError, WorkerLost
from cluster.shard_messages import Begin, Failed, Joined, Loaded, StepPlan, StepResult
from workers.control import Control, connect, watch
from workers.runner import Stage
from workers.step_plan import Mirror, pack_tokens

FAILED = 70  # exit code of a process that failed; 0 when rank 0 has left
T = TypeVar("T")
log = logging.getLogger(__name__)


class Service(Protocol):
    async def start(self) -> str:
        """Serve gRPC on the running event loop until the process ends. Returns host:port, for rank 0."""
        ...


class Follower:
    def __init__(
        self,
        rank: int,
        address: str,  # of rank 0's `workers.control.ControlListener`
        secret: str,  # the cluster's
        build: Callable[[str], Stage],  # called once with the links' rendezvous, on the thread that will compute
        serve: Callable[[Stage], Service],
    ) -> None:
        self._rank = rank
        self._address = address
        self._secret = secret
        self._build = build
        self._serve = serve

    def run(self) -> NoReturn:
        try:
            control = connect(self._address, self._secret)
        except TandemError as error:
            log.error("shard %d: %s", self._rank, error.message)
            os._exit(FAILED)
        watch([control], self._left)
        asyncio.run(self._work(control))
        os._exit(FAILED)

    async def _work(self, control: Control) -> None:
        try:
            loop = asyncio.get_running_loop()
            compute = ThreadPoolExecutor(1, "compute")  # the same thread for all: devices are chosen per thread
            stage = await loop.run_in_executor(compute, self._load, control)
            control.send(Loaded(await self._serve(stage).start()))
            await loop.run_in_executor(compute, self._follow, control, stage)
        except Exception as error:  # the process's outermost; `asyncio.run` would wait for copies before it raised
            log.exception("shard %d failed; its worker ends", self._rank)
            self._tell(control, error)
            os._exit(FAILED)

    # ---------------------------------------------------------------------------------------------- compute thread
    def _load(self, control: Control) -> Stage:
        control.send(Joined(self._rank, os.getpid()))
        rendezvous = self._receive(control, Begin).rendezvous
        try:
            return self._build(rendezvous)
        except TandemError:
            raise
        except Exception as error:
            raise ModelError(f"shard {self._rank} cannot start: {type(error).__name__}: {error}") from error

    def _follow(self, control: Control, stage: Stage) -> None:
        mirror, shard = Mirror(), stage.shard
        answers = shard.pp > 1 and shard.last_stage and shard.tensor_rank == 0
        while True:
            plan = self._receive(control, StepPlan)
            tokens = stage.run(mirror.chunks(plan))
            if answers:
                control.send(StepResult(plan.number, pack_tokens(tokens)))

    def _receive(self, control: Control, kind: type[T]) -> T:
        try:
            message = control.receive(None)
        except WorkerLost:
            self._left(control)
        if not isinstance(message, kind):
            raise ProtocolError(f"rank 0 said {type(message).__name__} where {kind.__name__} is expected")
        return message

    # --------------------------------------------------------------------------------------------------------- end
    def _left(self, _: Control) -> NoReturn:
        log.info("shard %d: rank 0 has left", self._rank)
        os._exit(0)

    def _tell(self, control: Control, error: Exception) -> None:
        known = error if isinstance(error, TandemError) else WorkerLost(f"shard {self._rank} failed: {error!r}")
        try:
            control.send(Failed(known.code, known.message))
        except WorkerLost as gone:
            log.info("nobody to tell: %s", gone.message)
