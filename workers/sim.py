"""A Runner without a model: deterministic tokens, modelled timings; for load tests, chaos tests and demos.

Each token's id is written into its KV rows; the next token is a hash of every id *read back from the blocks*, so a
block that was lost, mixed up or half copied changes the output exactly as it would with a real model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.layout import Layout
from workers.runner import Alone, Chunk
from workers.shard import Sizes, whole

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of a step: fixed + per computed token + per token of context read. Zero computes as fast as it can."""

    step_s: float = 0.0
    token_s: float = 0.0
    context_s: float = 0.0

    def step(self, tokens: int, context: int) -> float:
        return self.step_s + self.token_s * tokens + self.context_s * context


def sim_layout(block_size: int) -> Layout:
    """Small blocks with the structure of real ones: two heads, two layers, 64 bytes a token."""
    return Layout(heads=2, layers=2, tokens=block_size, dim=2, dtype="float32", itemsize=4)


def sim_sizes(layout: Layout, vocab_size: int) -> Sizes:
    return Sizes(layout.heads, layout.heads, layout.layers, layout.heads, vocab_size)


class SimRunner(Alone):
    def __init__(
        self,
        layout: Layout,
        num_blocks: int,
        vocab_size: int,
        timings: Timings | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if layout.dim * layout.itemsize % 4:
            raise ValueError("a KV row must hold whole 32-bit words")
        self.layout = layout
        self.shard = whole(sim_sizes(layout, vocab_size))
        self.num_blocks = num_blocks
        self.vocab_size = vocab_size
        self._timings = timings or Timings()
        self._sleep = sleep
        shape = (num_blocks, layout.cells * 2, layout.tokens, layout.dim * layout.itemsize // 4)
        self._cache = np.zeros(shape, dtype=np.int32)  # [blocks, planes, tokens, words], token id + 1; 0: never written

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        flat: npt.NDArray[np.uint8] = self._cache[index].reshape(-1).view(np.uint8)
        return flat

    def run(self, chunks: list[Chunk]) -> list[int | None]:
        new, context = sum(c.take for c in chunks), sum(c.first for c in chunks)
        if seconds := self._timings.step(new, context):
            self._sleep(seconds)
        return [self._chunk(chunk) for chunk in chunks]

    def _chunk(self, chunk: Chunk) -> int | None:
        sequence, size = chunk.sequence, self.layout.tokens
        end = chunk.first + chunk.take
        for position in range(chunk.first, end):
            block = sequence.block_table[position // size]
            self._cache[block, :, position % size, :] = sequence.tokens[position] + 1
        if not chunk.samples:
            return None
        table = sequence.block_table[: -(-end // size)]
        rows = self._cache[table].transpose(0, 2, 1, 3).reshape(len(table) * size, -1)[:end]  # [context, planes*words]
        return self._next(rows)

    def _next(self, rows: npt.NDArray[np.int32]) -> int:
        columns = np.arange(1, rows.shape[1] + 1, dtype=np.uint64)
        positions = np.arange(1, rows.shape[0] + 1, dtype=np.uint64) * _MULTIPLIER
        mixed = (rows.astype(np.uint64) * columns).sum(axis=1, dtype=np.uint64) + np.uint64(1)
        total = int(((mixed ^ positions) * _MULTIPLIER).sum(dtype=np.uint64))
        return (total ^ (total >> 29)) % self.vocab_size
