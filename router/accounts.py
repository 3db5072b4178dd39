"""What a request comes to, counted while it is served: for its tenant's share, the controller's report and the trace.

A layer around dispatch that changes nothing about the tokens. It keeps nothing of a request that has ended.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from cluster.errors import TandemError
from router import request_log, tracing
from router.choices import Serve
from router.gate import Pass
from router.http_errors import code
from router.recorder import Recorded, Recorder, block_ids
from router.report import Tally
from router.request import Delta, Request

TENANT_DIGITS = 12  # of a tenant's tag, as a number that JSON keeps exact


class Account:
    """All choices of one API request: they share its turn, its arrival and its priority."""

    def __init__(self, serve: Serve, passage: Pass, arrival_s: float, tally: Tally, recorder: Recorder | None) -> None:
        self._serve = serve
        self._passage = passage
        self._arrival_s = arrival_s  # monotonic
        self._tally = tally
        self._recorder = recorder

    async def serve(self, request: Request) -> AsyncGenerator[Delta, None]:
        """As `Dispatcher.serve`."""
        self._tally.requests += 1
        self._tally.prompt_tokens += len(request.prompt)
        first_s = last_s = 0.0  # monotonic times of deliveries
        tokens = cached_tokens = 0
        outcome, failed, span = request_log.CLOSED, False, tracing.generation(request)
        try:
            async with aclosing(self._serve(replace(request, span=span))) as deltas:
                async for delta in deltas:
                    now_s, new = time.monotonic(), len(delta.tokens)
                    if first_s:
                        self._tally.went_on(now_s - last_s, new, now_s)
                    else:
                        first_s, cached_tokens = now_s, delta.cached_tokens
                        self._began(len(request.prompt) - cached_tokens, now_s)
                    last_s = now_s
                    tokens += new
                    self._tally.output_tokens += new
                    self._passage.delivered(new)
                    outcome = delta.finish or outcome
                    yield delta
        except Exception as error:
            outcome, failed = code(error), True
            if isinstance(error, TandemError) and not first_s:
                self._passage.failed()
            raise
        finally:  # finished, failed, or nobody wants more: what was served was served
            ttft_ms = 1000 * (first_s - self._arrival_s) if first_s else None
            itl_ms = 1000 * (last_s - first_s) / (tokens - 1) if tokens > 1 else None
            request_log.finished(request, outcome, tokens, cached_tokens, ttft_ms, itl_ms)
            tracing.generated(span, request, outcome, failed, tokens, cached_tokens)
            if tokens and self._recorder is not None:
                self._recorder.record(self._line(self._recorder, request, tokens, cached_tokens, first_s, last_s))

    def _began(self, computed: int, now_s: float) -> None:
        self._tally.uncached_tokens += computed
        self._tally.began(now_s - self._arrival_s, now_s)
        self._passage.computed(computed)

    def _line(
        self, recorder: Recorder, request: Request, tokens: int, cached_tokens: int, first_s: float, last_s: float
    ) -> Recorded:
        route = request.decisions[0].route if request.decisions else None
        return Recorded(
            arrival_ms=recorder.since_start_ms(self._arrival_s),
            prompt_tokens=len(request.prompt),
            output_tokens=tokens,
            blocks=block_ids(request.hashes or (), len(request.prompt), recorder.block_size),
            tenant=int(request.tenant[:TENANT_DIGITS], 16),
            priority=self._passage.item.priority,
            ttft_ms=1000 * (first_s - self._arrival_s),
            itl_ms=1000 * (last_s - first_s) / (tokens - 1) if tokens > 1 else 0.0,
            cached_tokens=cached_tokens,
            prefill=route.prefill if route else None,
            decode=route.decode if route else None,
        )
