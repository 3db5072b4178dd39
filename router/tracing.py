"""The router's spans of a request: what it waited for, where it was placed and why, and one per leg.

    request                          from the HTTP door to the last byte; under the client's span, if it sent one
    ├── queue                        until its turn at the gate
    └── generation                   one per choice of a prompt
        ├── placement                one per decision: the route, what it is predicted to cost, what is cached
        ├── prefill leg, decode leg  from the submission to the last word of that worker
        └── ...                      again, when a worker was lost or gave the request up: attempt 1, 2, ...

The worker's own spans hang under the legs (`workers/tracing.py`). Names and attributes are said here; ids, counts,
times and reasons, never text or tokens. Where a request is not traced, nothing is made.
"""

from __future__ import annotations

import time

from starlette.datastructures import Headers
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster import telemetry
from cluster.telemetry import INVALID_SPAN, Span, SpanKind
from router.placement import Decision
from router.request import Request

PATHS = ("/v1/chat/completions", "/v1/completions")


class Tracing:
    """ASGI: a span per generation request that came with a valid key. Added only where there are traces."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in PATHS or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        asked = {
            "http.request.method": "POST",
            "url.path": scope["path"],
            "tandem.request_id": state.get("request_id"),
        }
        span = state["span"] = telemetry.root("request", Headers(scope=scope), asked)
        status: int | None = None

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        error = ""
        try:
            await self._app(scope, receive, send_and_see)
        except BaseException as raised:
            error = telemetry.code(raised)
            raise
        finally:
            failed = str(status) if status is not None and status >= 500 else ""
            telemetry.end(span, {"http.response.status_code": status}, error or failed)


def of(request: HttpRequest) -> Span:
    """The span of an HTTP request."""
    span: Span = getattr(request.state, "span", INVALID_SPAN)
    return span


def generation(request: Request) -> Span:
    """The span of one choice; whoever serves it has `generated` called in the end."""
    about = {"tandem.request_id": request.id, "gen_ai.usage.input_tokens": len(request.prompt)}
    return telemetry.start("generation", request.span, about)


def generated(span: Span, request: Request, outcome: str, failed: bool, tokens: int, cached_tokens: int) -> None:
    """`outcome`: why it ended, or the code of an error."""
    about = {
        "gen_ai.usage.output_tokens": tokens,
        "tandem.outcome": outcome,
        "tandem.cached_tokens": cached_tokens,
        "tandem.placements": len(request.decisions),
    }
    telemetry.end(span, about, outcome if failed else "")


class AttemptTrace:
    """The spans of one attempt at a request, under its generation."""

    def __init__(self, request: Request, number: int) -> None:
        self._parent = request.span
        self._number = number
        self._legs: dict[str, Span] = {}  # leg id -> span, until its worker has said its last word

    def placed(self, began_s: float, decision: Decision) -> None:
        """It took from `began_s` until now."""
        if not self._parent.is_recording():
            return
        chosen = decision.chosen
        about: dict[str, object] = {
            "tandem.attempt": self._number,
            "tandem.prefill": decision.route.prefill,
            "tandem.decode": decision.route.decode,
            "tandem.policy": decision.policy,
            "tandem.candidates": decision.candidates,
            "tandem.uncached_tokens": decision.uncached_tokens,
        }
        if chosen is not None:
            about |= {
                "tandem.kind": decision.kind,
                "tandem.device_tokens": chosen.device_tokens,
                "tandem.fetched_tokens": chosen.fetched_tokens,
                "tandem.predicted_queue_ms": chosen.queue_ms,
                "tandem.predicted_prefill_ms": chosen.prefill_ms,
                "tandem.predicted_fetch_ms": chosen.fetch_ms,
                "tandem.predicted_handoff_ms": chosen.handoff_ms,
                "tandem.predicted_decode_ms": chosen.decode_ms,
            }
        telemetry.record("placement", self._parent, began_s, time.monotonic(), about)

    def leg(self, leg_id: str, kind: str, worker: str) -> Span:
        """A job is about to be submitted; make the span current for that."""
        about = {"tandem.attempt": self._number, "tandem.leg": leg_id, "tandem.worker": worker}
        span = telemetry.start(f"{kind} leg", self._parent, about, SpanKind.CLIENT)
        if span.is_recording():
            self._legs[leg_id] = span
        return span

    def leg_over(self, leg_id: str, error: str = "") -> None:
        """`error`: the code of what ended it."""
        if (span := self._legs.pop(leg_id, None)) is not None:
            telemetry.end(span, error=error)

    def over(self) -> None:
        """Nobody listens to its legs any more."""
        for leg_id in list(self._legs):
            self.leg_over(leg_id)
