"""How much passes through workers per second, from the lifetime counters that they report.

Over the last few seconds, so that one large step or handoff is no peak. A worker counts from the second time it is
seen, and one that has begun anew counts from there. Told the time; knows no connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import astuple, dataclass

from cluster.messages import Load

SPAN_S = 5.0


@dataclass(frozen=True, slots=True)
class Flow:
    """Per second."""

    prompt_tokens: float = 0.0  # computed
    output_tokens: float = 0.0
    handoff_bytes: float = 0.0  # brought in
    fetched_tokens: float = 0.0  # of prompts, from stores


_Counters = tuple[float, ...]  # in the order of Flow's fields


class Flows:
    """Of the workers of one fleet. Feed it about once a second."""

    def __init__(self) -> None:
        self._seen: dict[
            str, tuple[int, deque[tuple[float, _Counters]]]
        ] = {}  # worker -> incarnation, (when, counters)

    def observe(self, loads: Iterable[tuple[str, int, Load]], now_s: float) -> None:
        """(worker, its incarnation, what it said last) of all that are connected; the others are forgotten."""
        seen: dict[str, tuple[int, deque[tuple[float, _Counters]]]] = {}
        for worker_id, incarnation, load in loads:
            before, counted = self._seen.get(worker_id, (incarnation, deque()))
            seen[worker_id] = incarnation, counted if before == incarnation else deque()
            _add(seen[worker_id][1], now_s, _counters(load))
        self._seen = seen

    def of(self, worker_id: str) -> Flow:
        _, counted = self._seen.get(worker_id, (0, deque()))
        if len(counted) < 2:
            return Flow()
        (first_s, first), (last_s, last) = counted[0], counted[-1]
        return Flow(*((new - old) / (last_s - first_s) for old, new in zip(first, last, strict=True)))

    def total(self) -> Flow:
        return Flow(*map(sum, zip(*(astuple(self.of(worker_id)) for worker_id in self._seen), strict=True)))


def _add(counted: deque[tuple[float, _Counters]], now_s: float, counters: _Counters) -> None:
    if counted and counted[-1][0] >= now_s:
        return
    counted.append((now_s, counters))
    while len(counted) > 2 and counted[1][0] <= now_s - SPAN_S:
        counted.popleft()


def _counters(load: Load) -> _Counters:
    fetched = load.fetched_memory_tokens_total + load.fetched_disk_tokens_total + load.fetched_remote_tokens_total
    return (load.prompt_tokens_total, load.output_tokens_total, load.handoff_bytes_total, fetched)
