"""One attempt at a request: a route, its one or two legs, and their tokens put into one order.

Both workers are chosen at once; while the prefill worker is asked, the decode worker's part is reserved. A prefill
worker that refuses or dies before it accepted is replaced, at last by nobody: then the decode worker prefills. One that
dies later needs no replacement, because the decode leg computes what does not arrive. When the decode leg fails the
attempt has failed, and what to do about it is for `router/dispatch.py`.

    tokens   0 ........ start ......... delivered ......... end of the frame at hand
             earlier    by this attempt            |new     a frame that begins later than `delivered` waits for the
             attempts                                       prefill leg's token; if that is lost, so is the attempt
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from cluster import telemetry
from cluster.errors import DeadlineExceeded, Moved, TandemError, Unavailable, WorkerLost
from cluster.messages import DecodeJob, FinishReason, Generation, Handoff, PrefillJob, TokenOutput
from router.fleet import Fleet
from router.outputs import SUBMIT_TIMEOUT_S, Events, LegFailed, WorkerLink
from router.placement import Ask, Decision
from router.request import Delta, Progress
from router.tracing import AttemptTrace

PREFILL_TRIES = 2  # prefill workers asked per attempt before the decode worker does it itself

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Leg:
    """One job at one worker. `finished`: the worker has nothing left to abort."""

    id: str
    link: WorkerLink
    submitting: asyncio.Task[Handoff | TandemError | None]
    finished: bool = False


class Attempt:
    """One route tried: its legs, and the queue that both answer into."""

    def __init__(self, fleet: Fleet, progress: Progress, number: int, hashes: Sequence[bytes]) -> None:
        self.placed = False  # False after `start` failed: nobody was left to place it on
        self._fleet = fleet
        self._progress = progress
        self._name = f"{progress.request.id}-{number}"
        self._trace = AttemptTrace(progress.request, number)
        self._hashes = hashes  # of the full blocks of prompt and output so far
        self._reserved: WorkerLink | None = None  # the decode worker, until it has its job
        self._start = len(progress.tokens)  # index of this attempt's first token
        self._events: Events = asyncio.Queue()
        self._frames: list[TokenOutput] = []  # arrived before the tokens in front of them
        self._legs: list[_Leg] = []
        self._prefill: _Leg | None = None  # the one that accepted
        self._prefill_pending = False  # its token may still come
        self._decode: _Leg | None = None
        self._cached_from = ""  # id of the leg that looks up the prompt in the cache
        self._failure: TandemError | None = None
        self._began_s: dict[str, float] = {}  # leg id -> when its first frame came, monotonic

    async def start(self) -> None:
        """Place, and submit to both workers; returns when the prefill worker, if any, has accepted."""
        request = self._progress.request
        decision = self._place()
        if decision.route.prefill and request.sampling.max_tokens - self._start == 1:
            self._reserve(decision.route.prefill, decision.uncached_tokens)
            self._submit_decode(decision.route.prefill, None)  # one token is all prefill: nothing to hand over
            return
        handoff = None
        for _ in range(PREFILL_TRIES):
            prefill = decision.route.prefill
            if prefill is None:
                break
            outcome = await self._submit_prefill(prefill, decision.uncached_tokens)
            if not isinstance(outcome, TandemError):
                handoff = outcome
                break
            if not outcome.retriable:
                raise outcome
            log.warning("prefill worker %s failed %s: %s", prefill, request.id, outcome.message)
            self._progress.failed_by(prefill, outcome)
            decision = self._place()
        if self._fleet.table.row(decision.route.decode) is None:  # it left while this waited
            decision = self._place()
        self._submit_decode(decision.route.decode, handoff)

    async def next(self) -> Delta:
        """The next tokens in order. Raises what ended the attempt, after all tokens that came before it."""
        while True:
            delta = self._merge()
            if delta is not None:
                return delta
            if self._failure is not None:
                raise self._failure
            self._take(await self._event())
            while not self._events.empty():
                self._take(self._events.get_nowait())

    def leave(self) -> list[Coroutine[Any, Any, None]]:
        """Detach all legs and return the aborts to run for those that may still be going on."""
        self._note_handoff()
        if self._prefill and self._decode and self._decode.finished:  # its blocks are not needed any more
            self._prefill.finished = not self._prefill_pending
        self._unreserve()
        for leg in self._legs:
            leg.link.detach(leg.id)
        self._trace.over()
        return [_abort(leg) for leg in self._legs if not leg.finished]

    def _note_handoff(self) -> None:
        """What of the handoff nothing hid: the decode worker's first frame says that it has everything."""
        first = [self._began_s.get(leg.id) if leg else None for leg in (self._prefill, self._decode)]
        if first[0] is not None and first[1] is not None:
            self._progress.request.exposed_s.append(max(0.0, first[1] - first[0]))

    def _place(self) -> Decision:
        """The workers to ask, with the decode worker's part reserved. Raises Unavailable when nobody is left."""
        progress = self._progress
        self.placed, began_s = False, time.monotonic()
        tokens = len(progress.request.prompt) + self._start
        ask = Ask(tokens, progress.expected_tokens, frozenset(progress.failed))
        decision = self._fleet.place(ask, self._hashes)
        self.placed = True
        self._trace.placed(began_s, decision)
        progress.request.decisions.append(decision)
        alone = decision.route.prefill is None
        self._reserve(decision.route.decode, decision.uncached_tokens if alone else 0)
        return decision

    def _reserve(self, worker_id: str, uncached_tokens: int) -> None:
        """That worker is to have the decode job."""
        self._unreserve()
        self._reserved = self._fleet.link(worker_id)
        tokens = len(self._progress.request.prompt) + self._start
        self._reserved.reserve(self._decode_id, uncached_tokens, tokens)

    @property
    def _decode_id(self) -> str:
        return f"{self._name}d"

    def _unreserve(self) -> None:
        """What was reserved is not to be sent."""
        if self._reserved is not None:
            self._reserved.detach(self._decode_id)
            self._reserved = None

    async def _submit_prefill(self, worker_id: str, uncached_tokens: int) -> Handoff | TandemError | None:
        link = self._fleet.link(worker_id)
        leg_id = f"{self._name}p{len(self._legs)}"
        link.reserve(leg_id, uncached_tokens, 0)
        leg = self._open(link, PrefillJob(self._generation(leg_id)), "prefill")
        # not `await leg.submitting`: leaving must not cancel a Submit half way, or nobody knows whether to abort it
        await asyncio.wait({leg.submitting})
        outcome = leg.submitting.result()
        if isinstance(outcome, TandemError):
            leg.link.detach(leg.id)
            self._trace.leg_over(leg.id, outcome.code)
            leg.finished = not isinstance(outcome, Unavailable)  # refused; otherwise it may yet have arrived
        else:
            self._prefill, self._prefill_pending, self._cached_from = leg, True, leg.id
        return outcome

    def _submit_decode(self, worker_id: str, handoff: Handoff | None) -> None:
        """Does not wait: the first token of a prefill leg must not wait for the decode worker's answer."""
        link = self._fleet.link(worker_id)
        self._reserved = None  # the leg is detached instead
        self._decode = leg = self._open(link, DecodeJob(self._generation(self._decode_id), handoff), "decode")
        self._cached_from = self._cached_from or leg.id

        def refused(task: asyncio.Task[Handoff | TandemError | None]) -> None:
            outcome = task.result()
            if isinstance(outcome, TandemError):
                self._events.put_nowait(LegFailed(leg.id, outcome))

        leg.submitting.add_done_callback(refused)

    def _generation(self, leg_id: str) -> Generation:
        request, progress = self._progress.request, self._progress
        return Generation(
            id=leg_id,
            prompt=request.prompt,
            output=tuple(progress.tokens[: self._start]),
            sampling=request.sampling,
            salt=request.salt,
            deadline_ms=max(1, int(progress.remaining_s * 1000)),
            tenant=request.tenant,
            exact=request.exact,
        )

    def _open(self, link: WorkerLink, job: PrefillJob | DecodeJob, kind: str) -> _Leg:
        leg_id = job.generation.id
        link.attach(leg_id, self._events, job.generation.tenant)
        with telemetry.current(self._trace.leg(leg_id, kind, link.info.id)):  # the job carries it
            leg = _Leg(leg_id, link, asyncio.create_task(_outcome(link, job)))
        self._legs.append(leg)
        return leg

    async def _event(self) -> TokenOutput | LegFailed:
        try:
            async with asyncio.timeout(self._progress.remaining_s):
                return await self._events.get()
        except TimeoutError:
            raise DeadlineExceeded(
                "the request took longer than this server's request_timeout; ask for fewer tokens"
            ) from None

    def _take(self, event: TokenOutput | LegFailed) -> None:
        leg = next(leg for leg in self._legs if leg.id == event.id)
        if isinstance(event, LegFailed):
            self._take_failure(leg, event.error)
            return
        self._began_s.setdefault(leg.id, time.monotonic())
        self._frames.append(event)
        if leg.id == self._cached_from and self._start == 0:
            cached = min(event.cached_tokens, len(self._progress.request.prompt))
            self._progress.cached_tokens = max(self._progress.cached_tokens, cached)
        if leg is self._prefill:
            self._prefill_pending = False
            leg.link.ended(leg.id)
            self._trace.leg_over(leg.id)
        elif leg is self._decode and event.finish:
            leg.finished = True
            self._trace.leg_over(leg.id)

    def _take_failure(self, leg: _Leg, error: TandemError) -> None:
        self._trace.leg_over(leg.id, error.code)
        if leg is self._decode:
            self._failure = error
            if not isinstance(error, Moved):
                self._progress.failed_by(leg.link.info.id, error)
        elif leg is self._prefill:
            self._prefill_pending = False
            if not error.retriable:
                self._failure = error

    def _merge(self) -> Delta | None:
        """What the frames at hand add to the delivered tokens; a frame that overlaps them adds only what is new."""
        delivered, before = self._progress.tokens, len(self._progress.tokens)
        finish: FinishReason | None = None
        ahead: list[TokenOutput] = []
        for frame in sorted(self._frames, key=lambda frame: frame.start):
            if frame.start > len(delivered):
                ahead.append(frame)
                continue
            delivered.extend(frame.tokens[len(delivered) - frame.start :])
            finish = frame.finish
            if finish:
                break  # whatever else was generated comes after the end
        self._frames = ahead
        if ahead and not self._prefill_pending and self._failure is None:
            self._failure = WorkerLost("the first token was lost with the worker that computed it")
        if finish is None and len(delivered) == before:
            return None
        return Delta(tuple(delivered[before:]), self._progress.cached_tokens, finish)


async def _outcome(link: WorkerLink, job: PrefillJob | DecodeJob) -> Handoff | TandemError | None:
    """Submit's answer or error as a value, so that nobody need be there to catch it."""
    try:
        return await link.submit(job)
    except TandemError as error:
        return error
    except Exception as error:  # a bug of ours must end the request, not leave it waiting for tokens
        log.exception("Submit failed")
        return TandemError(f"Submit failed: {error!r}")


async def _abort(leg: _Leg) -> None:
    """Tell the worker, once it has answered Submit: an Abort that overtakes its job would leave the job running."""
    await asyncio.wait({leg.submitting}, timeout=SUBMIT_TIMEOUT_S)
    if not leg.link.alive:
        return  # it aborted this router's jobs when the output stream broke
    try:
        await leg.link.abort((leg.id,))
    except TandemError as error:
        log.warning("could not abort %s at worker %s: %s", leg.id, leg.link.info.id, error.message)
