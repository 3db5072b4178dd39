"""A Runner without a model: deterministic tokens, modelled timings; for load tests, chaos tests and demos.

Each token's id is written into its KV rows; the next token is a hash of every id *read back from the blocks*, so a
block that was lost, mixed up or half copied changes the output exactly as it would with a real model.

The hash mixes, per position, a sum over all planes (head, layer, K or V). A shard sums the planes that it has; tensor
ranks add theirs up, stages pass the sums on, and the last one has what a single shard would have computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.layout import Layout
from workers.links import Links
from workers.runner import Alone, Chunk
from workers.shard import Shard, Sizes, whole

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
    """`shard`: which part of `layout` it has, None for all of it; `links`: to the others, None where there are
    none. `timings` are those of the whole model: a stage takes its layers' share of them."""

    def __init__(
        self,
        layout: Layout,
        num_blocks: int,
        vocab_size: int,
        timings: Timings | None = None,
        sleep: Callable[[float], None] = time.sleep,
        shard: Shard | None = None,
        links: Links | None = None,
    ) -> None:
        if layout.dim * layout.itemsize % 4:
            raise ValueError("a KV row must hold whole 32-bit words")
        self.layout = layout
        self.shard = shard or whole(sim_sizes(layout, vocab_size))
        self.num_blocks = num_blocks
        self.vocab_size = vocab_size
        self._links = links
        self._timings = timings or Timings()
        self._share = (self.shard.layers[1] - self.shard.layers[0]) / layout.layers
        self._sleep = sleep
        words = layout.dim * layout.itemsize // 4
        shape = (num_blocks, self.shard.part(layout).cells * 2, layout.tokens, words)
        self._cache = np.zeros(shape, dtype=np.int32)  # [blocks, planes, tokens, words], token id + 1; 0: never written
        self._columns = _columns(layout, self.shard)  # [planes * words] what each word counts

    def block(self, index: int) -> npt.NDArray[np.uint8]:
        flat: npt.NDArray[np.uint8] = self._cache[index].reshape(-1).view(np.uint8)
        return flat

    def run(self, chunks: list[Chunk]) -> list[int | None]:
        sampled = [chunk for chunk in chunks if chunk.samples]
        if self._links is None:
            return self._tokens(chunks, self._compute(chunks, sampled))
        sums = self._linked(self._links, chunks, sampled)
        return [None] * len(chunks) if sums is None else self._tokens(chunks, sums)

    def _linked(self, links: Links, chunks: list[Chunk], sampled: list[Chunk]) -> npt.NDArray[np.uint64] | None:
        """All shards' sums, at the last stage."""
        import torch  # seconds, and a single simulated shard has no use for it

        # one more, so that every shard has a part in every step, also when nothing is sampled
        rows = 1 + sum(chunk.first + chunk.take for chunk in sampled)
        before = None if self.shard.first_stage else links.receive((rows,), torch.int64)
        sums = np.concatenate([np.zeros(1, np.uint64), self._compute(chunks, sampled)])
        total = torch.from_numpy(sums.view(np.int64))  # the same bits: the sums of both wrap alike
        links.sum_inplace(total)
        if before is not None:
            total += before
        if not self.shard.last_stage:
            links.send(total)
            return None
        return total.numpy().view(np.uint64)[1:]

    def _compute(self, chunks: list[Chunk], sampled: list[Chunk]) -> npt.NDArray[np.uint64]:
        """This shard's part of a step: the sums of all that is sampled, one after the other."""
        seconds = self._timings.step(sum(c.take for c in chunks), sum(c.first for c in chunks))
        if seconds := seconds * self._share:
            self._sleep(seconds)
        for chunk in chunks:
            self._write(chunk)
        return np.concatenate([np.zeros(0, np.uint64), *map(self._sums, sampled)])

    def _write(self, chunk: Chunk) -> None:
        sequence, size = chunk.sequence, self.layout.tokens
        for position in range(chunk.first, chunk.first + chunk.take):
            block = sequence.block_table[position // size]
            self._cache[block, :, position % size, :] = sequence.tokens[position] + 1

    def _sums(self, chunk: Chunk) -> npt.NDArray[np.uint64]:
        """Over this shard's planes [context], of what is in the blocks."""
        end = chunk.first + chunk.take
        table = chunk.sequence.block_table[: -(-end // self.layout.tokens)]
        rows = self._cache[table].transpose(0, 2, 1, 3).reshape(len(table) * self.layout.tokens, -1)[:end]
        sums: npt.NDArray[np.uint64] = (rows.astype(np.uint64) * self._columns).sum(axis=1, dtype=np.uint64)
        return sums

    def _tokens(self, chunks: list[Chunk], sums: npt.NDArray[np.uint64]) -> list[int | None]:
        tokens: list[int | None] = []
        for chunk in chunks:
            context = chunk.first + chunk.take if chunk.samples else 0
            tokens.append(self._next(sums[:context]) if context else None)
            sums = sums[context:]
        return tokens

    def _next(self, sums: npt.NDArray[np.uint64]) -> int:
        positions = np.arange(1, len(sums) + 1, dtype=np.uint64) * _MULTIPLIER
        total = int((((sums + np.uint64(1)) ^ positions) * _MULTIPLIER).sum(dtype=np.uint64))
        return (total ^ (total >> 29)) % self.vocab_size


def _columns(layout: Layout, shard: Shard) -> npt.NDArray[np.uint64]:
    """Every word of a token's KV counts its own multiple, the same in whichever shard it is. Where ranks have the same
    heads, their parts add up to one times the sum, yet none is zero: each one's bytes matter."""
    planes = 2 * layout.dim * layout.itemsize // 4
    numbers = np.arange(1, layout.cells * planes + 1, dtype=np.uint64).reshape(layout.heads, layout.layers, planes)
    own = numbers[slice(*shard.kv_heads), slice(*shard.layers)].reshape(-1)
    others = (shard.replicas - 1) * int(_MULTIPLIER)
    weight = 1 + others if shard.replica == 0 else -int(_MULTIPLIER)
    return own * np.uint64(weight % 2**64)
