"""One connected worker, as a router sees it: its output stream, its load, and the legs that wait for its tokens.

A leg is one generation at one worker; it has an id and a queue. Every frame of the stream is taken apart here: its
items go to the queues by id, and what it says of the worker's KV cache to the prefix map. A stream that breaks, ends or
stays silent for too long means the worker is lost: each of its legs is told so, and the connection is tried again. What
to do about it is `router/dispatch.py`'s decision.

    reserve ─► attach ─► Submit ─► Accepted ─► report (may be of the step before) ─► report
    a job counts here as sent ................................................................ by the worker from here
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from cluster.errors import ProtocolError, TandemError, Unavailable, WorkerLost, subclasses
from cluster.messages import (
    Abort,
    Accepted,
    CacheChange,
    DecodeJob,
    Gpu,
    Handoff,
    JobFailed,
    Load,
    Outputs,
    PrefillJob,
    Rates,
    Refused,
    Role,
    StepOutput,
    Submit,
    TokenOutput,
    WorkerInfo,
)
from cluster.perfmodel import PRIOR
from cluster.rpc import Client
from kvstore.prefix_map import PrefixMap, split
from router.experience import Experience
from router.table import WorkerView

SUBMIT_TIMEOUT_S = 10.0  # accepting reserves store space but computes nothing
ABORT_TIMEOUT_S = 5.0
SENT_S = 2.0  # from its acceptance a job counts as sent at most: by then there were reports
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 2.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LegFailed:
    """The last thing a leg's queue gets when its worker or its job is lost."""

    id: str
    error: TandemError


Events = asyncio.Queue[TokenOutput | LegFailed]


@dataclass(slots=True)
class _Sent:
    """What a job adds to the worker's load until a report knows of it."""

    tokens: int  # of prompt to compute
    context: int  # tokens whose KV it will have while it decodes
    accepted_s: float = 0.0  # monotonic
    reports: int = 0  # since it was accepted


class WorkerLink:
    """The connection to one incarnation of one worker. `changed` is called with it when its view is another, and when
    it came or was lost."""

    def __init__(
        self,
        info: WorkerInfo,
        router_id: str,
        secret: str,
        timeout_s: float,
        prefix_map: PrefixMap,
        experience: Experience,
        changed: Callable[[WorkerLink], None],
    ) -> None:
        self.info = info
        self.load: Load | None = None  # None: not connected
        self.rates: Rates | None = None  # what it says itself; None: nothing yet
        self.gpus: tuple[Gpu, ...] = ()  # of its node
        self._filled = PRIOR  # the same with what others know
        self._experience = experience
        self._owner = -1  # its number in the prefix map while it is connected
        self._map = prefix_map
        self._changed = changed
        self._router_id = router_id
        self._timeout_s = timeout_s
        self._client = Client(info.address, secret)
        self._legs: dict[str, Events] = {}  # generation id -> the queue of its dispatch
        self._sent: dict[str, _Sent] = {}  # generation id -> what no report knows of yet
        self._tenants: dict[str, str] = {}  # generation id -> whose job, while it is under way here
        self._closing = False
        self._task = asyncio.create_task(self._run(), name=f"outputs of {info.id}")

    @property
    def alive(self) -> bool:
        return self.load is not None

    @property
    def idle(self) -> bool:
        return not self._legs

    @property
    def role(self) -> Role:
        """The engine's own word is fresher than what it registered."""
        return self.load.role if self.load else self.info.role

    @property
    def pending(self) -> int:
        """Requests sent that the last report does not know of."""
        return len(self._sent)

    def view(self) -> WorkerView:
        assert self.load is not None, "only a live worker has a view"
        load, sent = self.load, self._sent.values()
        return WorkerView(
            id=self.info.id,
            role=self.role,
            node=self.info.node,
            owner=self._owner,
            running=load.running + load.waiting,
            waiting_tokens=load.waiting_tokens,
            context_tokens=load.context_tokens,
            blocks_free=load.blocks_free,
            blocks_total=load.blocks_total,
            rates=self._filled,
            sent_tokens=sum(job.tokens for job in sent),
            sent_sequences=len(sent),
            sent_context=sum(job.context for job in sent),
        )

    def reserve(self, leg_id: str, tokens: int, context: int) -> None:
        """From now on that much counts as load, because a job will be sent: `tokens` of prompt to compute, and KV of
        `context` tokens while it decodes. Ends with `detach`, or with the reports after it was accepted."""
        self._sent[leg_id] = _Sent(tokens, context)
        self._tell()

    def attach(self, leg_id: str, events: Events, tenant: str = "") -> None:
        """From now on what this worker says about that job of that tenant goes to `events`."""
        self._legs[leg_id] = events
        self._tenants[leg_id] = tenant

    def detach(self, leg_id: str) -> None:
        self._legs.pop(leg_id, None)
        self.ended(leg_id)
        if self._sent.pop(leg_id, None) is not None:
            self._tell()

    @property
    def tenants(self) -> list[str]:
        """Whose jobs are under way here, one entry per job."""
        return list(self._tenants.values())

    def ended(self, leg_id: str) -> None:
        """The worker has nothing left to do for that job."""
        self._tenants.pop(leg_id, None)

    async def submit(self, job: PrefillJob | DecodeJob) -> Handoff | None:
        """Hand over a job that is attached. Raises the worker's refusal, WorkerLost or DeadlineExceeded."""
        if not self.alive:
            raise WorkerLost(f"worker {self.info.id} is not connected")
        try:
            answer = await self._client.call("Submit", Submit(self._router_id, job), SUBMIT_TIMEOUT_S)
        except Unavailable as error:  # the client is told who, not where; where is in the log
            raise type(error)(f"worker {self.info.id} did not accept the job") from error
        except asyncio.CancelledError:
            if self._closing:  # closing the channel cancels its calls; this request was not cancelled
                raise WorkerLost(f"worker {self.info.id} left the fleet") from None
            raise
        match answer:
            case Accepted(handoff):
                sent = self._sent.get(job.generation.id)
                if sent is not None:
                    sent.accepted_s = time.monotonic()
                return handoff
            case Refused(code, message, retry_after_ms):
                raise _error(code, message, retry_after_ms / 1000 or None)
        raise ProtocolError(
            f"worker {self.info.id} answered Submit with {type(answer).__name__}; is it another version?"
        )

    async def abort(self, ids: Sequence[str]) -> None:
        """Raises TandemError when the worker cannot be told; it aborts by itself when the output stream breaks."""
        await self._client.call("Abort", Abort(tuple(ids)), ABORT_TIMEOUT_S)

    async def close(self) -> None:
        """Disconnect; legs that still wait are told that the worker is lost."""
        self._closing = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._lose(WorkerLost(f"worker {self.info.id} left the fleet"))
        await self._client.close()

    async def _run(self) -> None:
        backoff = BACKOFF_MIN_S
        while True:
            try:
                await self._follow()
                error: TandemError = WorkerLost(f"worker {self.info.id} closed its output stream")
            except TimeoutError:
                error = WorkerLost(f"worker {self.info.id} was silent for {self._timeout_s:g} s")
            except TandemError as lost:
                error = lost
            if self.alive:
                log.warning("lost worker %s at %s: %s", self.info.id, self.info.address, error.message)
                backoff = BACKOFF_MIN_S
            self._lose(WorkerLost(f"worker {self.info.id} was lost"))
            await asyncio.sleep(backoff)
            backoff = min(BACKOFF_MAX_S, 2 * backoff)

    async def _follow(self) -> None:
        stream = self._client.stream("Outputs", Outputs(self._router_id), None)
        async with aclosing(stream) as frames:  # an async generator, typed as less
            while True:
                async with asyncio.timeout(self._timeout_s):
                    frame = await anext(frames, None)
                if frame is None:
                    return
                if not isinstance(frame, StepOutput):
                    raise ProtocolError(f"worker {self.info.id} sent a {type(frame).__name__} on its output stream")
                self._take(frame)

    def _take(self, frame: StepOutput) -> None:
        if self.load is None:
            self._owner = self._map.join()
        self.load = frame.load
        if frame.rates is not None:
            kind = frame.gpus[0].name if frame.gpus else ""
            self.rates, self._filled = frame.rates, self._experience.filled(frame.rates, kind)
            self.gpus = frame.gpus
        if frame.cache is not None:
            self._take_cache(frame.cache)
        self._forget_sent({output.id for output in frame.outputs})
        self._changed(self)
        for output in frame.outputs:
            events = self._legs.get(output.id)
            if events is None:
                continue  # aborted meanwhile
            if isinstance(output, JobFailed):
                events.put_nowait(LegFailed(output.id, _error(output.code, output.message, None)))
            else:
                events.put_nowait(output)

    def _take_cache(self, change: CacheChange) -> None:
        if change.reset:
            self._map.leave(self._owner)
            self._owner = self._map.join()
        self._map.put(self._owner, split(change.put))
        self._map.delete(self._owner, split(change.delete))

    def _forget_sent(self, answered: set[str]) -> None:
        """A report has come. The first after an acceptance may be of the step that was under way, unless the job has
        been `answered` with it."""
        now = time.monotonic()
        for leg_id, sent in list(self._sent.items()):
            sent.reports += sent.accepted_s > 0
            if sent.reports >= 2 or leg_id in answered or 0 < sent.accepted_s < now - SENT_S:
                del self._sent[leg_id]

    def _lose(self, error: WorkerLost) -> None:
        if self.load is not None:
            self._map.leave(self._owner)
        self.load = self.rates = None
        self.gpus = ()
        self._filled = PRIOR
        self._sent.clear()
        self._changed(self)
        for leg_id, events in self._legs.items():
            events.put_nowait(LegFailed(leg_id, error))
        self._legs.clear()
        self._tenants.clear()

    def _tell(self) -> None:
        if self.load is not None:
            self._changed(self)


def _error(code: str, message: str, retry_after_s: float | None) -> TandemError:
    return subclasses(TandemError).get(code, TandemError)(message, retry_after_s=retry_after_s)
