"""Which sequences compute how many tokens in the next step; no tensors, no clock.

There are no phases: a sequence has a gap of tokens whose KV is missing, and a step closes part of it. Decodes (gap 1)
come first so that a long prompt cannot stall them, then prefill chunks share what is left of the token budget
(chunked prefill, Sarathi-Serve, arXiv:2403.02310), then waiting sequences are admitted, first come first served.
When blocks run out the youngest running sequence is preempted: its blocks are freed, its tokens are kept, and it goes
to the head of the queue to recompute what the prefix cache does not still hold.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from kvstore.blocks import BlockPool
from workers.runner import Chunk
from workers.sequence import Sequence, State


@dataclass(frozen=True, slots=True)
class Schedule:
    chunks: list[Chunk]
    receive: list[Sequence]  # admitted with a handoff: their blocks must be fetched before they can run


@dataclass(slots=True)
class Scheduler:
    pool: BlockPool
    block_size: int
    token_budget: int
    max_sequences: int
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)  # oldest first
    receiving: dict[str, Sequence] = field(default_factory=dict)  # id -> sequence
    preemptions: int = 0

    def schedule(self) -> Schedule:
        chunks: dict[str, Chunk] = {}  # sequence id -> chunk, in the order of the batch
        budget = self.token_budget
        preempted = False
        for sequence in sorted(self.running, key=lambda s: s.gap > 1):
            if sequence.state is not State.RUNNING or budget == 0:
                continue
            take = min(sequence.gap, budget)
            while not self._extend(sequence, take):
                victim = self.running[-1]
                refund = chunks.pop(victim.id, None)
                budget += refund.take if refund else 0
                self._preempt(victim)
                preempted = True
                if victim is sequence:
                    break
            if sequence.state is State.RUNNING:
                chunks[sequence.id] = Chunk(sequence, take)
                budget -= take
        receive: list[Sequence] = []
        if not preempted:
            budget = self._admit(chunks, receive, budget)
        return Schedule(list(chunks.values()), receive)

    def _admit(self, chunks: dict[str, Chunk], receive: list[Sequence], budget: int) -> int:
        while self.waiting and budget and len(self.running) + len(self.receiving) < self.max_sequences:
            sequence = self.waiting[0]
            hits = self.pool.match(sequence.hashes[: (len(sequence.tokens) - 1) // self.block_size])
            computed = len(hits) * self.block_size
            arriving = sequence.handoff is not None
            # a handoff needs room for all of it at once; a prefill only for its first chunk
            take = len(sequence.tokens) - computed if arriving else min(len(sequence.tokens) - computed, budget)
            needed = self._blocks(computed + take)
            blocks = self.pool.allocate(needed - len(hits)) if self._room(needed - len(hits)) else None
            if blocks is None:
                self.pool.free(hits)
                break
            self.waiting.popleft()
            sequence.block_table = hits + blocks
            sequence.computed = computed
            sequence.registered = len(hits)
            if not sequence.preempted:
                sequence.cached = computed
            if arriving:
                sequence.state = State.RECEIVING
                self.receiving[sequence.id] = sequence
                receive.append(sequence)
                continue
            sequence.state = State.RUNNING
            self.running.append(sequence)
            chunks[sequence.id] = Chunk(sequence, take)
            budget -= take
        return budget

    def _room(self, blocks: int) -> bool:
        """Admit only while every running sequence could still grow by a block, or preemption would follow at once."""
        return blocks + len(self.running) <= self.pool.free_count or not (self.running or self.receiving)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _extend(self, sequence: Sequence, take: int) -> bool:
        missing = self._blocks(sequence.computed + take) - len(sequence.block_table)
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
        self.waiting.appendleft(sequence)

    def release(self, sequence: Sequence) -> None:
        """Give a sequence's blocks back; those with a hash stay hit-able until evicted."""
        self.pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.computed = sequence.registered = 0

    def received(self, sequence: Sequence, computed: int) -> None:
        """A handoff has ended: whatever arrived counts as computed, the rest is ordinary prefill."""
        del self.receiving[sequence.id]
        sequence.handoff = None
        sequence.computed = computed
        sequence.state = State.RUNNING
        self.running.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out for good, wherever it is."""
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is State.RECEIVING:
            del self.receiving[sequence.id]
        elif sequence.state is State.RUNNING:
            self.running.remove(sequence)
        self.release(sequence)
        sequence.state = State.FINISHED
