"""What happened to the cluster lately, in words: what the controller says it did, and what this router saw itself.

The controller tells of roles and sizes (`cluster.messages.ControllerInfo`); that a worker or Redis was lost and came
back, only whoever is connected knows. Bounded, newest last. No clock: times are words for people, and the order is the
one in which things were learnt.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["role", "scale", "failure", "recovery"]
State = Literal["serving", "draining", "lost"]
KEPT = 64
_CLOCK = re.compile(r"(\d\d:\d\d:\d\d) (.*)", re.DOTALL)
_KINDS: tuple[tuple[Kind, re.Pattern[str]], ...] = (  # the first that fits; what is left is about sizes
    ("failure", re.compile(r"failed[:,] |did not start: |is lost|is unreachable")),
    ("recovery", re.compile(r"is back|answers again")),
    ("role", re.compile(r"turns to |each role has |the busier pool ")),
)


@dataclass(frozen=True, slots=True)
class Event:
    at: str  # HH:MM:SS, UTC
    kind: Kind
    words: str


def event(line: str) -> Event:
    """From a line as the controller writes them: the time of day and what was done."""
    match = _CLOCK.fullmatch(line)
    at, words = match.groups() if match else ("", line)
    return Event(at, next((kind for kind, pattern in _KINDS if pattern.search(words)), "scale"), words)


def added(before: Sequence[str], now: Sequence[str]) -> Sequence[str]:
    """What `now` has behind what it still has of `before`, both being the latest lines of one log."""
    for gone in range(len(before) + 1):
        kept = before[gone:]
        if tuple(now[: len(kept)]) == tuple(kept):
            return now[len(kept) :]
    return now


class EventLog:
    """Of one cluster, as one router sees it. Feed it about once a second."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=KEPT)
        self._lines: tuple[str, ...] = ()  # the controller's, when it was last heard
        self._workers: dict[str, State] = {}  # as they were at the last look
        self._found: set[str] | None = None  # there at the first look and not connected since; None: never looked
        self._redis = True

    def latest(self) -> tuple[Event, ...]:
        return tuple(self._events)

    def hear(self, lines: tuple[str, ...]) -> None:
        """What the controller reports to have done, newest last."""
        self._events.extend(map(event, added(self._lines, lines)))
        self._lines = lines

    def look(self, workers: Mapping[str, State], redis: bool, clock: str) -> None:
        """What there is now, at that time of day. How it was found is no event, and who drains goes without a word."""
        if self._found is None:
            self._found = set(workers)
        known = self._workers
        # one that has not been connected yet is not lost: it is about to join
        self._workers = {k: state for k, state in workers.items() if state != "lost" or k in known}
        for worker_id, state in workers.items():
            before = known.get(worker_id)
            if state == before or "draining" in (state, before):
                continue
            if state == "lost":
                if before == "serving":
                    self._note(clock, f"{worker_id} is lost")
                continue
            if before == "lost":
                self._note(clock, f"{worker_id} is back")
            elif worker_id not in self._found:
                self._note(clock, f"{worker_id} has joined")
            self._found.discard(worker_id)
        if redis != self._redis:
            self._note(clock, "Redis answers again" if redis else "Redis is unreachable: roles and sizes stay")
        self._redis = redis

    def _note(self, clock: str, words: str) -> None:
        self._events.append(event(f"{clock} {words}"))
