"""Blocks as the messages that a reader gets: where each lies, or its bytes in pieces.

There is as much in one message as is worth its price, and no more, so that nobody waits long for the one before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cluster.store_messages import Fragment, Fragments, Slab
from kvstore.arena import Arena
from kvstore.part import Part
from kvstore.slabs import Entry

FRAME_BYTES = 2**20
MAPPED_BYTES = 16 * 2**20  # named in one message: what a reader then copies in one go
MAPPED_BLOCKS = 64


def frames(arena: Arena, part: Part, blocks: Iterable[tuple[int, int, Entry]], inline: bool) -> Iterator[Fragments]:
    """The messages for (position, tokens, slab) of blocks that are held until the last is sent. `inline`: with the
    bytes of that part of them, which are views of the arena, and are cut between cells."""
    frame = max(1, FRAME_BYTES // part.layout.cell_bytes) * part.layout.cell_bytes
    parts: list[Fragment] = []
    size = 0
    for position, tokens, entry in blocks:
        for fragment in _inline(arena, part, position, tokens, entry) if inline else _mapped(position, tokens, entry):
            parts.append(fragment)
            size += len(fragment.data) if inline else arena.slab_bytes
            if size >= (frame if inline else MAPPED_BYTES) or len(parts) == MAPPED_BLOCKS:
                yield Fragments(tuple(parts))
                parts, size = [], 0
    if parts:
        yield Fragments(tuple(parts))


def _mapped(position: int, tokens: int, entry: Entry) -> Iterator[Fragment]:
    yield Fragment(position, tokens, _slab(entry), b"", 0, b"", last=True)


def _inline(arena: Arena, part: Part, position: int, tokens: int, entry: Entry) -> Iterator[Fragment]:
    block = arena.slab(entry.index).data
    for offset, own_offset, length in part.pieces(FRAME_BYTES):
        last = own_offset + length == part.own.block_bytes
        sums = part.pick(entry.checksums) if last else b""
        yield Fragment(position, tokens, _slab(entry), sums, own_offset, block[offset : offset + length], last)


def _slab(entry: Entry) -> Slab:
    return Slab(entry.index, entry.generation, sealed=True)
