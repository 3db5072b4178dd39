"""One engine step as a GPU gets it: everything that its kernels ask of a step, in one buffer of 32-bit words.

    rows   0 .. D-1 │ D ........................ T-1      D chunks of one token (decode), one row and one sequence
           decode   │ chunk 1 │ chunk 2 │ ...             each; then the longer chunks (prefill)

`Plan` is what the chunks mean, `Shape` how much there is of each field; `fill` writes the plan into the words of a
shape of at least its size. A CUDA graph is captured for a shape, and what the step does not need of it is padding
(length 0, slot -1, sequence -1), which kernels skip. Up to there it is numpy; `DeviceBatch` is the same words as
tensors. Every decode row has its logits taken, whether or not its chunk samples, so that a graph need not know. Letters
as in kernels/reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.paged_attention import PagedStep, decode_items, prefill_tiles
from kernels.sampling import key
from workers.attention import Geometry, KernelAttention
from workers.cache import KvCache
from workers.draw import Draw
from workers.runner import Chunk
from workers.sequence import Sequence

ALIGNMENT = 4  # words: 16 bytes, which Triton compiles for; a field that is not aligned would be compiled anew
WORD = 4  # bytes

Words = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Shape:
    """How much of everything a step has."""

    rows: int  # T
    sequences: int  # B
    width: int  # columns of the block tables
    decodes: int
    items: int  # of work, for decode attention
    tiles: int  # of queries, for prefill attention
    samples: int  # rows whose logits are wanted
    fresh: int  # blocks that are begun and not filled

    def holds(self, other: Shape) -> bool:
        """Only a step of decodes can be padded: a row of padding has to be a sequence of its own."""
        enough = self.rows >= other.rows and self.width >= other.width and self.items >= other.items
        return enough and self.tiles == other.tiles == 0


@dataclass(frozen=True, slots=True)
class Field:
    start: int  # word
    shape: tuple[int, ...]
    real: bool  # float64, which has two words: sampling compares with what was asked for, not with what is near it

    @property
    def words(self) -> slice:
        return slice(self.start, self.start + math.prod(self.shape) * (2 if self.real else 1))


def fields(shape: Shape) -> tuple[dict[str, Field], int]:
    """Where each field lies, and how many words all take."""
    s = shape
    wanted: list[tuple[str, tuple[int, ...], bool]] = [
        ("token_ids", (s.rows,), False),
        ("sources", (s.rows,), False),
        ("positions", (s.rows,), False),
        ("slots", (s.rows,), False),
        ("lengths", (s.sequences,), False),
        ("query_starts", (s.sequences + 1,), False),
        ("decode_items", (s.items, 2), False),
        ("decode_item_starts", (s.decodes + 1,), False),
        ("prefill_tiles", (s.tiles, 2), False),
        ("sample_rows", (s.samples,), False),
        ("fresh_blocks", (s.fresh,), False),
        ("temperature", (s.samples,), True),
        ("top_p", (s.samples,), True),
        ("min_p", (s.samples,), True),
        ("top_k", (s.samples,), False),
        ("words", (s.samples, 2), False),
        ("block_tables", (s.sequences, s.width), False),
    ]
    found, start = {}, 0
    for name, size, real in wanted:
        found[name] = Field(start, size, real)
        start = -(-found[name].words.stop // ALIGNMENT) * ALIGNMENT
    return found, start


class BlockTables:
    """The block tables of the sequences in the last step as arrays. A table only grows at its end until it is replaced,
    so a step converts what is new of it: all of it would take as long as the step itself."""

    def __init__(self) -> None:
        self._known: dict[Sequence, tuple[list[int], Words]] = {}  # sequence -> (the list it was made of, [its length])

    def of(self, sequences: Several[Sequence]) -> list[Words]:
        """Forgets those that are not among them."""
        self._known = {sequence: self._table(sequence) for sequence in sequences}
        return [table for _, table in self._known.values()]

    def _table(self, sequence: Sequence) -> tuple[list[int], Words]:
        listed, table = self._known.get(sequence, ([], np.empty(0, np.int32)))
        if listed is not sequence.block_table:
            return sequence.block_table, np.asarray(sequence.block_table, np.int32)
        if len(table) < len(listed):
            table = np.concatenate((table, np.asarray(listed[len(table) :], np.int32)))
        return listed, table


@dataclass(frozen=True, slots=True)
class Plan:
    """What the chunks of a step mean, on the host."""

    chunks: tuple[Chunk, ...]  # in the order of their rows
    tables: tuple[Words, ...]  # of their sequences
    shape: Shape  # exactly what it needs
    draws: tuple[Draw | None, ...]  # of each row whose logits are taken; None: nobody wants its token
    answers: tuple[int, ...]  # index of the chunk, as it was given, that each of these belongs to
    lengths: Words  # [B] keys of each sequence once the step's are written
    query_starts: Words  # [B + 1]
    items: Words  # [I, 2]
    item_starts: Words  # [decodes + 1]
    tiles: Words  # [P, 2]
    fresh: list[int]  # blocks that this step begins and does not fill
    sources: Words  # [decodes] row of the samples of the step before that its token is; -1: it is known
    sampled: dict[Sequence, int]  # -> row of its samples


def plan(
    given: Several[Chunk], tables: BlockTables, block_size: int, group: int, before: Mapping[Sequence, int]
) -> Plan:
    """At least one chunk. `group`: query heads that share keys. `before`: where, among the samples of the step before,
    the tokens of chunks that are ahead are."""
    order = sorted(range(len(given)), key=lambda index: given[index].take > 1)  # stable: decodes, then prefills
    chunks = [given[index] for index in order]
    decodes = sum(chunk.take == 1 for chunk in chunks)
    lengths = np.array([chunk.first + chunk.take for chunk in chunks], np.int32)
    takes = np.array([chunk.take for chunk in chunks], np.int32)
    query_starts = np.concatenate(([0], np.cumsum(takes))).astype(np.int32)
    items, item_starts = decode_items(lengths[:decodes])
    tiles = prefill_tiles(lengths, query_starts, decodes, group)
    taken = [place for place, chunk in enumerate(chunks) if place < decodes or chunk.samples]
    width = -(-int(lengths.max()) // block_size)
    fresh = [block for chunk in chunks for block in _fresh(chunk, block_size)]
    counts = (decodes, len(items), len(tiles), len(taken), len(fresh))
    shape = Shape(int(query_starts[-1]), len(chunks), width, *counts)
    return Plan(
        chunks=tuple(chunks),
        tables=tuple(tables.of([chunk.sequence for chunk in chunks])),
        shape=shape,
        draws=tuple(_draw(chunks[place]) for place in taken),
        answers=tuple(order[place] for place in taken),
        lengths=lengths,
        query_starts=query_starts,
        items=items,
        item_starts=item_starts,
        tiles=tiles,
        sources=np.array([before[c.sequence] if c.ahead else -1 for c in chunks[:decodes]], np.int32),
        sampled={chunks[place].sequence: row for row, place in enumerate(taken)},
        fresh=fresh,
    )


def _draw(chunk: Chunk) -> Draw | None:
    s = chunk.sequence
    return Draw(s.generation.sampling, s.tokens, s.prompt_length) if chunk.samples else None


def _fresh(chunk: Chunk, block_size: int) -> list[int]:
    """Kernels do not look behind a sequence's keys; but a block that is handed over is copied whole, to a CPU that
    multiplies what is there by zero, so it must not be what somebody else, or nobody, left there."""
    last = chunk.first + chunk.take
    begins = (last - 1) // block_size * block_size
    return [chunk.sequence.block_table[begins // block_size]] if begins >= chunk.first and last % block_size else []


def fill(buffer: Words, shape: Shape, step: Plan | None, block_size: int) -> None:
    """Write a step into the words of a shape that holds it. None: padding alone."""
    views = _arrays(buffer, shape)
    _pad(views, shape)
    if step is None:
        return
    count = len(step.chunks)
    for index, table in enumerate(step.tables):
        used = table[: shape.width]
        views["block_tables"][index, : len(used)] = used
    token_ids: list[int] = []
    for chunk in step.chunks:
        token_ids += [0] if chunk.ahead else chunk.sequence.tokens[chunk.first : chunk.first + chunk.take]
    views["token_ids"][: len(token_ids)] = token_ids
    takes = np.diff(step.query_starts)
    sequences = np.repeat(np.arange(count), takes)
    positions = np.arange(len(token_ids)) + (step.lengths - step.query_starts[1:])[sequences]
    blocks = views["block_tables"][sequences, positions // block_size]
    views["positions"][: len(token_ids)] = positions
    views["slots"][: len(token_ids)] = blocks * block_size + positions % block_size
    views["sources"][: len(step.sources)] = step.sources
    views["lengths"][:count] = step.lengths
    views["query_starts"][: count + 1] = step.query_starts
    views["decode_items"][: len(step.items)] = step.items
    views["decode_item_starts"][: len(step.item_starts)] = step.item_starts
    views["decode_item_starts"][len(step.item_starts) :] = step.item_starts[-1]
    views["prefill_tiles"][:] = step.tiles
    views["fresh_blocks"][: len(step.fresh)] = step.fresh
    _fill_samples(views, step)


def _fill_samples(views: dict[str, npt.NDArray[Any]], step: Plan) -> None:
    last_rows = step.query_starts[1:] - 1
    decodes = step.shape.decodes
    prefills = [last_rows[place] for place in range(decodes, len(step.chunks)) if step.chunks[place].samples]
    views["sample_rows"][: len(step.draws)] = [*last_rows[:decodes], *prefills]
    drawn = [(row, draw) for row, draw in enumerate(step.draws) if draw is not None and not draw.greedy]
    if not drawn:
        return
    rows, sampling = [row for row, _ in drawn], [draw.sampling for _, draw in drawn]
    counts = views["positions"][views["sample_rows"][rows]] + 1
    for name in ("temperature", "top_k", "top_p", "min_p"):
        views[name][rows] = [getattr(s, name) for s in sampling]
    words = [key(s.seed, int(tokens)) for s, tokens in zip(sampling, counts, strict=True)]
    views["words"][rows] = np.array(words, np.uint32).view(np.int32)


def _pad(views: dict[str, npt.NDArray[Any]], shape: Shape) -> None:
    """A step of nothing: rows that write nowhere, sequences without keys, greedy samples."""
    for view in views.values():
        view.fill(0)
    views["slots"].fill(-1)
    views["sources"].fill(-1)
    views["decode_items"][:, 0] = -1
    views["top_p"].fill(1.0)
    if shape.tiles == 0:  # every row is a sequence
        views["query_starts"][:] = np.arange(shape.sequences + 1)
        views["sample_rows"][:] = np.arange(shape.samples)


def _arrays(buffer: Words, shape: Shape) -> dict[str, npt.NDArray[Any]]:
    views: dict[str, npt.NDArray[Any]] = {}
    for name, field in fields(shape)[0].items():
        words = buffer[field.words]
        views[name] = (words.view(np.float64) if field.real else words).reshape(field.shape)
    return views


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """Views of a step's words on the device; all int32 but for the three that are float64."""

    token_ids: Tensor  # [T]
    sources: Tensor  # [T] row of the samples of the step before that a row's token is; -1: its token id is here
    positions: Tensor  # [T]
    slots: Tensor  # [T]
    step: PagedStep
    sample_rows: Tensor  # [R]
    fresh_blocks: Tensor  # [N]; those of the step come first
    temperature: Tensor  # [R], 0: greedy
    top_k: Tensor  # [R], 0: all
    top_p: Tensor  # [R]
    min_p: Tensor  # [R]
    words: Tensor  # [R, 2] `kernels.sampling.key`

    @classmethod
    def over(cls, buffer: Tensor, shape: Shape) -> DeviceBatch:  # [words] int32
        views: dict[str, Tensor] = {}
        for name, field in fields(shape)[0].items():
            words = buffer[field.words]
            views[name] = (words.view(torch.float64) if field.real else words).view(field.shape)
        of_step = ("block_tables", "lengths", "query_starts", "decode_items", "decode_item_starts", "prefill_tiles")
        step = PagedStep(decodes=shape.decodes, **{name: views.pop(name) for name in of_step})
        return cls(step=step, **views)

    def attention(self, geometry: Geometry, rope_table: Tensor, cache: KvCache) -> KernelAttention:
        return KernelAttention(geometry, rope_table, cache, self.positions, self.slots, self.step)
