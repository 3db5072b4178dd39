"""Which of a worker's sequences run and what goes into its next step: the engine's rules over a real block pool.

Decodes first, then running prompts' chunks up to the step's tokens, then admission, first come first served, while
there is room for what arrives and a block for everybody who runs; the youngest is preempted when blocks run out. All as
`workers/scheduler.py` has it, which this mirrors (that one is tied to runners of tensors and clients of stores). It
knows no time: how long a step takes and when it ends is `worker.py`'s.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from cluster.messages import Rates
from kvstore.blocks import BlockPool
from loadtests.simulator.batch import Batch
from loadtests.simulator.job import Sequence, State


class Hands(Protocol):
    """What a worker tells the cluster around it, while it is between two steps."""

    def fetchable(self, sequence: Sequence, blocks: int) -> int:
        """How many leading blocks it should have after fetching from stores, if `blocks` are here; 0: fetch none."""

    def admitted(self, sequence: Sequence) -> None:
        """It waits for blocks: `sequence.computed` tokens are here, `Worker.arrived` is to be called for the others."""

    def progressed(self, sequence: Sequence) -> None:
        """More of its prompt was computed."""

    def token(self, sequence: Sequence) -> None:
        """It delivers its first token on this worker, having computed a prompt."""

    def done(self, sequence: Sequence) -> None:
        """It has delivered its last token, its blocks are about to be freed."""


class Scheduler:
    def __init__(
        self, pool: BlockPool, batch: Batch, rates: Rates, block_size: int, max_sequences: int, hands: Hands
    ) -> None:
        self.pool = pool
        self.batch = batch
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}  # prefilling and decoding, oldest first
        self.prefilling: dict[Sequence, None] = {}  # of those, oldest first
        self.receiving: dict[Sequence, None] = {}
        self.preemptions = 0
        self._rates = rates
        self._block_size = block_size
        self._max_sequences = max_sequences
        self._hands = hands
        self._admissions = 0

    def schedule(self) -> list[tuple[Sequence, int]]:
        """(sequence, tokens of its prompt) for the next step, which every decoding sequence is in as well."""
        calm = self.grow(self.batch.step)
        chunks: list[tuple[Sequence, int]] = []
        budget = self._rates.step_tokens - self.batch.count
        for sequence in list(self.prefilling):
            if sequence.state is not State.PREFILLING or budget <= 0:
                continue
            take = min(sequence.tokens - sequence.computed, budget)
            if self._extend(sequence, -(-(sequence.computed + take) // self._block_size)):
                chunks.append((sequence, take))
                budget -= take
        if calm and self.waiting:
            self._admit(chunks, budget)
        return chunks

    def grow(self, step: int) -> bool:
        """Blocks for the decodes of the step of that number. False: somebody was preempted for them."""
        preemptions = self.preemptions
        for sequence in self.batch.growing(step):
            while sequence.state is State.DECODING and sequence.grow_step <= step:
                if not self._extend(sequence, len(sequence.table) + 1):
                    break
                self.batch.grown(sequence)
        return self.preemptions == preemptions

    def received(self, sequence: Sequence, tokens: int, whole: bool) -> None:
        """KV of that many tokens has arrived; `whole`: so has the prefill's token."""
        del self.receiving[sequence]
        self.running[sequence] = None
        sequence.handoff = False
        sequence.computed = tokens
        self.register(sequence)
        if whole:
            sequence.tokens += 1
            self.batch.join(sequence, fresh=True)
        else:
            sequence.state = State.PREFILLING
            self.prefilling[sequence] = None

    def register(self, sequence: Sequence) -> None:
        """Blocks that became full can be hit from now on."""
        job = sequence.job
        full = min(sequence.computed // self._block_size, len(job.names))
        if full > sequence.registered:
            first = sequence.registered
            self.pool.register_all(sequence.table[first:full], job.names[first:full])
            sequence.registered = full

    def stop_running(self, sequence: Sequence) -> None:
        """It neither prefills nor decodes any more, and still has its blocks."""
        del self.running[sequence]
        if sequence.state is State.DECODING:
            self.batch.leave(sequence)
        else:
            self.prefilling.pop(sequence, None)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out for good, wherever it is."""
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is State.RECEIVING:
            del self.receiving[sequence]
        elif sequence.state is not State.ENDED:
            self.stop_running(sequence)
        self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        """It is in none of the lists any more: its blocks are free."""
        self._release(sequence)
        sequence.state = State.ENDED

    # --------------------------------------------------------------------------------------------------------- rules
    def _extend(self, sequence: Sequence, blocks: int) -> bool:
        """Room for that many blocks in all. False: the sequence itself was preempted."""
        missing = blocks - len(sequence.table)
        if missing <= 0:
            return True
        while (got := self.pool.allocate(missing)) is None:
            victim = next(reversed(self.running))
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.table += got
        return True

    def _admit(self, chunks: list[tuple[Sequence, int]], budget: int) -> None:
        pool, size = self.pool, self._block_size
        while self.waiting and budget > 0 and len(self.running) + len(self.receiving) < self._max_sequences:
            sequence = self.waiting[0]
            hits = pool.match(sequence.job.names[: (sequence.tokens - 1) // size])
            computed = len(hits) * size
            fetch = 0 if sequence.handoff else self._hands.fetchable(sequence, len(hits))
            upto = sequence.tokens if sequence.handoff else fetch * size or min(sequence.tokens, computed + budget)
            missing = -(-upto // size) - len(hits)
            crowded = bool(self.running or self.receiving)
            room = missing + len(self.running) <= pool.free_count or not crowded
            blocks = pool.allocate(missing) if room else None
            if blocks is None:
                pool.free(hits)
                return
            self.waiting.popleft()
            sequence.table = hits + blocks
            sequence.computed = computed
            sequence.registered = len(hits)
            sequence.order = self._admissions = self._admissions + 1
            if sequence.hit < 0:
                sequence.hit = fetch * size or computed
            if sequence.handoff or fetch:
                sequence.state = State.RECEIVING
                self.receiving[sequence] = None
                self._hands.admitted(sequence)
                continue
            sequence.state = State.PREFILLING
            self.running[sequence] = self.prefilling[sequence] = None
            chunks.append((sequence, upto - computed))
            budget -= upto - computed

    def _preempt(self, sequence: Sequence) -> None:
        """Its blocks are freed and its tokens kept; it is the next to be admitted."""
        self.stop_running(sequence)
        self._release(sequence)
        sequence.state = State.WAITING
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.free(sequence.table)
        sequence.table = []
        sequence.computed = sequence.registered = 0
