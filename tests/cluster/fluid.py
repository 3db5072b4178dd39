"""Workers as fluids in virtual time, for tests of the plan: prompts and sequences are discrete, tokens flow.

A worker computes its queue of prompts in order and gives every sequence it decodes dt / ITL tokens per tick; a finished
prompt goes to the decode worker with the fewest sequences. Knows nothing of blocks, caches or transfers.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cluster.demand import DemandMeter
from cluster.messages import Rates, Role, RouterInfo
from cluster.perfmodel import decode_ms, prefill_ms
from cluster.plan import (
    Action,
    ChangeRole,
    Drain,
    Member,
    Memory,
    Migrate,
    Spec,
    Start,
    Stop,
    explain,
    plan,
)
from cluster.pools import State

RATES = Rates(
    prefill=(2.0, 0.2, 0.0), decode=(10.0, 0.25, 0.0), memory=(1, 0), disk=(1, 0), remote=(1, 0), step_tokens=2048,
    start_s=20.0,
)  # fmt: skip
SPEC = Spec(
    policy="fixed", least=0, most=10_000, shards={"prefill": 1, "decode": 1, "both": 1}, ttft_slo_ms=2000.0,
    itl_slo_ms=20.0, disaggregated=True,
)  # fmt: skip
# with these: 5,000 prompt tokens a second; B* = 40 sequences at 20 ms, 2,000 output tokens a second


@dataclass(frozen=True)
class Mix:
    """What arrives: requests per second, mean prompt and output tokens (exponentially distributed)."""

    requests_s: float
    prompt: float
    output: float


def mix(prefill_workers: float, decode_workers: float, prompt: float = 1000, output: float = 100) -> Mix:
    """One that keeps that many workers of each role wholly busy, with that prompt; the output follows."""
    requests_s = prefill_workers * 5000 / prompt
    return Mix(requests_s, prompt, decode_workers * 2000 / requests_s if output else 0.0)


def roles(prefill: int, decode: int) -> list[Role]:
    some: list[Role] = ["prefill"] * prefill
    return some + ["decode"] * decode


@dataclass
class Worker:
    id: str
    role: Role
    state: State
    since_s: float
    prompts: deque[tuple[float, float, float]] = field(default_factory=deque)  # (tokens left, output, arrival)
    sequences: list[tuple[float, float]] = field(default_factory=list)  # heap of (progress at its end, prompt)
    progress: float = 0.0  # tokens that each sequence has got
    context: float = 0.0

    def member(self) -> Member:
        return Member(
            id=self.id, role=self.role, state=self.state, shards=1,
            rates=None if self.state == "starting" else RATES, running=len(self.sequences) + len(self.prompts),
            waiting_tokens=int(sum(prompt[0] for prompt in self.prompts)), context_tokens=int(self.context),
            since_s=self.since_s,
        )  # fmt: skip


class Fluid:
    """A deployment under a mix that may change over time, with the plan in charge of it."""

    def __init__(self, spec: Spec, workers: list[Role], traffic: Callable[[float], Mix], seed: int = 0) -> None:
        self.spec, self.traffic, self.now = spec, traffic, 0.0
        self.workers = [Worker(f"w{i:04}", role, "serving", -100.0) for i, role in enumerate(workers)]
        self.moves: list[tuple[float, str, int]] = []  # (time, role that workers changed to, how many)
        self.actions: list[tuple[float, Action]] = []
        self.ttfts: list[tuple[float, float]] = []  # (time, seconds)
        self.waiting: deque[tuple[float, float, float]] = deque()  # requests that nobody can take
        self.arrived = self.finished = 0
        self.memory, self.meter = Memory(), DemandMeter()
        self._totals = [0, 0.0, 0.0]  # requests, prompt tokens, output tokens
        self._reported = RouterInfo("r", "ns", 1, 0, 0, 0, 0, 0, 0, 0.0, 0.0)
        self._random, self._next = random.Random(seed), 0.0
        self._made = len(workers)

    def run(self, until_s: float, dt: float = 0.05) -> None:
        ticks = 0
        while self.now < until_s:
            self._arrive()
            for worker in self.workers:
                self._flow(worker, dt)
            self.now += dt
            ticks += 1
            if ticks % round(1.0 / dt) == 0:
                self._report()
            if ticks % round(0.5 / dt) == 0:
                self._plan()

    def count(self, role: Role) -> int:
        return sum(worker.role == role and worker.state == "serving" for worker in self.workers)

    def mean_ttft(self, start_s: float, end_s: float) -> float:
        chosen = [ttft for at, ttft in self.ttfts if start_s <= at < end_s]
        return sum(chosen) / max(1, len(chosen))

    def kill(self, worker_id: str) -> None:
        """Gone, and what it had with it."""
        self.workers = [worker for worker in self.workers if worker.id != worker_id]

    def _arrive(self) -> None:
        while self._next <= self.now:
            now_mix = self.traffic(self._next)
            if now_mix.requests_s <= 0:
                self._next = self.now + 0.05
                break
            self._next += self._random.expovariate(now_mix.requests_s)
            prompt = max(1.0, self._random.expovariate(1 / now_mix.prompt))
            output = max(1.0, self._random.expovariate(1 / now_mix.output))
            self._totals[0] += 1
            self._totals[1] += prompt
            self.arrived += 1
            self.waiting.append((prompt, output, self.now))
        takers = self._serving("prefill", "both") or self._serving("decode")
        while self.waiting and takers:
            least = min(takers, key=lambda worker: sum(prompt[0] for prompt in worker.prompts))
            least.prompts.append(self.waiting.popleft())

    def _flow(self, worker: Worker, dt: float) -> None:
        left_ms = 1000 * dt
        while worker.prompts and left_ms > 0:
            tokens, output, arrival = worker.prompts[0]
            cost = prefill_ms(RATES, int(tokens) or 1, 0)
            if cost > left_ms:
                worker.prompts[0] = (tokens * (1 - left_ms / cost), output, arrival)
                break
            left_ms -= cost
            worker.prompts.popleft()
            self.ttfts.append((self.now, self.now - arrival))
            decoders = self._serving("decode", "both") or self._serving("prefill")
            self._decode(min(decoders, key=lambda w: len(w.sequences)), output, tokens)
        batch = len(worker.sequences)
        if batch:
            step = decode_ms(RATES, min(batch, self.spec.max_sequences), 0)
            tokens = 1000 * dt / step * min(1.0, self.spec.max_sequences / batch)
            worker.progress += tokens
            self._totals[2] += tokens * batch
            while worker.sequences and worker.sequences[0][0] <= worker.progress:
                _, prompt = heapq.heappop(worker.sequences)
                worker.context -= prompt
                self.finished += 1

    def _decode(self, worker: Worker, output: float, prompt: float) -> None:
        heapq.heappush(worker.sequences, (worker.progress + output, prompt))
        worker.context += prompt

    def _serving(self, *roles: Role) -> list[Worker]:
        return [worker for worker in self.workers if worker.state == "serving" and worker.role in roles]

    def _report(self) -> None:
        requests, prompt, output = (int(value) for value in self._totals)
        recent = [ttft for at, ttft in self.ttfts[-500:] if at > self.now - 3]
        batches = [len(worker.sequences) for worker in self.workers if worker.sequences]
        itl = decode_ms(RATES, round(sum(batches) / len(batches)), 0) if batches else 0.0
        self._reported = replace(
            self._reported, requests_total=requests, prompt_tokens_total=prompt, uncached_tokens_total=prompt,
            output_tokens_total=output, waiting=len(self.waiting), itl_ms=itl,
            waiting_tokens=int(sum(request[0] for request in self.waiting)),
            ttft_ms=1000 * sum(recent) / len(recent) if recent else 0.0,
        )  # fmt: skip

    def _plan(self) -> None:
        for worker in self.workers:
            if worker.state == "starting" and self.now - worker.since_s >= RATES.start_s:
                worker.state, worker.since_s = "serving", self.now
        self.meter.observe([self._reported], self.now)
        members = [worker.member() for worker in self.workers]
        actions, self.memory = plan(self.spec, members, self.meter.demand(), self.memory, self.now)
        assert bool(actions) <= bool(explain(self.memory))
        flips = [action for action in actions if isinstance(action, ChangeRole)]
        if flips:
            self.moves.append((self.now, flips[0].role, len(flips)))
        for action in actions:
            self.actions.append((self.now, action))
            self._act(action)

    def _act(self, action: Action) -> None:
        if isinstance(action, Start):
            self.workers.append(Worker(f"w{self._made:04}", action.role, "starting", self.now))
            self._made += 1
            return
        worker = next(worker for worker in self.workers if worker.id == action.id)
        match action:
            case ChangeRole(_, role):
                worker.role, worker.since_s = role, self.now
            case Drain():
                worker.state, worker.since_s = "draining", self.now
            case Migrate():
                left, worker.sequences, worker.context = worker.sequences, [], 0.0
                for end, prompt in left:
                    others = [other for other in self._serving("decode", "both") if other is not worker]
                    least = min(others, key=lambda other: len(other.sequences))
                    self._decode(least, end - worker.progress, prompt)
            case Stop():
                assert not [*worker.prompts, *worker.sequences], "stopped with work left"
                self.workers.remove(worker)
