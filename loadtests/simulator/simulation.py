"""`simulate`: a trace through a simulated cluster, from its first arrival to its last token."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Iterable

from loadtests.simulator.arrivals import Arrivals
from loadtests.simulator.controller import Controller
from loadtests.simulator.events import Events
from loadtests.simulator.results import Recorder, SimResult, imbalance
from loadtests.simulator.router import Router
from loadtests.simulator.settings import SimSettings
from loadtests.simulator.trace import TraceRequest

SAMPLE_S = 1.0  # between two points of the series


def simulate(requests: Iterable[TraceRequest], settings: SimSettings) -> SimResult:
    """Run them all. `requests` come in the order of their arrival; of an iterator only the next is held.

    Deterministic: equal arguments give equal results, but for the figures in `results.WALL`. Raises ConfigError.
    """
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    simulation = Simulation(requests, settings)
    collected = gc.isenabled()
    gc.disable()  # what ends is in no cycle, and looking for some in millions of requests takes an eighth of the time
    try:
        simulation.run()
    finally:
        if collected:
            gc.enable()
    return simulation.result(time.perf_counter() - wall_s, time.process_time() - cpu_s)


class Simulation:
    """One run, put together; `simulate` is for those who only want its result."""

    def __init__(self, requests: Iterable[TraceRequest], settings: SimSettings) -> None:
        self.settings = settings
        self.events = Events()
        self.recorder = Recorder(settings)
        self.router = Router(settings, self.events, self.recorder)
        self.arrivals = Arrivals(requests, self.events, self.router.arrive)
        self.router.ended = self._ended
        for when_s, number in settings.failures:
            self.events.at(when_s, self._fail, number)
        self._every(settings.report_s, self._report)
        self._every(settings.cache_s, self.router.fleet.report_caches)
        self._every(SAMPLE_S, self._sample)
        self.controller = Controller(settings, self.events, self.router, self.recorder)
        if settings.autoscaling:
            self._every(settings.plan_s, self.controller.step)

    def run(self) -> None:
        """Until all requests have ended, or time is up."""
        if not self.arrivals.over:
            self.events.run(self.settings.max_s)

    def _ended(self, request: TraceRequest) -> None:
        self.arrivals.finished(request)
        if self.arrivals.over and not self.router.live:
            self.events.stop()

    def _every(self, seconds: float, act: object) -> None:
        assert callable(act)

        def again() -> None:
            act()
            self.events.after(seconds, again)

        self.events.after(seconds, again)

    def _report(self) -> None:
        self.router.fleet.report()
        self.router.look()

    def _fail(self, number: int) -> None:
        """The worker of that number dies, if it lives, and another is started in its stead."""
        fleet = self.router.fleet
        worker = next((w for w in fleet.workers.values() if w.number == number), None)
        if worker is not None:
            self.router.lost(fleet.leave(worker), worker)
            fleet.start(worker.role, self.router.look)

    def _sample(self) -> None:
        fleet = self.router.fleet
        roles = [worker.role for worker in fleet.workers.values() if worker.id not in fleet.draining]
        self.recorder.sample(
            self.events.now,
            {
                "waiting": len(self.router.queue),
                "running": sum(worker.sequence_count for worker in fleet.workers.values()),
                "prefill": sum(role == "prefill" for role in roles),
                "decode": sum(role == "decode" for role in roles),
                "both": sum(role == "both" for role in roles),
            },
        )

    def result(self, wall_s: float, cpu_s: float) -> SimResult:
        recorder, fleet, settings = self.recorder, self.router.fleet, self.settings
        workers, now = fleet.everybody, max(self.events.now, 1e-9)
        prompts = [w.prefill_ms for w in fleet.workers.values() if w.role != "decode"]
        figures: dict[str, float] = {
            "workers": settings.workers,
            "gpus": settings.gpus,
            "duration_s": self.events.now,
            **recorder.figures(),
            "load_max_over_mean": imbalance(prompts),
            "decode_load_max_over_mean": imbalance([w.busy_ms for w in fleet.workers.values() if w.role == "decode"]),
            "utilisation": sum(w.busy_ms for w in workers) / (1000 * now * len(fleet.workers or [0])),
            "preemptions": sum(w.scheduler.preemptions for w in workers),
            "steps": sum(w.steps for w in workers),
            "network_bytes": self.router.network.bytes,
            "flips": self.controller.flips,
            "moves": self.controller.moves,
            "starts": self.controller.starts,
            "stops": self.controller.stops,
            "migrations": self.controller.migrations,
            "events": self.events.count,
            "wall_s": wall_s,
            "requests_per_wall_second": recorder.requests_total / wall_s,
            "requests_per_cpu_second": recorder.requests_total / cpu_s,
            "events_per_wall_second": self.events.count / wall_s,
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        return SimResult(
            figures,
            settings,
            recorder.series,
            recorder.ttft_quantiles_ms(),
            recorder.itl_quantiles_ms(),
            recorder.requests,
            tuple(self.controller.words),
        )
