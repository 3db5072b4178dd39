"""Workers without an engine, for the router's tests: a real gRPC server on loopback, scripted from the test.

Tokens are a pure function of prompt and position, as a real engine's are, so whichever workers served a request, the
answer is known. `Gate`s hold a worker at a chosen token; nothing here sleeps for effect.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

from cluster.messages import (
    Abort,
    Accepted,
    Ack,
    CacheChange,
    ControllerInfo,
    DecodeJob,
    FinishReason,
    Generation,
    Gpu,
    Handoff,
    JobFailed,
    Load,
    Outputs,
    PrefillJob,
    Rates,
    Refused,
    Role,
    RouterInfo,
    StepOutput,
    StoreInfo,
    Submit,
    TokenOutput,
    WorkerInfo,
)
from cluster.perfmodel import PRIOR
from cluster.rpc import Server
from kvstore.hashing import ModelKey

SECRET = "test-secret"
NAMESPACE = "test-model"
VOCAB = 300  # of the test tokenizer: 0..2 are special, the rest bytes and merges
EOS = 1
HEARTBEAT_S = 0.05
MODEL_KEY = ModelKey(b"weights", b"tokenizer", "float32", 16)
SLOW = (1_000.0, 1.0, 0.0)  # prefill rates
_INCARNATIONS = itertools.count(1)

Transfers = dict[str, "asyncio.Future[bool]"]  # transfer id -> True when its blocks and first token are complete


def token_at(prompt: Sequence[int], index: int) -> int:
    """The new token at `index`: never a special one."""
    return 3 + (sum(prompt) * 31 + len(prompt) + index * index * 7 + index) % (VOCAB - 3)


def tokens_for(prompt: Sequence[int], count: int) -> list[int]:
    return [token_at(prompt, index) for index in range(count)]


class FakeWorker:
    """One worker. Change its public attributes to script it; read them to see what the router asked."""

    def __init__(self, worker_id: str, role: Role, transfers: Transfers) -> None:
        self.id = worker_id
        self.role = role
        self.reset()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._outboxes: dict[str, asyncio.Queue[TokenOutput | JobFailed]] = {}
        self._transfers = transfers
        self._server = Server(SECRET, {"Submit": self._submit, "Abort": self._abort}, {"Outputs": self._outputs})
        self.info: WorkerInfo

    def reset(self) -> None:
        self.refuse: Refused | None = None  # answer to every Submit
        self.refused = 0
        self.fail: tuple[str, str] | None = None  # every job ends in JobFailed(code, message) where it would start
        self.accept = asyncio.Event()  # cleared: Submit does not answer
        self.accept.set()
        self.follow = True  # False: a decode job does not wait for its handoff
        self.repeat = False  # True: a decode job sends the first token too, though the prefill worker has sent it
        self.hold_at: int | None = None  # index of the token in front of which every job waits for `go`
        self.go = asyncio.Event()
        self.fail_held: tuple[str, str] | None = None  # what jobs that held do when they may go on
        self.eos_at: int | None = None  # index at which every job ends with the model's end token
        self.tokens_per_frame = 1
        self.cached_tokens = 0
        self.silent = False
        self.frames = 0  # sent to anybody
        self.load: dict[str, int] = {}  # overrides of what it reports
        self.rates: Rates | None = None  # None: prompts cost a decode worker so much that they are handed over
        self.cache: list[CacheChange] = []  # told to every router that connects
        self.gpus: tuple[Gpu, ...] = ()
        self.jobs: list[PrefillJob | DecodeJob] = []
        self.aborted: list[str] = []

    async def start(self) -> FakeWorker:
        address = await self._server.start("127.0.0.1")
        incarnation = next(_INCARNATIONS)
        self.info = WorkerInfo(self.id, address, "node-1", 4242, self.role, NAMESPACE, incarnation, 256, 16)
        return self

    async def die(self) -> None:
        """Like a killed process: every stream and call breaks."""
        for task in self._running.values():
            task.cancel()
        await self._server.stop(0)

    @property
    def running(self) -> list[str]:
        return list(self._running)

    @property
    def generations(self) -> list[Generation]:
        return [job.generation for job in self.jobs]

    async def _submit(self, message: Submit, _: Any) -> Accepted | Refused:
        await self.accept.wait()
        if self.refuse:
            self.refused += 1
            return self.refuse
        self.jobs.append(message.job)
        generation = message.job.generation
        handoff = None
        if isinstance(message.job, PrefillJob):
            handoff = Handoff("127.0.0.1:1", 1, generation.id)
            self._transfers[generation.id] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._generate(message.job, self._outboxes[message.router_id]))
        self._running[generation.id] = task
        task.add_done_callback(lambda _: self._ended(generation.id))
        return Accepted(handoff)

    def _ended(self, generation_id: str) -> None:
        self._running.pop(generation_id, None)
        transfer = self._transfers.get(generation_id)
        if transfer and not transfer.done():
            transfer.set_result(False)

    async def _abort(self, message: Abort, _: Any) -> Ack:
        self.aborted += message.ids
        for generation_id in message.ids:
            if generation_id in self._running:
                self._running[generation_id].cancel()
        return Ack()

    async def _generate(self, job: PrefillJob | DecodeJob, outbox: asyncio.Queue[TokenOutput | JobFailed]) -> None:
        generation, sampling = job.generation, job.generation.sampling
        index, end = len(generation.output), sampling.max_tokens
        if isinstance(job, PrefillJob):
            end = index + 1
        elif job.handoff and (not self.follow or await asyncio.shield(self._transfers[job.handoff.transfer_id])):
            index += not self.repeat
        if self.fail:
            outbox.put_nowait(JobFailed(generation.id, *self.fail))
            return
        while index < end:
            tokens: list[int] = []
            finish: FinishReason | None = None
            while len(tokens) < self.tokens_per_frame and index + len(tokens) < end and not finish:
                position = index + len(tokens)
                if position == self.hold_at:
                    if tokens:
                        break
                    await self.go.wait()
                    if self.fail_held:
                        outbox.put_nowait(JobFailed(generation.id, *self.fail_held))
                        return
                stop = position == self.eos_at
                tokens.append(EOS if stop else token_at(generation.prompt, position))
                finish = "stop" if stop else "length" if position + 1 == sampling.max_tokens else None
            outbox.put_nowait(TokenOutput(generation.id, index, tuple(tokens), finish, self.cached_tokens))
            index += len(tokens)
            if finish:
                break
        if isinstance(job, PrefillJob):
            self._transfers[generation.id].set_result(True)

    async def _outputs(self, message: Outputs, _: Any) -> AsyncIterator[StepOutput]:
        outbox = self._outboxes[message.router_id] = asyncio.Queue()
        try:
            yield StepOutput((), self._load(), self._rates(), None, self.gpus)
            for change in self.cache:
                yield StepOutput((), self._load(), None, change)
            while True:
                outputs: list[TokenOutput | JobFailed] = []
                try:
                    async with asyncio.timeout(HEARTBEAT_S):
                        outputs.append(await outbox.get())
                except TimeoutError:
                    if self.silent:
                        continue
                self.frames += 1
                yield StepOutput(tuple(outputs), self._load(), self._rates(), None, self.gpus)
        finally:
            for task in self._running.values():
                task.cancel()

    def _rates(self) -> Rates:
        return self.rates or dataclasses.replace(PRIOR, prefill=PRIOR.prefill if self.role == "prefill" else SLOW)

    def _load(self) -> Load:
        fields: dict[str, Any] = {
            "role": self.role,
            "running": len(self._running),
            "waiting": 0,
            "waiting_tokens": 0,
            "blocks_free": 90,
            "blocks_cached": 5,
            "blocks_total": 100,
            "steps_total": 1,
            "prompt_tokens_total": 2,
            "cached_tokens_total": 3,
            "output_tokens_total": 4,
            "preemptions_total": 6,
            "handoff_bytes_total": 7,
            "handoff_seconds_total": 0.5,
            "handoff_failures_total": 8,
        }
        return Load(**(fields | self.load))


class StaticMembership:
    """A membership the test edits; raising `error` plays a Redis that is down."""

    def __init__(self) -> None:
        self.workers: list[WorkerInfo] = []
        self.stores: list[StoreInfo] = []
        self.controllers: list[ControllerInfo] = []
        self.error: Exception | None = None
        self.asked = 0

    async def members(self, namespace: str) -> tuple[list[WorkerInfo], list[StoreInfo]]:
        assert namespace == NAMESPACE
        self.asked += 1
        if self.error:
            raise self.error
        return list(self.workers), list(self.stores)

    async def reports(self, namespace: str) -> tuple[list[RouterInfo], list[ControllerInfo]]:
        assert namespace == NAMESPACE
        if self.error:
            raise self.error
        return [], self.controllers

    async def close(self) -> None:
        return None


async def eventually(condition: Any, timeout_s: float = 5.0) -> None:
    """Wait until `condition()` is true; fail after the deadline."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (conditions span processes and objects that have no event)
            await asyncio.sleep(0.002)
