"""Who computes what: one worker's model cut into tp x pp shards. Pure; every shard derives all shards from the sizes.

    rank = stage * tp + tensor rank           rank 0 leads: it schedules, serves and talks to stores

Pipeline stages are runs of layers. Within a stage, tensor ranks share every layer: runs of heads, of the MLP's columns
and of the vocabulary (Megatron-LM, arXiv:1909.08053). Nothing has to divide evenly; the first ones get one more. KV
heads are split while there are enough; with fewer KV heads than ranks each rank has exactly one, which it shares with
the ranks beside it, and splits its query heads with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from cluster.errors import ModelError
from kvstore.layout import Layout, Rectangle

Span = tuple[int, int]  # [first, last)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of a model can be divided."""

    heads: int  # query heads
    kv_heads: int
    layers: int
    intermediate: int  # columns of the MLP
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part. Spans are of the whole model's."""

    rank: int
    tp: int
    pp: int
    heads: Span
    kv_heads: Span
    layers: Span
    intermediate: Span
    vocabulary: Span
    replica: int  # which of the `replicas` ranks of its stage that hold the same KV heads
    replicas: int

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tp

    @property
    def stage(self) -> int:
        return self.rank // self.tp

    @property
    def first_stage(self) -> bool:
        return self.stage == 0

    @property
    def last_stage(self) -> bool:
        return self.stage == self.pp - 1

    @property
    def rectangle(self) -> Rectangle:
        """The part of every block that is in this rank's KV cache."""
        return Rectangle(*self.kv_heads, *self.layers)

    @property
    def group(self) -> int:
        """How many of its query heads share each of its KV heads: fewer than the model's where ranks share those."""
        return (self.heads[1] - self.heads[0]) // (self.kv_heads[1] - self.kv_heads[0])

    def writes(self, block: int) -> bool:
        """Whether it, of its replicas, is the one that copies this block to stores: they take turns by block id."""
        return block % self.replicas == self.replica

    def part(self, layout: Layout) -> Layout:
        """How its part of a block lies in its own memory, `layout` being the whole block's."""
        heads, layers = self.kv_heads[1] - self.kv_heads[0], self.layers[1] - self.layers[0]
        return Layout(heads, layers, layout.tokens, layout.dim, layout.dtype, layout.itemsize)


def shards(sizes: Sizes, tp: int, pp: int) -> tuple[Shard, ...]:
    """All ranks, in order. Raises ModelError, naming what is allowed, when the model cannot be cut that finely."""
    check(sizes, tp, pp)
    layers, columns, vocabulary = split(sizes.layers, pp), split(sizes.intermediate, tp), split(sizes.vocabulary, tp)
    heads = _heads(sizes, tp)
    found = []
    for rank in range(tp * pp):
        query, kv, replica, replicas = heads[rank % tp]
        part = (query, kv, layers[rank // tp], columns[rank % tp], vocabulary[rank % tp])
        found.append(Shard(rank, tp, pp, *part, replica, replicas))
    return tuple(found)


def check(sizes: Sizes, tp: int, pp: int) -> None:
    """Raises ModelError, naming what is allowed, when the model cannot be cut that finely."""
    limit = min(sizes.heads, sizes.intermediate, sizes.vocabulary)
    if not 1 <= tp <= limit:
        raise ModelError(f"tensor parallelism {tp} does not fit the model's {sizes.heads} heads; use 1 to {limit}")
    if not 1 <= pp <= sizes.layers:
        raise ModelError(f"{pp} pipeline stages do not fit the model's {sizes.layers} layers; use 1 to {sizes.layers}")


def whole(sizes: Sizes) -> Shard:
    """The only shard of a worker that has one."""
    return shards(sizes, 1, 1)[0]


def split(count: int, parts: int) -> tuple[Span, ...]:
    """Consecutive spans over `count` whose lengths differ by one at most, the longer ones first."""
    lengths = [count // parts + (part < count % parts) for part in range(parts)]
    return tuple(pairwise(accumulate(lengths, initial=0)))


def _heads(sizes: Sizes, tp: int) -> list[tuple[Span, Span, int, int]]:
    """Per tensor rank: query heads, KV heads, which of how many ranks with these KV heads."""
    group = sizes.heads // sizes.kv_heads
    if tp <= sizes.kv_heads:
        return [((group * a, group * b), (a, b), 0, 1) for a, b in split(sizes.kv_heads, tp)]
    found = []
    for head, (first, last) in enumerate(split(tp, sizes.kv_heads)):
        for replica, (a, b) in enumerate(split(group, last - first)):
            query = (head * group + a, head * group + b)
            found.append((query, (head, head + 1), replica, last - first))
    return found
