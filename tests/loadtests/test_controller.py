"""The plan in virtual time: roles and workers come and go under load, and nothing is lost."""

from __future__ import annotations

import random

import pytest

from cluster.plan import Drain, Migrate, Stop
from loadtests.simulator.trace import TraceRequest
from tests.loadtests.runs import Watched, requests, settings


def mixed(
    seconds: float, rate: float, prompt: int, output: int, start: float = 0.0, seed: int = 0
) -> list[TraceRequest]:
    """Poisson arrivals of equal requests that share nothing."""
    rng = random.Random(seed)
    now, made = start, []
    while (now := now + rng.expovariate(rate)) < start + seconds:
        first = round(1e6 * now) * 1000
        made.append(TraceRequest(now, prompt, output, tuple(range(first, first - (-prompt // 64)))))
    return made


def test_roles_follow_the_mix() -> None:
    """Prompts alone keep more than three workers busy, then answers do."""
    heavy = mixed(30, 45.0, 1500, 4)
    light = mixed(30, 35.0, 64, 300, start=30.0, seed=1)
    run = Watched(
        [*heavy, *light], settings(workers=8, prefill=4, autoscaling="fixed", ttft_slo_ms=2000, itl_slo_ms=12)
    )
    run.check_whole()
    assert run.controller.flips > 0
    assert run.controller.words
    series = run.recorder.series
    at = dict(zip(series["time_s"], series["prefill"], strict=True))
    assert at[28.0] > 4 > at[58.0]


def test_a_constant_load_moves_nothing() -> None:
    run = Watched(mixed(300, 4.0, 600, 60), settings(workers=4, autoscaling="fixed", ttft_slo_ms=2000, itl_slo_ms=50))
    run.check_whole()
    assert run.controller.flips <= 1


def test_workers_come_when_they_are_needed_and_go_when_not() -> None:
    trace = [*mixed(20, 2.0, 600, 30), *mixed(40, 100.0, 900, 30, start=20.0), *mixed(150, 1.0, 600, 30, start=60.0)]
    run = Watched(
        trace,
        settings(workers=4, scale=(2, 12), autoscaling="slo", start_s=5.0, ttft_slo_ms=1000, itl_slo_ms=30),
    )
    run.check_whole()
    assert len(run.finished) == len(trace)
    assert run.controller.starts > 0
    assert run.controller.stops > 0
    assert max(p + d for p, d in zip(run.recorder.series["prefill"], run.recorder.series["decode"], strict=True)) <= 12


@pytest.mark.parametrize("seed", range(3))
def test_draining_moving_and_stopping_at_any_time_lose_nothing(seed: int) -> None:
    rng = random.Random(seed)
    trace = requests(300, 40.0, seed=seed, shared=1, groups=3)

    class Meddled(Watched):
        def run(self) -> None:
            self.meddle()
            super().run()

        def meddle(self) -> None:
            """Now and then, as long as two workers of each role are left."""
            act, fleet = self.controller.act, self.router.fleet
            worker = rng.choice(list(fleet.workers.values()))
            act(Migrate(worker.id))
            same = [w for w in fleet.workers.values() if w.role == worker.role and w.id not in fleet.draining]
            if len(same) > 2 and worker.id not in fleet.draining:
                act(Drain(worker.id))
            elif worker.id in fleet.draining and rng.random() < 0.5:
                act(Stop(worker.id))
            self.events.after(rng.expovariate(4.0), self.meddle)

    run = Meddled(trace, settings(workers=10, prefill=5))
    run.check_whole()
    assert run.controller.stops > 0
    assert run.controller.migrations > 0
    assert len(run.finished) == 300
    assert run.recorder.gaps.count == sum(r.output_tokens - 1 for r in trace)
