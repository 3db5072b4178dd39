"""One step of work after another: schedule, run, commit.

The engine is plain and synchronous: it owns the sequences, the block pool and the runner, is called by one thread, and
returns everything it wants done outside (tokens to deliver, blocks to send, handoffs to fetch) in a `Step`. It never
waits, never talks to a network and knows no roles: it takes prefill and decode jobs at any time.

Blocks that a transfer is reading or writing carry a reference of their own (`pool.retain`), so that a preempted or
aborted sequence can let go of them at once without anybody copying from, or into, memory that has a new owner.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cluster.errors import DeadlineExceeded
from cluster.messages import FinishReason, Handoff, JobFailed, Load, Role, TokenOutput
from kvstore.blocks import BlockPool
from kvstore.hashing import extend
from workers.runner import Chunk, Runner
from workers.sampling import finish
from workers.scheduler import Scheduler
from workers.sequence import Sequence, State


@dataclass(frozen=True, slots=True)
class Send:
    """Blocks of a prefill that are complete and go to the store; each carries a reference until `Engine.sent`."""

    transfer_id: str
    blocks: list[tuple[int, int]]  # (position in the transfer, block id)
    last: bool  # the prefill is done; `first_token` follows its last token
    first_token: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What came out of one step, in the words of whoever acts on it."""

    outputs: list[tuple[str, TokenOutput | JobFailed]] = field(default_factory=list)  # (router id, output)
    sends: list[Send] = field(default_factory=list)
    receives: list[Sequence] = field(default_factory=list)
    revoked: list[str] = field(default_factory=list)  # transfers whose prefill will not finish
    dropped: list[str] = field(default_factory=list)  # ids of sequences that ended while their handoff was arriving
    unclaimed: list[Handoff] = field(default_factory=list)  # handoffs of sequences that ended before they were fetched
    computed: int = 0  # tokens run through the model; 0: nothing to do until an event arrives


class Engine:
    def __init__(self, runner: Runner, *, token_budget: int, max_sequences: int, max_context: int) -> None:
        self.runner = runner
        self.pool = BlockPool(runner.num_blocks)
        self.block_size = runner.layout.tokens
        self.max_context = max_context
        # or one long sequence alone would preempt itself for ever
        assert runner.num_blocks * self.block_size >= max_context, "the KV cache cannot hold one longest sequence"
        self.scheduler = Scheduler(self.pool, self.block_size, token_budget, max_sequences)
        self.sequences: dict[str, Sequence] = {}  # id -> every live sequence
        self.steps = self.prompt_tokens = self.cached_tokens = self.output_tokens = 0
        self._arriving: dict[str, list[int]] = {}  # id -> blocks that a handoff is writing into
        self._step = Step()

    # ------------------------------------------------------------------------------------------------------ events
    def add(self, sequence: Sequence) -> None:
        extend(sequence.hashes, sequence.root, sequence.tokens, self.block_size)
        self.sequences[sequence.id] = sequence
        self.scheduler.waiting.append(sequence)

    def abort(self, ids: list[str]) -> None:
        for sequence in filter(None, map(self.sequences.get, ids)):
            self._drop(sequence)

    def received(self, sequence: Sequence, valid_blocks: int, first_token: int | None) -> None:
        """A handoff has ended with that many good blocks from the start of the table."""
        self.pool.free(self._arriving.pop(sequence.id))
        if sequence.id not in self.sequences:
            return  # it was aborted meanwhile
        arrived = min(valid_blocks * self.block_size, len(sequence.tokens))
        whole = arrived == len(sequence.tokens) and first_token is not None
        # without the prefill's token the last position is computed again, for its logits
        self.scheduler.received(sequence, arrived if whole else min(arrived, len(sequence.tokens) - 1))
        self._register(sequence)
        if whole and first_token is not None:
            self._append(sequence, first_token)

    def sent(self, block_ids: list[int]) -> None:
        """The transfer has let go of these blocks."""
        self.pool.free(block_ids)

    # -------------------------------------------------------------------------------------------------------- step
    def step(self, now: float) -> Step:
        self._expire(now)
        schedule = self.scheduler.schedule()
        for sequence in schedule.receive:
            self._arriving[sequence.id] = list(sequence.block_table)
            self.pool.retain(sequence.block_table)
            self._step.receives.append(sequence)
        if schedule.chunks:
            tokens = self.runner.run(schedule.chunks)
            for chunk, token in zip(schedule.chunks, tokens, strict=True):
                self._commit(chunk, token)
            self.steps += 1
        done, self._step = self._step, Step()
        return replace(done, computed=sum(chunk.take for chunk in schedule.chunks))

    def load(self, role: Role, handoff_bytes: int, handoff_seconds: float, handoff_failures: int) -> Load:
        s = self.scheduler
        return Load(
            role=role,
            running=len(s.running) + len(s.receiving),
            waiting=len(s.waiting),
            waiting_tokens=sum(q.gap for q in s.waiting) + sum(q.gap for q in s.running if q.gap > 1),
            blocks_free=self.pool.free_count,
            blocks_cached=self.pool.cached_count,
            blocks_total=self.pool.total,
            steps_total=self.steps,
            prompt_tokens_total=self.prompt_tokens,
            cached_tokens_total=self.cached_tokens,
            output_tokens_total=self.output_tokens,
            preemptions_total=s.preemptions,
            handoff_bytes_total=handoff_bytes,
            handoff_seconds_total=handoff_seconds,
            handoff_failures_total=handoff_failures,
        )

    # ------------------------------------------------------------------------------------------------------ commit
    def _commit(self, chunk: Chunk, token: int | None) -> None:
        sequence = chunk.sequence
        before = sequence.computed
        if before < sequence.prompt_length:
            self.prompt_tokens += min(chunk.take, sequence.prompt_length - before)
        sequence.computed += chunk.take
        self._register(sequence)
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
        self.output_tokens += 1
        reason = finish(sequence.generation.sampling, sequence.tokens, sequence.prompt_length, self.max_context)
        if first:
            self.cached_tokens += sequence.cached
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

    def _register(self, sequence: Sequence) -> None:
        """Blocks that became full can be hit from now on."""
        for index in range(sequence.registered, sequence.computed // self.block_size):
            self.pool.register(sequence.block_table[index], sequence.hashes[index])
        sequence.registered = sequence.computed // self.block_size

    def _send(self, sequence: Sequence, first_token: int | None) -> None:
        """Announce the blocks whose KV is complete since the last time; the partial one with the first token."""
        full = sequence.computed // self.block_size
        upto = full if first_token is None else len(sequence.block_table)
        blocks = [(position, sequence.block_table[position]) for position in range(sequence.sent, upto)]
        if blocks or first_token is not None:
            self.pool.retain([block for _, block in blocks])
            self._step.sends.append(Send(sequence.transfer_id, blocks, first_token is not None, first_token))
            sequence.sent = upto

    # --------------------------------------------------------------------------------------------------------- end
    def _expire(self, now: float) -> None:
        for sequence in [s for s in self.sequences.values() if s.deadline <= now]:
            error = DeadlineExceeded(f"not finished in time: {sequence.new_tokens} tokens were generated")
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
