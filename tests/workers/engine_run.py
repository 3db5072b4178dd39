"""What the engine tests share: small engines on the sim runner, and a stand-in for everything around an engine.

The sim's tokens depend on every KV row that it reads back: lost or mixed-up blocks change them.
"""

import math
from collections.abc import Iterable

from cluster.messages import Generation, Handoff, JobFailed, Sampling, TokenOutput
from cluster.perfmodel import PerfModel
from kvstore.fetcher import Source
from kvstore.layout import Layout
from workers.engine import Engine
from workers.runner import Runner
from workers.sequence import Sequence
from workers.sim import SimRunner, sim_layout
from workers.step import BlockFetch, Offload, Send, Step

BLOCK = 4
VOCAB = 50_000


class Unimpressed(PerfModel):
    """The prior: a sim that takes no time at all would be found to be faster than any fetch."""

    def observe_step(self, chunks: Iterable[tuple[int, int]], ms: float) -> None:
        del chunks, ms


def engine(
    num_blocks: int = 256,
    token_budget: int = 64,
    max_sequences: int = 32,
    stored: Layout | None = None,
    runner: Runner | None = None,  # with that many blocks
) -> Engine:
    made = Engine(
        runner or SimRunner(sim_layout(BLOCK), num_blocks, VOCAB),
        token_budget=token_budget,
        max_sequences=max_sequences,
        max_context=min(512, num_blocks * BLOCK),
        stored=stored,
    )
    made.model = Unimpressed(token_budget)
    return made


def sequence(name: str, prompt: list[int], new: int = 8, **changes: object) -> Sequence:
    generation = Generation(name, tuple(prompt), (), Sampling(max_tokens=new, temperature=0), b"", 60_000)
    return Sequence(generation, router_id="router", root=b"root", deadline=math.inf, **changes)  # type: ignore[arg-type]


def prompt(length: int, seed: int = 1) -> list[int]:
    return [(seed * 7919 + i * 104729) % VOCAB for i in range(length)]


class Run:
    """Steps an engine until it is quiet, keeping what comes out and acting as the transfer side.

    `store` is what the tier has: offloaded blocks go there, preempted sequences find theirs in it."""

    def __init__(self, target: Engine, store: dict[bytes, bytes] | None = None) -> None:
        self.engine = target
        self.store = {} if store is None else store
        self.tokens: dict[str, list[int]] = {}
        self.finish: dict[str, str | None] = {}
        self.cached: dict[str, int] = {}
        self.failed: dict[str, str] = {}
        self.sends: list[Send] = []
        self.receives: list[Sequence] = []
        self.fetches: list[BlockFetch] = []
        self.offloads: list[Offload] = []
        self.revoked: list[str] = []
        self.now = 0.0

    def add(self, added: Sequence) -> None:
        """Add a sequence for which the store has been asked."""
        self.engine.add(added)
        self.engine.located(added, self.sources(added))

    def sources(self, wanted: Sequence) -> list[Source]:
        found = 0
        while found < len(wanted.hashes) and wanted.hashes[found] in self.store:
            found += 1
        return [Source("store", 1, 0, found, "memory")] if found else []

    def step(self) -> Step:
        step = self.engine.step(self.now)
        for _, output in step.outputs:
            match output:
                case TokenOutput():
                    tokens = self.tokens.setdefault(output.id, [])
                    assert output.start == len(tokens)
                    tokens += output.tokens
                    self.finish[output.id] = output.finish
                    self.cached[output.id] = output.cached_tokens
                case JobFailed():
                    self.failed[output.id] = output.code
        self.sends += step.sends
        self.receives += step.receives
        self.fetches += step.fetches
        self.revoked += step.revoked
        self.offloads += step.offloads
        self.engine.pool.check()
        for offload in step.offloads:
            self.store[offload.name.key.hash] = self.engine.runner.block(offload.block).tobytes()
        self.engine.offloaded(step.offloads)
        for preempted in step.lookups:
            self.engine.located(preempted, self.sources(preempted))
        return step

    def deliver(self, order: BlockFetch, blocks: int | None = None) -> None:
        """A fetch that brings that many blocks; None: all."""
        first, last = order.sources[0].start, order.sources[-1].stop
        valid = last if blocks is None else first + blocks
        for position in range(first, valid):
            stored = self.store[order.sequence.hashes[position]]
            self.engine.runner.block(order.table[position])[:] = list(stored)
        self.engine.fetched(order.sequence, valid, [(order.sources[0], valid - first, 0.001)])

    def finish_all(self) -> "Run":
        for _ in range(5_000):
            step = self.step()
            for send in step.sends:
                self.engine.sent([block for _, block in send.blocks])
            for order in step.fetches:
                self.deliver(order)
            if not (step.computed or step.outputs or step.lookups or step.fetches):
                return self
        raise AssertionError("the engine does not come to rest")


def crowded(run: Run) -> None:
    """More than fits into 40 blocks: some are preempted, and none may notice."""
    prompts = {f"s{i}": prompt(20 + i, seed=i) for i in range(8)}
    for name, tokens in prompts.items():
        run.add(sequence(name, tokens, new=40))
    run.finish_all()
    assert run.engine.scheduler.preemptions > 0
    assert run.tokens == {name: alone(tokens, 40) for name, tokens in prompts.items()}
    assert_no_leak(run.engine)


def handed_over(run: Run, source: Runner) -> None:
    """A sequence of which another engine, on `source`, computed the prompt comes to `run` between its steps."""
    filled = Engine(source, token_budget=64, max_sequences=1, max_context=64)
    filled.add(sequence("known", prompt(10), new=1, transfer_id="known"))
    (send,) = filled.step(0.0).sends
    arriving = sequence("d", prompt(10), new=9, handoff=Handoff("store", 1, "known"))
    run.engine.add(arriving)
    while not run.receives:
        run.step()
    for position, block in send.blocks:
        run.engine.runner.block(arriving.block_table[position])[:] = source.block(block)
    run.step()
    run.engine.received(arriving, len(send.blocks), send.first_token)
    run.finish_all()
    assert run.tokens["d"] == alone(prompt(10), 9)
    assert_no_leak(run.engine)


def alone(prompt_tokens: list[int], new: int = 8) -> list[int]:
    run = Run(engine(token_budget=10_000))
    run.engine.add(sequence("x", prompt_tokens, new))
    return run.finish_all().tokens["x"]


def assert_no_leak(target: Engine) -> None:
    target.pool.check()
    assert target.pool.free_count == target.pool.total
    assert not target.sequences
