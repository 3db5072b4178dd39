"""One log line per choice of a request that went to workers, when it ends: who, how much, how fast, where, and how.

With JSON logs the figures are fields. Ids and numbers only: no text, no token, no key; the tenant is the tag that is
its unit in the stores. Requests that were refused at the door are counted, not logged.
"""

from __future__ import annotations

import logging

from router.request import Request

CLOSED = "closed"  # nobody wanted more: the text had a stop sequence in it, or the client left
log = logging.getLogger(__name__)


def finished(
    request: Request, outcome: str, tokens: int, cached_tokens: int, ttft_ms: float | None, itl_ms: float | None
) -> None:
    """`outcome`: stop, length, closed, or an error's code. `tokens`: delivered. Times are None where there were too
    few tokens to tell."""
    route = request.decisions[-1].route if request.decisions else None
    fields = {
        "request_id": request.id,
        "outcome": outcome,
        "tenant": request.tenant,
        "prompt_tokens": len(request.prompt),
        "cached_tokens": cached_tokens,
        "output_tokens": tokens,
        "ttft_ms": ttft_ms and round(ttft_ms, 1),
        "itl_ms": itl_ms and round(itl_ms, 2),
        "prefill": route and route.prefill,
        "decode": route and route.decode,
        "placements": len(request.decisions),
    }
    log.info("request %s ended: %s, %d tokens", request.id, outcome, tokens, extra={"fields": fields})
