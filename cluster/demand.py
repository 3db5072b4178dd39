"""What clients ask for per second, from the counters that routers report.

What waits in a router has arrived as well, although its counters know only what went on to workers: else a queue that
is served would look like demand long after the clients ask for something else. Routers come, go and restart: a router
counts from the second time it is seen, and one whose counters went back has begun anew. The rates are over the last
half minute, unless the last few seconds say clearly otherwise: then those count. So a steady demand is known precisely
and a change soon. Pure; told the time. Refuses to forecast.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from cluster.messages import RouterInfo
from cluster.pools import Demand

SHORT_S = 3.0
LONG_S = 30.0
ENOUGH = 20  # requests that a short stretch holds at least
CHANGED = 3.0  # standard errors by which the short stretch differs from the long one when the demand has changed

_Counts = tuple[int, int, int, int]  # requests, prompt tokens, uncached prompt tokens, output tokens


class DemandMeter:
    """Feed it what `Membership.reports` says, once or twice a second."""

    def __init__(self) -> None:
        self._routers: dict[str, tuple[float, int, _Counts]] = {}  # id -> when seen last, pid, its counters then
        self._total: _Counts = (0, 0, 0, 0)  # of what went on to workers, over all routers
        self._sums: deque[tuple[float, _Counts]] = deque()  # the same with what waited then, oldest first
        self._now: tuple[RouterInfo, ...] = ()

    def observe(self, routers: Iterable[RouterInfo], now_s: float) -> None:
        """What the routers of the deployment say at that time, all of them together."""
        self._now = tuple(routers)
        for router in self._now:
            counts = _counts(router)
            if (last := self._routers.get(router.id)) is not None:
                self._total = _add(self._total, _since(last[1], last[2], router.pid, counts))
            self._routers[router.id] = (now_s, router.pid, counts)
        self._routers = {key: seen for key, seen in self._routers.items() if now_s - seen[0] <= LONG_S}
        tokens = sum(router.waiting_tokens for router in self._now)
        waiting = sum(router.waiting for router in self._now), tokens, tokens, 0
        self._sums.append((now_s, _add(self._total, waiting)))
        while len(self._sums) > 2 and self._sums[1][0] <= now_s - LONG_S:
            self._sums.popleft()

    def demand(self) -> Demand:
        """As of the last observation; nothing before the first."""
        if not self._sums:
            return Demand()
        until, latest = self._sums[-1]
        start, first = self._start()
        span = max(until - start, SHORT_S)  # a history that is shorter still says too little: rather less than it seems
        requests, prompt, uncached, output = _difference(latest, first)
        return Demand(
            requests_s=requests / span,
            uncached_tokens_s=uncached / span,
            output_tokens_s=output / span,
            waiting=sum(router.waiting for router in self._now),
            waiting_tokens=sum(router.waiting_tokens for router in self._now),
            ttft_ms=_mean([router.ttft_ms for router in self._now]),
            itl_ms=_mean([router.itl_ms for router in self._now]),
            prompt_tokens_s=prompt / span,
            requests=float(requests),
        )

    def _start(self) -> tuple[float, _Counts]:
        """The observation that the rates are counted from: the oldest, or after a change the latest that will do."""
        until, latest = self._sums[-1]
        oldest = self._sums[0]
        for at, counts in reversed(self._sums):
            if until - at >= SHORT_S and latest[0] - counts[0] >= ENOUGH:
                part = (until - at) / (until - oldest[0])
                changed = _changed(_difference(latest, counts), _difference(latest, oldest[1]), part)
                return (at, counts) if changed else oldest
        return oldest


def _counts(router: RouterInfo) -> _Counts:
    return (
        router.requests_total,
        router.prompt_tokens_total,
        router.uncached_tokens_total,
        router.output_tokens_total,
    )


def _since(pid: int, before: _Counts, now_pid: int, now: _Counts) -> _Counts:
    """What was counted in between; all of it when the router began anew."""
    if pid != now_pid or any(new < old for new, old in zip(now, before, strict=True)):
        return now
    return _difference(now, before)


def _difference(a: _Counts, b: _Counts) -> _Counts:
    """Not less than nothing: what waited may have been given up."""
    return (max(0, a[0] - b[0]), max(0, a[1] - b[1]), max(0, a[2] - b[2]), max(0, a[3] - b[3]))


def _changed(short: _Counts, long: _Counts, part: float) -> bool:
    """Whether what was counted over that part of the time is another rate than over all of it. The number of tokens of
    requests that come by chance has twice the relative variance of the number of requests."""
    doubt = CHANGED * math.sqrt(2 / short[0])
    return any(abs(few - part * many) > doubt * part * many for few, many in zip(short[2:], long[2:], strict=True))


def _add(a: _Counts, b: _Counts) -> _Counts:
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3])


def _mean(values: list[float]) -> float:
    """Of those that are not 0, which means none."""
    known = [value for value in values if value > 0]
    return sum(known) / len(known) if known else 0.0
