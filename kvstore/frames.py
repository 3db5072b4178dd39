"""Blocks as the messages that a reader gets: where each lies, or its bytes in pieces.

There is as much in one message as is worth its price, and no more, so that nobody waits long for the one before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cluster.store_messages import Fragment, Fragments, Slab
from kvstore.arena import Arena
from kvstore.layout import Layout
from kvstore.slabs import Entry

FRAME_BYTES = 2**20
MAPPED_BYTES = 16 * 2**20  # named in one message: what a reader then copies in one go
MAPPED_BLOCKS = 64


def frames(arena: Arena, layout: Layout, blocks: Iterable[tuple[int, int, Entry]], inline: bool) -> Iterator[Fragments]:
    """The messages for (position, tokens, slab) of blocks that are held until the last is sent. `inline`: with their
    bytes, which are views of the arena, and are cut between cells."""
    frame = max(1, FRAME_BYTES // layout.cell_bytes) * layout.cell_bytes
    parts: list[Fragment] = []
    size = 0
    for position, tokens, entry in blocks:
        for part in _inline(arena, frame, position, tokens, entry) if inline else _mapped(position, tokens, entry):
            parts.append(part)
            size += len(part.data) if inline else arena.slab_bytes
            if size >= (frame if inline else MAPPED_BYTES) or len(parts) == MAPPED_BLOCKS:
                yield Fragments(tuple(parts))
                parts, size = [], 0
    if parts:
        yield Fragments(tuple(parts))


def _mapped(position: int, tokens: int, entry: Entry) -> Iterator[Fragment]:
    yield Fragment(position, tokens, _slab(entry), b"", 0, b"", last=True)


def _inline(arena: Arena, frame: int, position: int, tokens: int, entry: Entry) -> Iterator[Fragment]:
    data = arena.slab(entry.index).data
    for offset in range(0, len(data), frame):
        last = offset + frame >= len(data)
        part = data[offset : offset + frame]
        yield Fragment(position, tokens, _slab(entry), entry.checksums if last else b"", offset, part, last)


def _slab(entry: Entry) -> Slab:
    return Slab(entry.index, entry.generation, sealed=True)
