"""How long a call takes on the GPU: the median replay of a CUDA graph of calls over different inputs, twice.

A graph, because launching from Python takes longer than a small kernel; different inputs, because with the same ones
the L2 cache would be measured. What cannot be captured is launched in a loop, and the result says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

CALLS = 10  # in a graph, at least, unless they are long
GRAPH_US = 20_000.0  # a graph of calls that are longer has fewer of them
REPLAYS = 50
RUN_US = 1.5e6  # a run is no longer, even if that leaves fewer replays
FEWEST = 11
WARM_UP_US = 25_000.0


@dataclass(frozen=True, slots=True)
class Timing:
    us: float  # of one call, the smaller median of two runs
    spread: float  # how much larger the other run's is
    captured: bool


class Stopwatch:
    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def us(self, work: Callable[[], object]) -> float:
        """Microseconds of device time."""
        self._begin.record()
        work()
        self._end.record()
        self._end.synchronize()
        return 1000 * float(self._begin.elapsed_time(self._end))


def measure(calls: Sequence[Callable[[], object]]) -> Timing:
    """`calls` do the same with different inputs."""
    watch = Stopwatch()
    for call in calls:
        call()  # compiles, and tunes what tunes itself
    once = watch.us(calls[0])
    for _ in range(int(min(1000, WARM_UP_US / once))):
        calls[0]()
    once = watch.us(calls[0])
    count = max(1, min(-(-CALLS // len(calls)) * len(calls), int(GRAPH_US / once)))
    chosen = [calls[i % len(calls)] for i in range(count)]
    work, captured = _captured(chosen)
    replays = max(FEWEST, min(REPLAYS, int(RUN_US / (once * count))))
    medians = sorted(statistics.median(watch.us(work) for _ in range(replays)) / count for _ in range(2))
    return Timing(medians[0], medians[1] / medians[0] - 1, captured)


def _captured(calls: Sequence[Callable[[], object]]) -> tuple[Callable[[], object], bool]:
    def loop() -> None:
        for call in calls:
            call()

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            loop()
    except RuntimeError:  # something in it synchronizes
        torch.cuda.synchronize()
        return loop, False
    return graph.replay, True
