"""When requests arrive: at their times or, where a conversation waits for answers, after those and some thought."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from loadtests.simulator.events import Events
from loadtests.simulator.trace import TraceRequest


class Arrivals:
    """Requests in the order of their arrival; of an iterator only the next one is held.

    A turn with `think_s` (in a list or tuple of requests) arrives that long after the turn before it in its session has
    ended, one way or another.
    """

    def __init__(
        self, requests: Iterable[TraceRequest], events: Events, arrive: Callable[[TraceRequest, int], None]
    ) -> None:
        self._events = events
        self._arrive = arrive
        self._next = 0
        self._ended = False
        self._thinking = 0  # turns whose time has been set by an answer
        self._later: dict[tuple[int, int], TraceRequest] = {}  # (session, turn) -> a turn that waits for the one before
        if isinstance(requests, (list, tuple)):
            known = {(r.session, r.turn) for r in requests if r.session >= 0}
            waits = {id(r) for r in requests if r.think_s is not None and (r.session, r.turn - 1) in known}
            self._later = {(r.session, r.turn): r for r in requests if id(r) in waits}
            requests = [r for r in requests if id(r) not in waits]
        self._requests: Iterator[TraceRequest] = iter(requests)
        self._ask()

    @property
    def over(self) -> bool:
        """Nobody is to come any more."""
        return self._ended and not self._later and not self._thinking

    def _ask(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self._ended = True
            return
        self._events.at(max(self._events.now, request.arrival_s), self._came, request)

    def _came(self, request: TraceRequest) -> None:
        self._ask()
        self._count(request)

    def _count(self, request: TraceRequest) -> None:
        self._next += 1
        self._arrive(request, self._next - 1)

    def finished(self, request: TraceRequest) -> None:
        """A request has ended, one way or another: the next turn of its session may come."""
        follower = self._later.pop((request.session, request.turn + 1), None)
        if follower is not None:
            self._thinking += 1
            self._events.after(follower.think_s or 0.0, self._thought, follower)

    def _thought(self, request: TraceRequest) -> None:
        self._thinking -= 1
        self._count(request)
