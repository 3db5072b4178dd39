"""One rectangle of every block, and how it lies: within whole blocks, and without gaps in the cache of its shard.

    whole block   [ head 0: ..[ run )... ][ head 1: ..[ run )... ]      a store's slab, [head][layer] cells
    own memory    [ run )[ run )                                       the rectangle's cells in the same order

A whole block is one run, so the copies of a worker that is one shard are plain copies.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvstore.copying import Block, copy
from kvstore.layout import Layout, Rectangle, runs, whole


class Part:
    """`layout` is that of whole blocks, `own` that of the rectangle by itself. Blocks are numpy views of bytes."""

    def __init__(self, layout: Layout, rectangle: Rectangle | None = None) -> None:
        r = rectangle or whole(layout)
        self.layout = layout
        self.rectangle = r
        self.is_whole = r == whole(layout)
        self.own = Layout(
            r.head1 - r.head0, r.layer1 - r.layer0, layout.tokens, layout.dim, layout.dtype, layout.itemsize
        )
        self.runs: list[tuple[int, int, int]] = []  # offset in the block, offset in its own memory, bytes
        own_offset = 0
        for offset, length in runs(layout, r):
            self.runs.append((offset, own_offset, length))
            own_offset += length

    @property
    def wire(self) -> tuple[int, ...]:
        """As messages to a store name it; empty: the whole block."""
        r = self.rectangle
        return () if self.is_whole else (r.head0, r.head1, r.layer0, r.layer1)

    def read(self, own: Block, block: Block) -> None:
        """Copy the rectangle of a whole block [layout.block_bytes] into `own` [own.block_bytes]."""
        for offset, own_offset, length in self.runs:
            own[own_offset : own_offset + length] = block[offset : offset + length]

    def write(self, block: Block, own: Block) -> bytes:
        """Copy `own` into its place in a whole block; returns the checksums of its cells, in its own order."""
        return b"".join(
            copy(block[offset : offset + length], own[own_offset : own_offset + length], self.layout)
            for offset, own_offset, length in self.runs
        )

    def pieces(self, limit: int) -> Iterator[tuple[int, int, int]]:
        """Its runs, as `runs`, cut between cells into pieces of about `limit` bytes at most."""
        step = max(1, limit // self.layout.cell_bytes) * self.layout.cell_bytes
        for offset, own_offset, length in self.runs:
            for first in range(0, length, step):
                yield offset + first, own_offset + first, min(step, length - first)

    def pick(self, checksums: bytes) -> bytes:
        """Of a whole block's checksums those of the rectangle's cells, in its own order."""
        if self.is_whole:
            return checksums
        r = self.rectangle
        cells = np.frombuffer(checksums, "<u4").reshape(self.layout.heads, self.layout.layers)
        return cells[r.head0 : r.head1, r.layer0 : r.layer1].tobytes()
