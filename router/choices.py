"""All choices of one API request, generated at once: tokens become text here, and text becomes usage.

Each choice is a dispatch of its own in a task of its own; their pieces meet in one queue, in the order in which they
come. Leaving the `async with` block, for whatever reason, ends every dispatch that still runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType

from cluster.messages import FinishReason
from router.detokenizer import Detokenizer
from router.metrics import CANCELLED, FINISHED, Metrics
from router.placement import Decision
from router.request import Delta, Request
from router.responses import Usage

Serve = Callable[[Request], AsyncGenerator[Delta, None]]


@dataclass(frozen=True, slots=True)
class Plan:
    """One choice to generate."""

    request: Request
    detokenizer: Detokenizer
    prompt: int  # index of its prompt in the API request
    echo: str  # text that comes before what is generated


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of one choice; `finish` is set on its last piece."""

    index: int
    text: str
    tokens: tuple[int, ...]  # new since the piece before
    finish: FinishReason | None


class Choices:
    """`async with choices: async for piece in choices: ...`, then `choices.usage()`."""

    def __init__(
        self, plans: list[Plan], serve: Serve, metrics: Metrics, arrival_s: float, token_ids: bool = False
    ) -> None:
        self._plans = plans
        self._serve = serve
        self._metrics = metrics
        self.token_ids = token_ids  # the client wants them: no token waits for its text
        self._arrival = arrival_s  # monotonic
        self._pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._cached = [0] * len(plans)  # choice -> cached prompt tokens
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Choices:
        self._tasks = [asyncio.create_task(self._run(index, plan)) for index, plan in enumerate(self._plans)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)  # short: leaving a dispatch waits for nothing
        if error is None:
            self._metrics.ended(FINISHED)
            self._metrics.e2e.observe(time.monotonic() - self._arrival)
        elif not isinstance(error, Exception):
            self._metrics.ended(CANCELLED)  # errors are counted where they are answered

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Pieces until every choice has finished. Raises the first error of any choice."""
        unfinished = len(self._plans)
        while unfinished:
            piece = await self._pieces.get()  # each dispatch has a deadline, and always ends in a piece or an error
            if isinstance(piece, Exception):
                raise piece
            unfinished -= piece.finish is not None
            yield piece

    def usage(self) -> Usage:
        """Every prompt counts once, however many choices were made from it, with what its first choice found cached."""
        firsts = {plan.prompt: index for index, plan in reversed(list(enumerate(self._plans)))}
        return Usage(
            prompt_tokens=sum(len(self._plans[index].request.prompt) for index in firsts.values()),
            completion_tokens=sum(plan.detokenizer.tokens for plan in self._plans),
            cached_tokens=sum(self._cached[index] for index in firsts.values()),
        )

    def decisions(self) -> list[Decision]:
        """Where the first choice was placed, and where before."""
        return self._plans[0].request.decisions

    async def _run(self, index: int, plan: Plan) -> None:
        try:
            await self._generate(index, plan)
        except Exception as error:  # handed to whoever reads the pieces, who raises it
            self._pieces.put_nowait(error)
        finally:
            self._metrics.placed(plan.request)

    async def _generate(self, index: int, plan: Plan) -> None:
        last = None  # time of the latest delivery
        text = plan.echo
        tokens: tuple[int, ...] = ()
        async with aclosing(self._serve(plan.request)) as deltas:
            async for delta in deltas:
                now = time.monotonic()
                if last is None:
                    self._metrics.ttft.observe(now - self._arrival)
                    self._metrics.tenants.prompt(plan.request, delta.cached_tokens)
                else:
                    self._metrics.itl.observe((now - last) / max(1, len(delta.tokens)))
                last = now
                self._metrics.tenants.output(plan.request, len(delta.tokens))
                self._cached[index] = delta.cached_tokens
                new, finish = _advance(plan, delta)
                text, tokens = text + new, tokens + delta.tokens
                if text or finish or self.token_ids:
                    self._pieces.put_nowait(Piece(index, text, tokens, finish))
                    text, tokens = "", ()
                if finish:
                    return


def _advance(plan: Plan, delta: Delta) -> tuple[str, FinishReason | None]:
    """The text a delta adds, and how the choice ended if it did."""
    detokenizer, tokens = plan.detokenizer, delta.tokens
    silent = 0
    if delta.finish == "stop" and tokens and tokens[-1] in plan.request.sampling.stop_token_ids:
        silent = 1  # the token that ends a generation is counted but not part of its text
    text = detokenizer.feed(tokens[: len(tokens) - silent])
    if detokenizer.stopped:
        return text, "stop"
    detokenizer.tokens += silent
    if delta.finish:
        text += detokenizer.flush()
    return text, "stop" if detokenizer.stopped else delta.finish
