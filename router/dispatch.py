"""One request from placement to its last token. The request is one coroutine, and whatever goes wrong ends here.

    attempt 0   place -> PrefillJob -> Accepted(handoff) -> DecodeJob(handoff)   tokens come from both legs
    attempt 1   the decode leg failed: place again without that worker, with the tokens delivered so far as `output`
    ...         at most ATTEMPTS, then the error of the last one

Whichever way `serve` is left, the legs of every attempt are aborted at their workers unless they are known to have
finished. What happens within one attempt is `router/attempt.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from cluster.errors import TandemError
from router.attempt import Attempt
from router.fleet import Fleet
from router.request import Delta, Progress, Request

ATTEMPTS = 3

log = logging.getLogger(__name__)


class Dispatcher:
    """Serves requests on a fleet; holds nothing of a request but the aborts still under way."""

    def __init__(self, fleet: Fleet, request_timeout_s: float) -> None:
        self._fleet = fleet
        self._request_timeout_s = request_timeout_s
        self._background: set[asyncio.Task[None]] = set()

    async def serve(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Yields until a Delta has `finish`. Raises a TandemError that fits the client: retriable ones were retried.

        Close the iterator (`contextlib.aclosing`) when leaving early: that is what aborts the legs.
        """
        progress = Progress(request, time.monotonic() + self._request_timeout_s)
        error: TandemError | None = None
        for number in range(ATTEMPTS):
            attempt = Attempt(self._fleet, progress, number)
            try:
                await attempt.start()
                while True:
                    delta = await attempt.next()
                    yield delta
                    if delta.finish:
                        return
            except TandemError as failure:
                if not attempt.placed:
                    raise error or failure from None  # nobody is left; the reason why says more
                if not failure.retriable or progress.remaining_s <= 0:
                    raise
                log.warning("attempt %d of %s failed: %s", number, request.id, failure.message)
                error = failure
            finally:
                self._spawn(attempt.leave())
        assert error is not None
        raise error

    async def close(self) -> None:
        """Wait for the aborts under way; each has its own deadline."""
        if self._background:
            await asyncio.wait(self._background)

    def _spawn(self, aborts: list[Coroutine[Any, Any, None]]) -> None:
        for abort in aborts:
            task = asyncio.create_task(abort)
            self._background.add(task)
            task.add_done_callback(self._background.discard)
