"""The one order in which a block's bytes lie: [kv_head][layer][K,V][token][dim].

The same in a worker's KV cache, in the arena, on the wire and on disk, so that every copy is a copy. Only this order
keeps both a tensor-parallel slice (heads) and a pipeline slice (layers) of a block in few long runs, which is what
lets prefill and decode be sharded differently: a shard writes its rectangle (heads x layers) and reads another.
`tiles` proves that rectangles cover a block exactly before bytes move; `runs` says which bytes a rectangle is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

ORDER_VERSION = 1
SCALE_BYTES = 4  # float32
SCALED = ("int8", "float8_e4m3fn")


@dataclass(frozen=True, slots=True)
class Layout:
    """Shape of one block. A cell is one (head, layer): K then V, `tokens` x `dim` each. In 8 bits the float32 scales
    of K's tokens and of V's follow them in the cell, so that any rectangle has its own."""

    heads: int
    layers: int
    tokens: int  # per block
    dim: int
    dtype: str  # as torch names it: float32, bfloat16, ...
    itemsize: int

    @property
    def scaled(self) -> bool:
        """Whether cells have scales: a value is its level times the scale of its token, head and K or V."""
        return self.dtype in SCALED

    @property
    def int8(self) -> Layout:
        """The same blocks with levels and scales for values."""
        return replace(self, dtype="int8", itemsize=1)

    @property
    def cell_bytes(self) -> int:
        return 2 * self.tokens * (self.dim * self.itemsize + (SCALE_BYTES if self.scaled else 0))

    @property
    def cells(self) -> int:
        return self.heads * self.layers

    @property
    def block_bytes(self) -> int:
        return self.cells * self.cell_bytes

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token over all heads and layers."""
        return self.block_bytes // self.tokens

    @property
    def fingerprint(self) -> bytes:
        """8 bytes that differ whenever two parties would disagree on where a byte belongs."""
        text = f"{ORDER_VERSION}/{self.heads}/{self.layers}/{self.tokens}/{self.dim}/{self.dtype}/{self.itemsize}"
        return hashlib.sha256(text.encode()).digest()[:8]


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Heads [head0, head1) x layers [layer0, layer1) of a block: what one shard owns."""

    head0: int
    head1: int
    layer0: int
    layer1: int


def whole(layout: Layout) -> Rectangle:
    return Rectangle(0, layout.heads, 0, layout.layers)


def runs(layout: Layout, rectangle: Rectangle) -> list[tuple[int, int]]:
    """(offset, length) in bytes of the rectangle's contiguous runs within a block, in order, merged if they touch."""
    r, size = rectangle, layout.cell_bytes
    length = (r.layer1 - r.layer0) * size
    if r.layer1 - r.layer0 == layout.layers:  # whole heads follow each other without a gap
        return [(r.head0 * layout.layers * size, (r.head1 - r.head0) * length)]
    return [((head * layout.layers + r.layer0) * size, length) for head in range(r.head0, r.head1)]


def tiles(layout: Layout, rectangles: Iterable[Rectangle], target: Rectangle) -> bool:
    """True when the rectangles, cut to `target`, cover each of its cells exactly once."""
    seen: set[tuple[int, int]] = set()
    for r in rectangles:
        for head in range(max(r.head0, target.head0), min(r.head1, target.head1)):
            for layer in range(max(r.layer0, target.layer0), min(r.layer1, target.layer1)):
                if (head, layer) in seen:
                    return False
                seen.add((head, layer))
    return len(seen) == (target.head1 - target.head0) * (target.layer1 - target.layer0)
