"""What rank 0 tells the other shards about a step, and how they follow: only what changed travels.

    rank 0     chunks ──► PlanEncoder.plan ──► StepPlan        knows what the shards know: per sequence a slot and how
                                                               many of its tokens and blocks they were told
    a shard    StepPlan ──► Mirror.chunks ──► the same chunks  of Sequences of its own, which stages read as rank 0's

A decoding sequence costs 5 numbers, its new token and, now and then, a block. A sequence has a slot from its first
chunk until it has ended or was preempted: its block table only grows meanwhile. Slots are used again, so there are as
many as sequences ran at once. Neither side decides anything, and a mirrored sequence has no more than stages read:
tokens, block table, sampling and the prompt's length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cluster.errors import ProtocolError
from cluster.shard_messages import Admitted, StepPlan
from workers.runner import Chunk
from workers.sequence import Sequence, State

_INT = np.dtype("<i4")
_FIELDS = 5  # of a chunk in a plan: slot, first position, positions to compute, new tokens, new blocks


@dataclass(slots=True)
class _Told:
    """What the shards know of a sequence."""

    slot: int
    tokens: int
    preempted: int  # how often it had been when it got its slot
    blocks: int = 0


class PlanEncoder:
    """Rank 0's side. It sees every step, in order, and knows a sequence from the first step that computes it."""

    def __init__(self) -> None:
        self._told: dict[Sequence, _Told] = {}  # sequence -> what the shards know of it
        self._free: list[int] = []  # slots that nobody has any more
        self._number = 0

    @property
    def slots(self) -> int:
        """How many are in use."""
        return len(self._told)

    def plan(self, chunks: list[Chunk]) -> StepPlan:
        ended = self._end()
        admitted: list[Admitted] = []
        rows: list[int] = []
        tokens: list[int] = []
        blocks: list[int] = []
        for chunk in chunks:
            sequence = chunk.sequence
            told = self._told.get(sequence) or self._admit(sequence, admitted)
            new_tokens, new_blocks = sequence.tokens[told.tokens :], sequence.block_table[told.blocks :]
            rows += (told.slot, chunk.first, chunk.take, len(new_tokens), len(new_blocks))
            tokens += new_tokens
            blocks += new_blocks
            told.tokens += len(new_tokens)
            told.blocks += len(new_blocks)
        self._number += 1
        return StepPlan(self._number, pack(ended), tuple(admitted), pack(rows), pack(tokens), pack(blocks))

    def _end(self) -> list[int]:
        """The slots of those that have ended or lost their blocks, which are free from now on."""
        gone = [s for s, told in self._told.items() if s.state is State.FINISHED or s.preempted != told.preempted]
        slots = [self._told.pop(sequence).slot for sequence in gone]
        self._free += slots
        return slots

    def _admit(self, sequence: Sequence, admitted: list[Admitted]) -> _Told:
        slot = self._free.pop() if self._free else len(self._told)  # without free ones, all below are in use
        generation = sequence.generation
        told = _Told(slot, len(generation.prompt) + len(generation.output), sequence.preempted)
        self._told[sequence] = told
        admitted.append(Admitted(slot, generation))
        return told


class Mirror:
    """A shard's side: rank 0's sequences, as far as stages need them."""

    def __init__(self) -> None:
        self._sequences: dict[int, Sequence] = {}  # slot -> sequence
        self._number = 0

    @property
    def slots(self) -> int:
        """How many are in use."""
        return len(self._sequences)

    def chunks(self, plan: StepPlan) -> list[Chunk]:
        """The step's chunks, as rank 0 has them. Raises ProtocolError for a plan that does not follow the last one."""
        if plan.number != self._number + 1:
            raise ProtocolError(f"step {plan.number} follows step {self._number}: a step plan was lost")
        self._number = plan.number
        for slot in unpack(plan.ended):
            del self._sequences[slot]
        for new in plan.admitted:
            self._sequences[new.slot] = Sequence(new.generation, router_id="", root=b"", deadline=math.inf)
        rows, tokens, blocks = unpack(plan.chunks), unpack(plan.tokens), unpack(plan.blocks)
        token = block = 0
        found = []
        for row in range(0, len(rows), _FIELDS):
            slot, first, take, new_tokens, new_blocks = rows[row : row + _FIELDS]
            sequence = self._sequences[slot]
            if new_tokens:
                sequence.tokens += tokens[token : token + new_tokens]
                token += new_tokens
            if new_blocks:
                sequence.block_table += blocks[block : block + new_blocks]
                block += new_blocks
            found.append(Chunk(sequence, first, take))
        return found


def pack_tokens(tokens: list[int | None]) -> bytes:
    """A step's result: per chunk the next token, -1 for those that do not sample."""
    return pack(-1 if token is None else token for token in tokens)


def unpack_tokens(data: bytes) -> list[int | None]:
    return [None if token < 0 else token for token in unpack(data)]


def pack(values: Iterable[int]) -> bytes:
    return np.fromiter(values, _INT).tobytes()


def unpack(data: bytes) -> list[int]:
    values: list[int] = np.frombuffer(data, _INT).tolist()
    return values
