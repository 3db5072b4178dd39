"""Every request of this process goes through here: sent, measured, and shown to Locust as rows of its own.

Rows are TTFT, ITL and E2E, named after the scenario; the E2E row carries the output tokens as its content length and is
the only one that can fail. Nothing is decided here about who asks what and when a run ends.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import gevent
from gevent.event import Event

from loadtests.client import Answer, Ask, Client
from loadtests.measurements import Measurements
from loadtests.slo import Limits, limits_of, within

ROWS_AT_ONCE = 64  # shown to Locust before others may run: a row takes about 20 µs, and nobody is to be late for them


class Recorder:
    def __init__(self, events: Any, client: Client, slo: dict[str, Limits], warmup_s: float) -> None:
        """Begins now. `slo` says which requests are good, by scenario."""
        self.measurements = Measurements()
        self.ending = Event()  # nobody begins anything any more
        self.start_s = time.perf_counter()
        self._events = events
        self._client = client
        self._slo = slo
        self._warmup_s = warmup_s
        self._users: Counter[str] = Counter()
        self._flying = 0
        self._landed = Event()  # nothing is under way
        self._landed.set()

    def join(self, scenario: str) -> int:
        """A user of this process begins; how many of that scenario have done so before."""
        self._users[scenario] += 1
        return self._users[scenario] - 1

    def encode(self, ask: Ask) -> bytes:
        """The body that `perform` would make, for one who wants to have it ready."""
        return self._client.encode(ask)

    def perform(self, scenario: str, ask: Ask, due_s: float | None = None, body: bytes | None = None) -> Answer:
        """Send it and wait for the answer. `due_s` is when it should have been sent, in seconds since the beginning."""
        now_s = self.now()
        counts = (due_s if due_s is not None else now_s) >= self._warmup_s
        if counts:
            self.measurements.begun(scenario, now_s, None if due_s is None else max(0.0, now_s - due_s))
        self._flying += 1
        self._landed.clear()
        try:
            answer = self._client.send(ask, body)
        finally:
            self._flying -= 1
            if not self._flying:
                self._landed.set()
        if counts:
            self.measurements.ended(scenario, self.start_s, answer, self._good(scenario, answer))
        self._show(scenario, answer)
        return answer

    def now(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.start_s

    def pause(self, seconds: float) -> bool:
        """Whether it is still going on after that; returns at once when it ends."""
        until_s = self.now() + seconds
        # gevent's timers count from when its loop last looked at the clock, so they may be early
        while (left_s := until_s - self.now()) > 0 and not self.ending.is_set():
            self.ending.wait(left_s)
        return not self.ending.is_set()

    def end(self, patience_s: float) -> None:
        """Let nobody begin anything more, and wait for the answers that are under way, so long at the most."""
        self.ending.set()
        self._landed.wait(patience_s)

    def _good(self, scenario: str, answer: Answer) -> bool:
        if answer.error or answer.left:
            return False
        return within(limits_of(self._slo, scenario), answer.ttft_s, answer.tpot_s)

    def _show(self, scenario: str, answer: Answer) -> None:
        if answer.left:
            return
        self._row("E2E", scenario, answer.e2e_s, answer.output_tokens, answer.error)
        if answer.error:
            return
        self._row("TTFT", scenario, answer.ttft_s)
        for number, gap_s in enumerate(answer.itls_s, 1):
            self._row("ITL", scenario, gap_s)
            if number % ROWS_AT_ONCE == 0:
                gevent.sleep(0)

    def _row(self, kind: str, scenario: str, seconds: float, tokens: int = 0, error: str = "") -> None:
        self._events.request.fire(
            request_type=kind,
            name=scenario,
            response_time=1000 * seconds,
            response_length=tokens,
            exception=RuntimeError(error) if error else None,
            context={},
        )
