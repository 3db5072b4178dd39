"""A distribution of weighted values in buckets of equal ratio: exact count and sum, quantiles within half a per cent.

Millions of gaps between tokens cost a few hundred counters, a run of decode steps of about equal length one addition.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

RATIO = 1.01  # of a bucket's upper to its lower edge
_LOG = math.log(RATIO)


class Histogram:
    def __init__(self) -> None:
        self.count = 0
        self.sum = 0.0
        # bucket -> weight; bucket i holds RATIO**i .. RATIO**(i+1)
        self._counts: defaultdict[int, float] = defaultdict(float)

    def add(self, value: float, weight: int = 1) -> None:
        self.count += weight
        self.sum += value * weight
        self._counts[math.floor(math.log(value) / _LOG) if value > 1e-9 else -(10**9)] += weight

    def add_line(self, first: float, slope: float, steps: int, weight: int) -> None:
        """`weight` each of first, first + slope, ..., for so many steps; first > 0, slope >= 0."""
        self.count += steps * weight
        self.sum += (first + slope * (steps - 1) / 2) * steps * weight
        while True:
            bucket = math.floor(math.log(first) / _LOG)
            if steps == 1 or slope <= 0 or first + slope * (steps - 1) < (edge := RATIO ** (bucket + 1)):
                self._counts[bucket] += steps * weight
                return
            inside = min(steps - 1, max(1, math.ceil((edge - first) / slope)))
            self._counts[bucket] += inside * weight
            first, steps = first + slope * inside, steps - inside

    def scattered(self, error: float) -> Histogram:
        """The same values, each times a random factor of mean 1 whose mean distance from 1 is `error` (log-normal)."""
        if error <= 0:
            return self
        sigma = error * math.sqrt(math.pi / 2) / _LOG  # in buckets
        middle = -sigma * sigma * _LOG / 2
        reach = range(math.floor(middle - 4 * sigma), math.ceil(middle + 4 * sigma) + 1)
        kernel = [(shift, math.exp(-(((shift - middle) / sigma) ** 2) / 2)) for shift in reach]
        whole = sum(weight for _, weight in kernel)
        made = Histogram()
        made.count, made.sum = self.count, self.sum
        for bucket, count in self._counts.items():
            for shift, weight in kernel:
                made._counts[bucket + shift] += count * weight / whole
        return made

    def merge(self, other: Histogram) -> None:
        """Add all that the other one has."""
        self.count += other.count
        self.sum += other.sum
        for bucket, weight in other._counts.items():
            self._counts[bucket] += weight

    def to_json(self) -> list[Any]:
        return [self.count, self.sum, sorted(self._counts.items())]

    @classmethod
    def from_json(cls, row: Sequence[Any]) -> Histogram:
        """The inverse of to_json."""
        made = cls()
        made.count, made.sum = int(row[0]), float(row[1])
        for bucket, weight in row[2]:
            made._counts[int(bucket)] += weight
        return made

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """The middle of the bucket that holds it; 0 when nothing was added."""
        wanted = share * self.count
        for bucket, weight in sorted(self._counts.items()):
            wanted -= weight
            if wanted <= 0:
                return float(RATIO ** (bucket + 0.5)) if bucket > -(10**9) else 0.0
        return 0.0

    def points(self) -> list[tuple[float, float]]:
        """(value, share of the weight at or below it), ascending: the distribution function."""
        total, points = 0.0, list[tuple[float, float]]()
        for bucket, weight in sorted(self._counts.items()):
            total += weight
            points.append((float(RATIO ** (bucket + 0.5)) if bucket > -(10**9) else 0.0, total / self.count))
        return points
