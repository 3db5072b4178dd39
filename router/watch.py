"""What an operator sees of the requests that this router serves: the times of the last minute, and the last requests
with the placements that were decided for them.

A layer around dispatch, like `router/accounts.py`, that changes nothing about the tokens. It keeps lengths, times,
workers and the opaque tag of the tenant; never text, tokens or keys.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from cluster.errors import TandemError
from router.choices import Serve
from router.last_minute import LastMinute
from router.metrics import CANCELLED, FINISHED
from router.placement import Decision
from router.request import Delta, Request

ENDED = 50  # requests that are remembered


@dataclass(frozen=True, slots=True)
class Ended:
    """One choice of one prompt, when it was over."""

    number: int  # of those that have ended, from 1
    id: str
    tenant: str
    outcome: str  # finished, cancelled, or an error's code
    prompt_tokens: int
    cached_tokens: int  # of those, not computed
    output_tokens: int  # delivered
    turn_ms: float  # from its arrival until it was tokenized and had its turn
    ttft_ms: float | None  # from its arrival; None: there was no token
    itl_ms: float | None  # mean; None: there were no two deliveries
    total_ms: float
    ended_s: float  # monotonic
    decisions: tuple[Decision, ...]  # in order; the last one served it


@dataclass(slots=True)
class _Course:
    """A request while it is served. Times are monotonic."""

    began_s: float
    first_s: float = 0.0  # 0: no token yet
    last_s: float = 0.0
    first_tokens: int = 0  # that came with the first delivery
    tokens: int = 0
    cached_tokens: int = 0

    @property
    def itl_ms(self) -> float | None:
        later = self.tokens - self.first_tokens
        return 1000 * (self.last_s - self.first_s) / later if later > 0 else None


class Watch:
    """All requests of one router. Times in milliseconds, SLOs in seconds."""

    def __init__(self, serve: Serve, ttft_slo_s: float, itl_slo_s: float) -> None:
        self.ttft_ms = LastMinute()
        self.itl_ms = LastMinute()  # per delivery
        self.prompt_tokens = LastMinute()
        self.cached_tokens = LastMinute()  # of those
        self.kept = LastMinute()  # 1 for a request that kept both SLOs, 0 for one that did not
        self.ended: deque[Ended] = deque(maxlen=ENDED)  # newest last
        self._serve = serve
        self._ttft_slo_ms, self._itl_slo_ms = 1000 * ttft_slo_s, 1000 * itl_slo_s
        self._number = 0

    async def serve(self, request: Request) -> AsyncGenerator[Delta, None]:
        """As `Dispatcher.serve`."""
        course = _Course(time.monotonic())
        outcome = CANCELLED
        try:
            async with aclosing(self._serve(request)) as deltas:
                async for delta in deltas:
                    self._delivered(request, course, delta)
                    if delta.finish:
                        outcome = FINISHED
                    yield delta
        except GeneratorExit:  # whoever reads it has enough, as after a stop string; a client that leaves cancels
            outcome = FINISHED
            raise
        except TandemError as error:
            outcome = error.code
            raise
        finally:
            self._over(request, course, outcome)

    def _delivered(self, request: Request, course: _Course, delta: Delta) -> None:
        now_s, new = time.monotonic(), len(delta.tokens)
        if course.first_s:
            self.itl_ms.observe(1000 * (now_s - course.last_s) / max(1, new), now_s)
        else:
            course.first_s, course.first_tokens, course.cached_tokens = now_s, new, delta.cached_tokens
            self.ttft_ms.observe(1000 * (now_s - request.arrival_s), now_s)
            self.prompt_tokens.observe(len(request.prompt), now_s)
            self.cached_tokens.observe(delta.cached_tokens, now_s)
        course.last_s = now_s
        course.tokens += new

    def _over(self, request: Request, course: _Course, outcome: str) -> None:
        now_s = time.monotonic()
        self._number += 1
        ttft_ms = 1000 * (course.first_s - request.arrival_s) if course.first_s else None
        itl_ms = course.itl_ms
        if outcome != CANCELLED:  # nobody knows how that would have gone on
            in_time = ttft_ms is not None and ttft_ms <= self._ttft_slo_ms and (itl_ms or 0.0) <= self._itl_slo_ms
            self.kept.observe(float(outcome == FINISHED and in_time), now_s)
        self.ended.append(
            Ended(
                number=self._number,
                id=request.id,
                tenant=request.tenant,
                outcome=outcome,
                prompt_tokens=len(request.prompt),
                cached_tokens=course.cached_tokens,
                output_tokens=course.tokens,
                turn_ms=1000 * (course.began_s - request.arrival_s),
                ttft_ms=ttft_ms,
                itl_ms=itl_ms,
                total_ms=1000 * (now_s - request.arrival_s),
                ended_s=now_s,
                decisions=tuple(request.decisions),
            )
        )
