"""One step of work after another: schedule, submit, collect, commit.

The engine is plain and synchronous: it owns the sequences, the block pool and the runner, is called by one thread, and
returns everything it wants done outside (tokens to deliver, blocks to send, handoffs to fetch) in a `Step`. It never
waits for an event, never talks to a network and knows no roles: it takes prefill and decode jobs at any time.

A runner that is a pipeline, or ahead, has several steps in flight: one is submitted, and the oldest collected when no
more fit or nothing can be scheduled. What is in flight is not delivered, hit, sent or offered before it was collected.

Blocks that a transfer is reading or writing carry a reference of their own (`pool.retain`), so that a preempted or
aborted sequence can let go of them at once without anybody copying from, or into, memory that has a new owner.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import asdict, replace

from cluster.errors import DeadlineExceeded, Moved, TandemError
from cluster.messages import FinishReason, JobFailed, Load, Rates, Role, TokenOutput
from cluster.perfmodel import PerfModel
from kvstore.blocks import BlockPool, Change
from kvstore.fetcher import Source
from kvstore.hashing import extend
from kvstore.layout import Layout
from workers.counters import EngineCounters
from workers.draw import finish
from workers.fetching import Choice, choose
from workers.foresight import foresight
from workers.in_flight import InFlight
from workers.offering import Offering
from workers.runner import Chunk, Runner
from workers.scheduler import Scheduler
from workers.sequence import Sequence, State
from workers.step import BlockFetch, Offload, Send, Step


class Engine:
    """`stored` is how blocks of approximate sequences are laid out in their stores, where there are such."""

    def __init__(
        self,
        runner: Runner,
        *,
        token_budget: int,
        max_sequences: int,
        max_context: int,
        stored: Layout | None = None,
        prior: Rates | None = None,  # of the performance model; None: of a machine that nothing is known about
    ) -> None:
        self.runner = runner
        self._layouts = {True: runner.layout, False: stored or runner.layout}  # sequence is exact -> its stores'
        self._changes: list[Change] = []  # what became of names that can be hit, since the last step
        self.pool = BlockPool(runner.num_blocks, self._changes)
        self.block_size, self.max_context = runner.layout.tokens, max_context
        # or one long sequence alone would preempt itself for ever
        assert runner.num_blocks * self.block_size >= max_context, "the KV cache cannot hold one longest sequence"
        self.model = PerfModel(token_budget, prior)
        limits, ahead = (token_budget, max_sequences, runner.depth), foresight(runner.ahead, max_context)
        self.scheduler = Scheduler(self.pool, self.block_size, *limits, self._choose, ahead)
        self._in_flight = InFlight(runner)
        self.sequences: dict[str, Sequence] = {}  # id -> every live sequence
        self.counters = EngineCounters()
        self._arriving: dict[str, list[int]] = {}  # id -> blocks that a handoff or a fetch is writing into
        self._offering = Offering(self.pool, self.block_size)
        self._moving: tuple[frozenset[int], float] | None = None  # blocks being written; when it ends at the latest
        self._step = Step()

    # ------------------------------------------------------------------------------------------------------ events
    def add(self, sequence: Sequence) -> None:
        extend(sequence.hashes, sequence.root, sequence.tokens, self.block_size)
        self._offering.see(sequence)
        self.sequences[sequence.id] = sequence
        self.scheduler.waiting.append(sequence)

    def abort(self, ids: list[str]) -> None:
        for sequence in filter(None, map(self.sequences.get, ids)):
            self._drop(sequence)

    def located(self, sequence: Sequence, sources: list[Source]) -> None:
        """The stores have been asked; the sequence may be admitted."""
        sequence.sources, sequence.locating = sources, False

    def fetched(self, sequence: Sequence, valid_blocks: int, parts: Several[tuple[Source, int, float]]) -> None:
        """A fetch has ended with that many good blocks from the start of the table; `parts` as in `Fetched`."""
        for source, blocks, seconds in parts:
            size = blocks * self._layouts[sequence.exact].block_bytes
            self.model.observe_fetch(size, source.path, 1000 * seconds)
        if self._arrived(sequence, valid_blocks):
            # never the whole sequence: the last token is always left to compute, for its logits
            self.scheduler.received(sequence, valid_blocks * self.block_size)
            self._register(sequence, stored=True)
            if not sequence.preempted:
                sequence.cached = sequence.computed

    def received(self, sequence: Sequence, valid_blocks: int, first_token: int | None) -> None:
        """A handoff has ended with that many good blocks from the start of the table."""
        if not self._arrived(sequence, valid_blocks):
            return
        arrived = min(valid_blocks * self.block_size, len(sequence.tokens))
        whole = arrived == len(sequence.tokens) and first_token is not None
        # without the prefill's token the last position is computed again, for its logits
        self.scheduler.received(sequence, arrived if whole else min(arrived, len(sequence.tokens) - 1))
        self._register(sequence, stored=True)
        if whole and first_token is not None:
            self._append(sequence, first_token)

    def _arrived(self, sequence: Sequence, valid_blocks: int) -> bool:
        """Nobody writes into the sequence's blocks any more. False: it was aborted meanwhile."""
        blocks = self._arriving.pop(sequence.id)
        assert valid_blocks <= len(blocks), f"{valid_blocks} blocks arrived in a table of {len(blocks)}"
        self.pool.free(blocks)
        return sequence.id in self.sequences

    def sent(self, block_ids: list[int]) -> None:
        """The transfer has let go of these blocks."""
        self.pool.free(block_ids)

    def offloaded(self, offloads: Several[Offload]) -> None:
        """These were written to the store, or could not be; a second attempt is not made."""
        self._offering.written(offloads)

    def store_is_new(self) -> None:
        """The store that this worker writes to has nothing of what was written before."""
        self.pool.reset_offers()

    def migrate(self, until: float) -> None:
        """Somebody else goes on with what is decoding: all that it has goes to the store, and when that is written, or
        at `until`, every such sequence ends as Moved. Until then they go on."""
        for sequence in self._decoding():
            self._step.offloads.extend(self._offering.all_of(sequence))
        self._moving = frozenset(self._offering.under_way), until

    # -------------------------------------------------------------------------------------------------------- step
    def step(self, now: float, names: bool = False) -> Step:
        """`names`: with the name of everything that can be hit when it has ended."""
        self._expire(now)
        self._move(now)
        schedule = self.scheduler.schedule(len(self._in_flight))
        self._step.lookups.extend(schedule.preempted)
        self._step.receives.extend(self._arrive(sequence) for sequence in schedule.receive)
        for sequence, choice in schedule.admitted:
            self._fetch(sequence, choice)
        if schedule.chunks:
            self._in_flight.submit(schedule.chunks)
        due = self._in_flight.full or not schedule.chunks
        ended = self._collect() if due and self._in_flight else []
        self._step.offloads.extend(self._offering.oldest())
        self._step.cache.extend(self._changes)
        self._changes.clear()
        done, self._step = self._step, Step()
        computed = sum(chunk.take for chunk in schedule.chunks or ended)
        return replace(done, computed=computed, names=self.pool.names() if names else None)

    def _collect(self) -> list[Chunk]:
        ended = self._in_flight.collect()
        self.model.observe_step([(chunk.take, chunk.first) for chunk in ended.chunks], 1000 * ended.seconds)
        for chunk, token in zip(ended.chunks, ended.tokens, strict=True):
            if self.scheduler.collected(chunk):
                self._commit(chunk, token)
        self.counters.steps_total += 1
        self.counters.model_seconds_total += ended.seconds
        return ended.chunks

    def _choose(self, sequence: Sequence, hits: int) -> Choice:
        return choose(sequence.sources, hits, len(sequence.tokens), self.model, self._layouts[sequence.exact])

    def _arrive(self, sequence: Sequence) -> Sequence:
        """Somebody will write into its blocks, whatever becomes of it."""
        self._arriving[sequence.id] = list(sequence.block_table)
        self.pool.retain(sequence.block_table)
        return sequence

    def _fetch(self, sequence: Sequence, choice: Choice) -> None:
        """A sequence was admitted: order what it is to fetch."""
        sequence.sources = []
        self.counters.device_tokens_total += 0 if sequence.preempted else sequence.computed
        for source in choice.passed_over:
            self.counters.passed_over((source.stop - source.start) * self.block_size)
            self.model.passed_over(source.path)
        self.counters.fetches_total += bool(choice.sources)
        if choice.sources:
            self._arrive(sequence)
            order = BlockFetch(sequence, choice.sources, list(sequence.block_table), choice.timeout_s)
            self._step.fetches.append(order)

    def load(self, role: Role) -> Load:
        """Its gauges and counters; those of transfers are for whoever transfers to fill in."""
        s = self.scheduler
        return Load(
            role=role,
            running=len(s.running) + len(s.receiving),
            waiting=len(s.waiting),
            waiting_tokens=sum(q.gap for q in s.waiting) + sum(q.gap for q in s.running if q.gap > 1),
            blocks_free=self.pool.free_count,
            blocks_cached=self.pool.cached_count,
            blocks_total=self.pool.total,
            preemptions_total=s.preemptions,
            handoff_bytes_total=0,
            handoff_seconds_total=0.0,
            handoff_failures_total=0,
            **asdict(self.counters),
            context_tokens=sum(q.computed for q in s.running),
        )

    # ------------------------------------------------------------------------------------------------------ commit
    def _commit(self, chunk: Chunk, token: int | None) -> None:
        sequence = chunk.sequence
        self.counters.prompt_tokens_total += max(0, min(chunk.take, sequence.prompt_length - chunk.first))
        self._register(sequence)
        self._step.offloads.extend(self._offering.computed(sequence))
        if token is not None:
            self._append(sequence, token)
        elif sequence.transfer_id:
            self._send(sequence, None)

    def _append(self, sequence: Sequence, token: int) -> None:
        """A new token: deliver it, and end the sequence when it was the last."""
        first = sequence.emitted == 0
        start = sequence.new_tokens
        sequence.tokens.append(token)
        sequence.emitted += 1
        self.counters.output_tokens_total += 1
        reason = finish(sequence.generation.sampling, sequence.tokens, sequence.prompt_length, self.max_context)
        if first:
            self.counters.cached_tokens_total += sequence.cached
        self._deliver(sequence, start, token, reason)
        if sequence.transfer_id:
            self._send(sequence, token)
        if reason or sequence.transfer_id:
            self._end(sequence)
        else:
            extend(sequence.hashes, sequence.root, sequence.tokens, self.block_size)

    def _deliver(self, sequence: Sequence, start: int, token: int, reason: FinishReason | None) -> None:
        output = TokenOutput(sequence.id, start, (token,), reason, sequence.cached)
        self._step.outputs.append((sequence.router_id, output))

    def _register(self, sequence: Sequence, stored: bool = False) -> None:
        """Blocks that became full can be hit from now on. `stored`: they came from a store."""
        first, full = sequence.registered, sequence.computed // self.block_size
        for index, key in enumerate(sequence.keys(first, full, self.block_size), start=first):
            self.pool.register(sequence.block_table[index], key, sequence.generation.tenant, sequence.exact)
        sequence.registered = full
        if stored:
            self.pool.offer(sequence.block_table[first:full])

    def _send(self, sequence: Sequence, first_token: int | None) -> None:
        """Announce the blocks whose KV is complete since the last time; the partial one with the first token."""
        full = sequence.computed // self.block_size
        upto = full if first_token is None else len(sequence.block_table)
        blocks = [(position, sequence.block_table[position]) for position in range(sequence.sent, upto)]
        if blocks or first_token is not None:
            if sequence.exact:
                self.pool.offer(block for _, block in blocks)
            self.pool.retain([block for _, block in blocks])
            self._step.sends.append(Send(sequence.transfer_id, blocks, first_token is not None, first_token))
            sequence.sent = upto

    # --------------------------------------------------------------------------------------------------------- end
    def _expire(self, now: float) -> None:
        for sequence in [s for s in self.sequences.values() if s.deadline <= now]:
            self._fail(sequence, DeadlineExceeded(f"not finished in time: {sequence.new_tokens} tokens were generated"))

    def _move(self, now: float) -> None:
        """Go on with giving sequences up."""
        if self._moving is None:
            return
        blocks, until = self._moving
        if now < until and not blocks.isdisjoint(self._offering.under_way):
            return
        self._moving = None
        for sequence in self._decoding():
            self._step.offloads.extend(self._offering.all_of(sequence))
            self._fail(sequence, Moved("this worker gave the request up; go on with it on another one"))

    def _decoding(self) -> list[Sequence]:
        """Those that are past their prompt, or are about to be, and no prefill for somebody else."""
        live = self.sequences.values()
        return [s for s in live if not s.transfer_id and (s.new_tokens or s.state is State.RUNNING)]

    def _fail(self, sequence: Sequence, error: TandemError) -> None:
        self._step.outputs.append((sequence.router_id, JobFailed(sequence.id, error.code, error.message)))
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        """End a sequence before its time, its transfer with it."""
        if sequence.transfer_id:
            self._step.revoked.append(sequence.transfer_id)
        if sequence.state is State.RECEIVING:
            self._step.dropped.append(sequence.id)
        elif sequence.handoff is not None:
            self._step.unclaimed.append(sequence.handoff)
        self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        """Forget a sequence: its blocks are free, but for those that a transfer still holds."""
        self.scheduler.remove(sequence)
        del self.sequences[sequence.id]
