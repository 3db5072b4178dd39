"""One connected worker, as a router sees it: its output stream, its load, and the legs that wait for its tokens.

A leg is one generation at one worker; it has an id and a queue. Every frame of the stream is taken apart here and its
items go to the queues by id. A stream that breaks, ends or stays silent for too long means the worker is lost: each of
its legs is told so, and the connection is tried again. What to do about it is `router/dispatch.py`'s decision.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from cluster.errors import ProtocolError, TandemError, Unavailable, WorkerLost, subclasses
from cluster.messages import (
    Abort,
    Accepted,
    DecodeJob,
    Handoff,
    JobFailed,
    Load,
    Outputs,
    PrefillJob,
    Refused,
    Role,
    StepOutput,
    Submit,
    TokenOutput,
    WorkerInfo,
)
from cluster.rpc import Client
from router.placement import WorkerView

SUBMIT_TIMEOUT_S = 10.0  # accepting reserves store space but computes nothing
ABORT_TIMEOUT_S = 5.0
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 2.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LegFailed:
    """The last thing a leg's queue gets when its worker or its job is lost."""

    id: str
    error: TandemError


Events = asyncio.Queue[TokenOutput | LegFailed]


class WorkerLink:
    """The connection to one incarnation of one worker."""

    def __init__(self, info: WorkerInfo, router_id: str, secret: str, timeout_s: float) -> None:
        self.info = info
        self.load: Load | None = None  # None: not connected
        self._router_id = router_id
        self._timeout_s = timeout_s
        self._client = Client(info.address, secret)
        self._legs: dict[str, Events] = {}  # generation id -> the queue of its dispatch
        self._sent: dict[str, int] = {}  # generation id -> tokens to compute, of jobs no report knows of yet
        self._accepted: set[str] = set()  # those of them that the next report will know of
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
        sent_tokens = sum(self._sent.values())
        return WorkerView(self.info.id, self.role, self.load.running, self.load.waiting_tokens, sent_tokens)

    def attach(self, job: PrefillJob | DecodeJob, events: Events) -> None:
        """From now on what this worker says about the job goes to `events`, and the job counts as load."""
        generation = job.generation
        follows = isinstance(job, DecodeJob) and job.handoff is not None
        self._legs[generation.id] = events
        self._sent[generation.id] = 1 if follows else len(generation.prompt) + len(generation.output)

    def detach(self, leg_id: str) -> None:
        self._legs.pop(leg_id, None)
        self._sent.pop(leg_id, None)

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
                self._accepted.add(job.generation.id)
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
        self.load = frame.load
        for leg_id in self._accepted:
            self._sent.pop(leg_id, None)
        self._accepted.clear()
        for output in frame.outputs:
            events = self._legs.get(output.id)
            if events is None:
                continue  # aborted meanwhile
            if isinstance(output, JobFailed):
                events.put_nowait(LegFailed(output.id, _error(output.code, output.message, None)))
            else:
                events.put_nowait(output)

    def _lose(self, error: WorkerLost) -> None:
        self.load = None
        self._sent.clear()
        self._accepted.clear()
        for leg_id, events in self._legs.items():
            events.put_nowait(LegFailed(leg_id, error))
        self._legs.clear()


def _error(code: str, message: str, retry_after_s: float | None) -> TandemError:
    return subclasses(TandemError).get(code, TandemError)(message, retry_after_s=retry_after_s)
