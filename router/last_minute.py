"""What was observed in the last minute, as a count, a sum and percentiles, in memory that no traffic can grow.

One slice per second: its count and sum are exact, of its values a fair sample is kept (Vitter's Algorithm R, "Random
Sampling with a Reservoir", 1985), each standing for as many as were observed per value kept. For people who look now;
what is kept for longer is in /metrics. Told the time; refuses to remember more.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

SPAN_S = 60
KEPT = 64  # values of a second


@dataclass(frozen=True, slots=True)
class Summary:
    """Of at least one observation."""

    count: int
    total: float
    p50: float
    p95: float
    p99: float

    @property
    def mean(self) -> float:
        return self.total / self.count


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

    def summary(self, now_s: float) -> Summary | None:
        """None when nothing was observed."""
        self._forget(now_s)
        count = sum(piece.count for piece in self._slices)
        if not count:
            return None
        weighted = sorted((value, piece.count / len(piece.kept)) for piece in self._slices for value in piece.kept)
        p50, p95, p99 = (_percentile(weighted, part * count) for part in (0.5, 0.95, 0.99))
        return Summary(count, sum(piece.total for piece in self._slices), p50, p95, p99)

    def _forget(self, now_s: float) -> None:
        while self._slices and self._slices[0].second <= now_s - SPAN_S:
            self._slices.popleft()


def _percentile(weighted: list[tuple[float, float]], rank: float) -> float:
    """The least value that, with all before it, weighs `rank`: nearest-rank, without interpolation."""
    reached = 0.0
    for value, weight in weighted:
        reached += weight
        if reached >= rank - 1e-9:
            return value
    return weighted[-1][0]
