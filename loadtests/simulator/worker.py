"""A worker in virtual time: one step of its scheduler after another, each as long as the performance model predicts.

While nobody prefills it leaps over decode steps (`batch.py`) up to the next one in which something happens; when
something arrives meanwhile, the leap ends with the step that is under way then. No token is an event.
"""

from __future__ import annotations

from cluster.messages import Rates, Role
from kvstore.blocks import BlockPool, Change
from loadtests.simulator.batch import Batch
from loadtests.simulator.events import Events
from loadtests.simulator.histogram import Histogram
from loadtests.simulator.job import Sequence, State
from loadtests.simulator.scheduler import Hands, Scheduler


class Worker:
    """`changed` is told of every worker that has something new to report."""

    def __init__(
        self,
        number: int,
        node: int,
        role: Role,
        rates: Rates,
        blocks: int,
        block_size: int,
        max_sequences: int,
        events: Events,
        gaps: Histogram,
        hands: Hands,
        changed: dict[Worker, None],
        leap: bool = True,
    ) -> None:
        self.number = number
        self.id = f"w{number:04d}"
        self.node = node
        self.role: Role = role
        self.rates = rates
        self.changes: list[Change] = []  # of what prefix hits can use, since they were reported
        self.pool = BlockPool(blocks, self.changes)
        self.batch = Batch(rates, block_size, gaps)
        self.scheduler = Scheduler(self.pool, self.batch, rates, block_size, max_sequences, hands)
        self.alive = True
        self.load = (0, 0, 0, blocks)  # as last reported: sequences, tokens to compute, of context, free blocks
        self.born_s = events.now
        self.prefill_ms = self.busy_ms = 0.0  # spent on prompts, on steps
        self.steps = 0
        self._events = events
        self._gaps = gaps
        self._hands = hands
        self._changed = changed
        self._leap = leap
        self._arrivals: list[tuple[Sequence, int, bool]] = []  # since the step under way began, as `arrived` was told
        self._chunks: list[tuple[Sequence, int]] = []  # of the step under way
        self._step_count = 0  # steps under way: 0 while idle or between two
        self._idle = True
        self._began_s = 0.0  # when the first of these steps did
        self._first_ms = 0.0  # how long it takes
        self._version = 0  # of the plan under way: an older one's end means nothing

    # ------------------------------------------------------------------------------------------------------- events
    def submit(self, sequence: Sequence) -> None:
        self.scheduler.waiting.append(sequence)
        self._changed[self] = None
        self._wake()

    def arrived(self, sequence: Sequence, tokens: int, whole: bool) -> None:
        """KV of that many tokens is here now. `whole`: the prefill's token came with it."""
        self._arrivals.append((sequence, tokens, whole))
        self._wake()

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, as an abort does."""
        self.settle()
        if self._step_count > 1:
            self._go(1)  # the others go on without it
        self.scheduler.remove(sequence)
        self._wake()

    def sequences(self) -> list[Sequence]:
        """All that it has, in a fixed order."""
        return [*self.scheduler.running, *self.scheduler.receiving, *self.scheduler.waiting]

    def die(self) -> list[Sequence]:
        """The process is gone with all that it had."""
        self.settle()
        self.alive = False
        self._version += 1
        return self.sequences()

    def settle(self) -> None:
        """Bring sequences that decode up to the steps that have ended by now."""
        if self._step_count > 1:
            done = self.batch.steps_within(1000 * (self._events.now - self._began_s)) - 1
            if done:
                self._advance(done)
                self._step_count -= done
                self._first_ms = self.batch.step_ms()
        for sequence in self.scheduler.running:
            if sequence.state is State.DECODING:
                self.batch.settle(sequence)

    def report(self) -> None:
        """Say how things are now; a leap's steps so far are not looked into."""
        scheduler = self.scheduler
        to_compute, context = 0, self.batch.context
        for sequence in scheduler.waiting:
            if not sequence.handoff:
                to_compute += sequence.tokens
        for sequence in scheduler.prefilling:
            to_compute += sequence.tokens - sequence.computed
            context += sequence.computed
        self.load = (self.sequence_count, to_compute, context, self.pool.free_count)

    @property
    def sequence_count(self) -> int:
        return len(self.scheduler.running) + len(self.scheduler.receiving) + len(self.scheduler.waiting)

    # --------------------------------------------------------------------------------------------------------- steps
    def _wake(self) -> None:
        """Something has changed: begin to work, or stop a leap at the end of its present step."""
        if self._idle:
            self._idle = False
            self._plan()
        elif self._step_count > 1:
            steps = self.batch.steps_within(1000 * (self._events.now - self._began_s))
            if steps < self._step_count:
                self._go(steps)

    def _plan(self) -> None:
        """Schedule the next step, or as many decode steps as nothing can happen in."""
        if not self.alive:
            return
        self._changed[self] = None
        for sequence, tokens, whole in self._arrivals:
            if sequence.state is State.RECEIVING:  # or it was aborted meanwhile
                self.scheduler.received(sequence, tokens, whole)
        self._arrivals.clear()
        self._chunks = self.scheduler.schedule()
        batch = self.batch
        if not self._chunks and not batch.count:
            self._idle = True
            return
        self._began_s = self._events.now
        if self._chunks:
            self._first_ms = self._chunks_ms() + batch.beside_ms()
            self._go(1)
        else:
            self._first_ms = batch.step_ms()
            self._go(batch.leap(self.pool.free_count) if self._leap else 1)

    def _chunks_ms(self) -> float:
        step, token, pair = self.rates.prefill
        tokens, pairs = 0, 0.0
        for sequence, take in self._chunks:
            tokens += take
            pairs += take * (sequence.computed + take / 2)
        return step + token * tokens + pair * pairs

    def _go(self, steps: int) -> None:
        """These steps are under way, from `_began_s`."""
        self._step_count = steps
        self._version += 1
        self._events.at(self._began_s + self._ms(steps) / 1000, self._end, self._version)

    def _ms(self, steps: int) -> float:
        return self._first_ms if steps == 1 else self.batch.leap_ms(steps)

    def _end(self, version: int) -> None:
        if version != self._version:
            return
        steps, chunks = self._step_count, self._chunks
        if chunks:
            self.prefill_ms += self._first_ms - self.batch.beside_ms()
        self._advance(steps)
        self._step_count, self._chunks = 0, []
        for sequence in self.batch.finished():
            self._finish(sequence)
        for sequence, take in chunks:
            if sequence.state is State.PREFILLING:  # or it was aborted meanwhile
                self._commit(sequence, take)
        self._plan()

    def _advance(self, steps: int) -> None:
        """The first steps of those under way have ended."""
        ms = self._ms(steps)
        self.busy_ms += ms
        self.steps += steps
        until_s = self._began_s + ms / 1000
        self.batch.advance(steps, self._began_s, self._first_ms, until_s)
        self._began_s = until_s
        if steps > 1:
            self.scheduler.grow(self.batch.step - 1)

    def _commit(self, sequence: Sequence, take: int) -> None:
        sequence.computed += take
        self.scheduler.register(sequence)
        if sequence.computed < sequence.tokens:
            self._hands.progressed(sequence)
            return
        del self.scheduler.prefilling[sequence]
        job, now = sequence.job, self._events.now
        if job.first_token_s >= 0:
            self._gaps.add(1000 * (now - job.last_token_s))
        job.last_token_s = now
        sequence.tokens += 1
        self._hands.token(sequence)
        if sequence.tokens >= sequence.last:
            self._finish(sequence)
        else:
            self.batch.join(sequence, fresh=False)

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.stop_running(sequence)
        self.scheduler.register(sequence)
        self._hands.done(sequence)
        self.scheduler.end(sequence)
