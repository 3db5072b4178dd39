"""One Ray actor of ours from the order to start it to its end: what is known of both, asked without waiting.

For the actors of `deploy/actors.py`, which answer `ready` and `stop`. Creates none: see `deploy/workforce.py` and
`deploy/node_stores.py`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray

from cluster.errors import StartupError, TandemError
from cluster.messages import StoreInfo, WorkerInfo

READY_S = 600.0  # weights of a large model from a slow disk
STOP_S = 20.0
LOGS = "/tmp/ray/session_latest/logs"


@dataclass
class Process:
    """Times are monotonic."""

    name: str
    actor: Any
    answer: Any  # reference to what `ready` returns
    info: WorkerInfo | StoreInfo | None = None  # what it said when it had started; None: it has not
    farewell: Any = None  # reference to what `stop` returns
    stopping_s: float = 0.0  # since when; 0: it is to stay

    @classmethod
    def of(cls, name: str, actor: Any) -> Process:
        """Of an actor that has just been created."""
        return cls(name, actor, actor.ready.remote(READY_S))

    def poll(self) -> None:
        """See whether it has started. Raises StartupError when it never will."""
        if self.info is not None or not ray.wait([self.answer], timeout=0)[0]:
            return
        try:
            result = ray.get(self.answer, timeout=STOP_S)
        except ray.exceptions.RayError as error:
            raise StartupError(f"{self.name} died while starting: {str(error).splitlines()[0]}") from None
        if isinstance(result, StartupError):
            raise result
        if isinstance(result, TandemError):
            raise StartupError(f"{self.name}: {result.message}")
        if result is None:
            raise StartupError(f"{self.name} was not ready after {READY_S:.0f} s; its log is in {LOGS}")
        self.info = result

    def ask_to_stop(self) -> None:
        """One that has not started is not asked, only killed."""
        if self.info is not None and self.farewell is None:
            self.farewell = self.actor.stop.remote()
        self.stopping_s = self.stopping_s or time.monotonic()

    def has_stopped(self) -> bool:
        """Or has had the time to. Whatever it answered, it is killed next."""
        late = time.monotonic() - self.stopping_s > STOP_S
        return self.farewell is None or late or bool(ray.wait([self.farewell], timeout=0)[0])

    def kill(self) -> None:
        """For good: Ray does not restart it."""
        ray.kill(self.actor)


def end(processes: list[Process]) -> None:
    """All of them at once, asked first; within `STOP_S`."""
    for process in processes:
        process.ask_to_stop()
    farewells = [process.farewell for process in processes if process.farewell is not None]
    if farewells:
        ray.wait(farewells, num_returns=len(farewells), timeout=STOP_S)
    for process in processes:
        process.kill()
