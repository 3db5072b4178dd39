"""Virtual time: what happens next, in order. Equal times keep the order they were asked for in, so runs repeat."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Events:
    """Seconds since the run began. None is ever taken back: who asked for one checks that it still means something."""

    def __init__(self) -> None:
        self.now = 0.0
        self.count = 0  # events that happened
        self._order = 0
        self._stopped = False
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def at(self, time_s: float, act: Callable[..., None], *values: Any) -> None:
        """Call `act(*values)` at that time, which is not before now."""
        self._order += 1
        heapq.heappush(self._heap, (time_s, self._order, act, values))

    def after(self, seconds: float, act: Callable[..., None], *values: Any) -> None:
        self.at(self.now + seconds, act, *values)

    def run(self, until_s: float) -> None:
        """Until nothing is left, time is up, or something that happens calls `stop`."""
        heap, pop = self._heap, heapq.heappop
        while heap and not self._stopped:
            time_s, _, act, values = pop(heap)
            if time_s > until_s:
                return
            self.now = time_s
            self.count += 1
            act(*values)

    def stop(self) -> None:
        self._stopped = True
