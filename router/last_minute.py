"""What was observed in the last minute, as a count, a sum and percentiles, in memory that no traffic can grow.

One slice per second: its count and sum are exact, of its values a fair sample is kept (Vitter's Algorithm R, "Random
Sampling with a Reservoir", 1985), each standing for as many as were observed per value kept. For people who look now;
what is kept for longer is in /metrics. Told the time; refuses to remember more.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np

SPAN_S = 60
KEPT = 64  # values of a second
ROUNDING = 1e-6  # of a sum of weights


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of at least one observation: for each the least value that, with all below it, is that part of them."""

    count: int
    p50: float
    p95: float
    p99: float


@dataclass(slots=True)
class _Slice:
    second: int
    count: int = 0
    total: float = 0.0
    kept: list[float] = field(default_factory=list)


class LastMinute:
    def __init__(self) -> None:
        self._slices: deque[_Slice] = deque()  # oldest first
        self._rng = random.Random()

    def observe(self, value: float, now_s: float) -> None:
        """`now_s` never goes back."""
        second = int(now_s)
        if not self._slices or self._slices[-1].second != second:
            self._slices.append(_Slice(second))
            self._forget(now_s)
        newest = self._slices[-1]
        newest.count += 1
        newest.total += value
        if len(newest.kept) < KEPT:
            newest.kept.append(value)
        elif (at := self._rng.randrange(newest.count)) < KEPT:
            newest.kept[at] = value

    def sums(self, now_s: float) -> tuple[int, float]:
        """(number, sum) of what was observed."""
        self._forget(now_s)
        return sum(piece.count for piece in self._slices), sum(piece.total for piece in self._slices)

    def percentiles(self, now_s: float) -> Percentiles | None:
        """None when nothing was observed."""
        count, _ = self.sums(now_s)
        if not count:
            return None
        values = np.array([value for piece in self._slices for value in piece.kept])
        kept = np.array([len(piece.kept) for piece in self._slices])
        weights = np.repeat(np.array([piece.count for piece in self._slices]) / kept, kept)
        order = values.argsort()
        ranks = np.array([0.5, 0.95, 0.99]) * count - ROUNDING
        found = np.searchsorted(weights[order].cumsum(), ranks)
        p50, p95, p99 = values[order][np.minimum(found, values.size - 1)].tolist()
        return Percentiles(count, p50, p95, p99)

    def _forget(self, now_s: float) -> None:
        while self._slices and self._slices[0].second <= now_s - SPAN_S:
            self._slices.popleft()
