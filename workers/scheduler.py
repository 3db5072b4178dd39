"""Which sequences compute how many tokens in the next step; no tensors, no clock.

There are no phases: a sequence has a gap of tokens whose KV is missing, and a step closes part of it. Decodes (gap 1)
come first so that a long prompt cannot stall them, then prefill chunks share what is left of the token budget
(chunked prefill, Sarathi-Serve, arXiv:2403.02310), then waiting sequences are admitted, first come first served.
What is not on the device may be fetched from a store first, when the sequence's `Choice` says so.
When blocks run out the youngest running sequence is preempted: its blocks are freed, its tokens are kept, and it goes
to the head of the queue, where the stores are asked what they have of it by now; the rest is recomputed.

With `depth` > 1, that many steps are in flight in a pipeline at once. A sequence whose next token is in flight is left
out; a prompt's next chunk may follow one in flight. Decodes are divided among the steps. What is in flight keeps its
blocks: it is not preempted, and a sequence that ends meanwhile has them until its last step was collected. With
`foresight`, steps in flight follow each other on one device: none is left out of whom it says so, nothing is divided.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile

from kvstore.blocks import BlockPool
from workers.fetching import NOTHING, Choice
from workers.runner import Chunk
from workers.sequence import Sequence, State


@dataclass(frozen=True, slots=True)
class Schedule:
    chunks: list[Chunk]
    receive: list[Sequence] = field(default_factory=list)  # admitted with a handoff whose blocks must arrive first
    # the other ones that were admitted; those that are to fetch something run when it has arrived
    admitted: list[tuple[Sequence, Choice]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)  # not admitted again before `located` is called for them


@dataclass(slots=True)
class Scheduler:
    pool: BlockPool
    block_size: int
    token_budget: int
    max_sequences: int
    depth: int  # steps that may be in flight
    choose: Callable[[Sequence, int], Choice]  # (sequence, blocks of it on the device) -> what to fetch
    foresight: Callable[[Sequence], bool] | None = None  # as `workers.foresight`
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)  # oldest first
    receiving: dict[str, Sequence] = field(default_factory=dict)  # id -> sequence
    preemptions: int = 0

    def schedule(self, steps_in_flight: int = 0) -> Schedule:
        """The next step; its chunks count as in flight until `collected` is called for them."""
        chunks: dict[str, Chunk] = {}  # sequence id -> chunk, in the order of the batch
        schedule = Schedule([])
        budget = self.token_budget
        short = False  # somebody waits for blocks of steps in flight
        for sequence in [*self._decodes(steps_in_flight), *(s for s in self.running if s.gap > 1)]:
            if sequence.state is not State.RUNNING or budget == 0:
                continue
            take = min(sequence.gap, budget)
            while not self._extend(sequence, take):
                victim = self._victim(sequence)
                if victim is None:
                    short = True
                    break
                refund = chunks.pop(victim.id, None)
                budget += refund.take if refund else 0
                self._preempt(victim)
                schedule.preempted.append(victim)
                if victim is sequence:
                    break
            else:
                first = sequence.computed + sequence.in_flight
                chunks[sequence.id] = Chunk(sequence, first, take, sequence.pending)
                budget -= take
        if not (schedule.preempted or short):
            self._admit(chunks, schedule, budget)
        schedule.chunks.extend(chunks.values())
        for chunk in schedule.chunks:
            if chunk.samples and self.foresight is not None and self.foresight(chunk.sequence):
                chunk.sequence.pending += 1
            chunk.sequence.in_flight += chunk.take
        return schedule

    def _decodes(self, steps_in_flight: int) -> list[Sequence]:
        """Those of the next step, oldest first: a share of all that there are, so that `depth` groups of about equal
        size circulate. Nobody is passed over for long, because who is older does not come back for `depth` steps."""
        ready = [s for s in self.running if s.gap == 1]
        if self.foresight is not None:
            return ready
        in_flight = sum(s.gap == 0 for s in self.running)  # those whose prompt is about to end count already
        share = -(-(len(ready) + in_flight) // self.depth)
        rest = -(-len(ready) // (self.depth - steps_in_flight))  # of four in three groups: 2, 1 and 1, not 2 and 2
        return ready[: min(share, rest)]

    def _victim(self, needy: Sequence) -> Sequence | None:
        """Who gives its blocks back: the youngest, but nobody who is in flight or older. None: wait until those who are
        in flight can be asked."""
        younger = list(takewhile(lambda s: s is not needy, reversed(self.running)))
        idle = next((s for s in younger if not s.in_flight), None)
        return idle or (None if younger or needy.in_flight else needy)

    def _admit(self, chunks: dict[str, Chunk], schedule: Schedule, budget: int) -> None:
        while budget and len(self.running) + len(self.receiving) < self.max_sequences:
            sequence = next((s for s in self.waiting if not s.locating), None)
            if sequence is None:
                break
            hits = self.pool.match(sequence.hashes[: (len(sequence.tokens) - 1) // self.block_size])
            choice = NOTHING if sequence.handoff is not None else self.choose(sequence, len(hits))
            computed = len(hits) * self.block_size
            upto = self._upto(sequence, choice, computed, budget)
            missing = self._blocks(upto) - len(hits)
            blocks = self.pool.allocate(missing) if self._room(missing) else None
            if blocks is None:
                self.pool.free(hits)
                break
            self.waiting.remove(sequence)
            sequence.block_table = hits + blocks
            sequence.computed = computed
            sequence.registered = len(hits)
            if not sequence.preempted:
                sequence.cached = computed
            if sequence.handoff is not None or choice.sources:
                sequence.state = State.RECEIVING
                self.receiving[sequence.id] = sequence
                if sequence.handoff is not None:
                    schedule.receive.append(sequence)
                else:
                    schedule.admitted.append((sequence, choice))
                continue
            schedule.admitted.append((sequence, choice))
            sequence.state = State.RUNNING
            self.running.append(sequence)
            chunks[sequence.id] = Chunk(sequence, computed, upto - computed)
            budget -= upto - computed

    def _upto(self, sequence: Sequence, choice: Choice, computed: int, budget: int) -> int:
        """Tokens that need room at once: what arrives needs all of its own, a prefill only its first chunk's."""
        if sequence.handoff is not None:
            return len(sequence.tokens)
        if choice.sources:
            return choice.sources[-1].stop * self.block_size
        return min(len(sequence.tokens), computed + budget)

    def _room(self, blocks: int) -> bool:
        """Admit only while every running sequence could still grow by a block, or preemption would follow at once."""
        return blocks + len(self.running) <= self.pool.free_count or not (self.running or self.receiving)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _extend(self, sequence: Sequence, take: int) -> bool:
        missing = self._blocks(sequence.computed + sequence.in_flight + take) - len(sequence.block_table)
        if missing <= 0:
            return True
        blocks = self.pool.allocate(missing)
        if blocks is None:
            return False
        sequence.block_table += blocks
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.release(sequence)
        sequence.preempted += 1
        self.preemptions += 1
        sequence.state = State.WAITING
        sequence.locating = True
        self.waiting.appendleft(sequence)

    def release(self, sequence: Sequence) -> None:
        """Give a sequence's blocks back; those with a hash stay hit-able until evicted."""
        self.pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.computed = sequence.registered = sequence.offered = 0

    def received(self, sequence: Sequence, computed: int) -> None:
        """A handoff or a fetch has ended: whatever arrived counts as computed, the rest is ordinary prefill."""
        del self.receiving[sequence.id]
        sequence.handoff = None
        sequence.computed = computed
        sequence.state = State.RUNNING
        self.running.append(sequence)

    def collected(self, chunk: Chunk) -> bool:
        """A step has ended. False: its sequence had ended before, and nobody wants the result."""
        sequence = chunk.sequence
        sequence.in_flight -= chunk.take
        if sequence.state is State.RUNNING:
            sequence.computed += chunk.take
            if chunk.samples and sequence.pending:
                sequence.pending -= 1
            return True
        if not sequence.in_flight:
            self.release(sequence)
        return False

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out for good, wherever it is. Blocks that a step in flight still writes stay with it."""
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is State.RECEIVING:
            del self.receiving[sequence.id]
        elif sequence.state is State.RUNNING:
            self.running.remove(sequence)
        if not sequence.in_flight:
            self.release(sequence)
        sequence.state = State.FINISHED
