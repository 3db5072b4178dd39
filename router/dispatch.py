"""One request from placement to its last token. The request is one coroutine, and whatever goes wrong ends here.

    attempt 0   place -> PrefillJob -> Accepted(handoff) -> DecodeJob(handoff)   tokens come from both legs
    attempt 1   the decode leg failed: place again without that worker, with the tokens delivered so far as `output`
    ...         at most ATTEMPTS that failed, then the error of the last one
    moved       the worker gave it up so that another goes on: the same, but nobody has failed
    leaving     the worker takes nothing more. Who takes its place may be unknown here for a moment: OTHERS_S at most

Whichever way `serve` is left, the legs of every attempt are aborted at their workers unless they are known to have
finished. What happens within one attempt is `router/attempt.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from cluster.errors import Leaving, Moved, TandemError
from router import chains
from router.attempt import Attempt
from router.expectations import OutputLength
from router.fleet import Fleet
from router.request import Delta, Progress, Request

ATTEMPTS = 3
OTHERS_S, LOOK_S = 10.0, 0.1  # the membership is read once a second, and a worker then has to be connected to
MOVES = 16  # more than any plan has reason for: a worker that gives up whatever it gets must not turn this into a loop

log = logging.getLogger(__name__)


class Dispatcher:
    """Serves requests on a fleet; holds nothing of a request but the aborts still under way."""

    def __init__(self, fleet: Fleet, request_timeout_s: float) -> None:
        self._fleet = fleet
        self._request_timeout_s = request_timeout_s
        self._outputs = OutputLength()
        self._background: set[asyncio.Task[None]] = set()

    async def serve(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Yields until a Delta has `finish`. Raises a TandemError that fits the client: retriable ones were retried.

        Close the iterator (`contextlib.aclosing`) when leaving early: that is what aborts the legs.
        """
        progress = Progress(request, request.arrival_s + self._request_timeout_s, self._outputs)
        error: TandemError | None = None
        number = failures = moves = 0
        while failures < ATTEMPTS and moves < MOVES:
            attempt = Attempt(self._fleet, progress, number, await self._hashes(progress))
            try:
                await attempt.start()
                while True:
                    delta = await attempt.next()
                    if delta.finish:
                        self._outputs.observe(len(progress.tokens))
                    yield delta
                    if delta.finish:
                        return
            except TandemError as failure:
                if not attempt.placed:
                    if await self._others(progress):
                        continue
                    raise error or failure from None  # nobody is left; the reason why says more
                if not failure.retriable or progress.remaining_s <= 0:
                    raise
                log.warning("attempt %d of %s failed: %s", number, request.id, failure.message)
                error = failure
                moved = isinstance(failure, Moved | Leaving)
                failures, moves = failures + (not moved), moves + moved
            finally:
                number += 1
                self._spawn(attempt.leave())
        assert error is not None
        raise error

    async def close(self) -> None:
        """Wait for the aborts under way; each has its own deadline."""
        if self._background:
            await asyncio.wait(self._background)

    async def _others(self, progress: Progress) -> bool:
        """Whether to look again for somebody to place it on: those that refused it were about to leave."""
        if progress.left_s is None or time.monotonic() > min(progress.left_s + OTHERS_S, progress.deadline):
            return False
        await asyncio.sleep(LOOK_S)
        return True

    async def _hashes(self, progress: Progress) -> tuple[bytes, ...]:
        """Of the full blocks of what the next attempt has to compute."""
        request = progress.request
        if request.hashes is not None and not progress.tokens:
            return request.hashes
        tokens = (*request.prompt, *progress.tokens)
        return await chains.hashes(self._fleet.model_key, tokens, request.salt, request.exact)

    def _spawn(self, aborts: list[Coroutine[Any, Any, None]]) -> None:
        for abort in aborts:
            task = asyncio.create_task(abort)
            self._background.add(task)
            task.add_done_callback(self._background.discard)
