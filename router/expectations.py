"""What requests turn out to be, learnt from those before: how long outputs are, how much of a prompt is computed.

Admission and placement have to know before anybody can; the router and the simulator guess by these. Each is a mean
that forgets. Pure: no clock, nothing awaited.
"""

from __future__ import annotations

TYPICAL_TOKENS = 128.0  # of output, before any request has ended
TYPICAL_WEIGHT = 1 / 32  # of the latest output in the mean
SHARE_WEIGHT = 0.05  # of the latest prompt in the part that had to be computed


class OutputLength:
    """Tokens that requests get, to their end."""

    def __init__(self) -> None:
        self._mean = TYPICAL_TOKENS

    def observe(self, tokens: int) -> None:
        """A request has ended with so many."""
        self._mean += TYPICAL_WEIGHT * (tokens - self._mean)

    def remaining(self, delivered: int) -> int:
        """Of a request that has so many: as many as are typical, again and again."""
        typical = max(1, round(self._mean))
        return typical - delivered % typical


class ComputedShare:
    """Computed prompt tokens per estimated one: prefix hits, and estimates that are off."""

    def __init__(self) -> None:
        self._mean = 1.0

    def observe(self, estimated: int, computed: int) -> None:
        """What was taken for so many prompt tokens came to so many that were computed."""
        self._mean += SHARE_WEIGHT * (computed / max(1, estimated) - self._mean)

    def of(self, estimated: int) -> int:
        """Tokens that a prompt of that size is expected to cost, at least one."""
        return max(1, round(estimated * self._mean))
