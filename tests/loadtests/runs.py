"""Small simulations for the tests: a machine with round numbers, and traces of a few hundred requests from one seed."""

from __future__ import annotations

import random
from typing import Any

from cluster.messages import Rates
from loadtests.simulator.job import Job
from loadtests.simulator.settings import SimSettings
from loadtests.simulator.simulation import Simulation
from loadtests.simulator.trace import TraceRequest

RATES = Rates(
    prefill=(2.0, 0.05, 1e-6),
    decode=(5.0, 0.1, 1e-4),
    memory=(0.5, 1e-8),
    disk=(2.0, 1e-7),
    remote=(1.0, 5e-8),
    step_tokens=512,
)


def settings(**changes: Any) -> SimSettings:
    """Four workers, two of which prefill, on two nodes; blocks of 64 tokens."""
    values: dict[str, Any] = {
        "rates": RATES,
        "block_size": 64,
        "workers": 4,
        "kv_tokens": 64 * 400,
        "kv_bytes": 1000,
        "max_sequences": 32,
    }
    return SimSettings(**(values | changes))


def requests(count: int, rate: float, seed: int = 0, shared: int = 0, groups: int = 1) -> list[TraceRequest]:
    """Poisson arrivals of prompts of 1 to 12 blocks; each of `groups` shares its first `shared` blocks."""
    rng = random.Random(seed)
    now, fresh, made = 0.0, 10_000, []
    for _ in range(count):
        now += rng.expovariate(rate)
        blocks = rng.randint(shared + 1, shared + 12)
        group = rng.randrange(groups)
        own = range(fresh, fresh := fresh + blocks - shared)
        prompt = 64 * (blocks - 1) + rng.randint(1, 64)
        common = range(100 * group, 100 * group + shared)
        made.append(TraceRequest(now, prompt, rng.randint(1, 80), (*common, *own)))
    return made


class Watched(Simulation):
    """A simulation that can be looked into when it has ended."""

    def __init__(self, trace: list[TraceRequest], with_settings: SimSettings) -> None:
        super().__init__(trace, with_settings)
        self.finished: list[Job] = []
        record = self.recorder.finished

        def finished(job: Job) -> None:
            self.finished.append(job)
            record(job)

        self.recorder.finished = finished  # type: ignore[method-assign]
        self.run()

    def check_whole(self) -> None:
        """Every request ended exactly once, and every block that is left is free and accounted for."""
        trace = self.recorder.requests_total
        assert len({job.number for job in self.finished}) == len(self.finished) == trace - self.recorder.refusals
        assert not self.router.live
        assert not self.router.queue
        for worker in self.router.fleet.workers.values():
            worker.pool.check()
            assert worker.sequences() == []
            assert worker.pool.used_count == 0
            assert worker.batch.count == worker.batch.context == 0
