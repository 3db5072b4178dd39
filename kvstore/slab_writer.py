"""One shard's blocks on their way into slabs that are reserved: its part of each, to the store's memory or through it.

On the store's machine the bytes are copied into its memory; from elsewhere they go as `Put` messages, which the store
copies itself after it has looked whether the slab is still this transfer's. Reserving and sealing are `writer`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

from cluster.store_messages import Fragment, Put, Slab
from kvstore.arena import Arena
from kvstore.client import StoreClient
from kvstore.copying import Block, checksums, in_thread
from kvstore.frames import FRAME_BYTES
from kvstore.part import Part


class BlockSource(Protocol):
    """Where the bytes of whole blocks come from: one process, or several with a part of each."""

    async def write(
        self, client: StoreClient, transfer_id: str, blocks: Sequence[int], slabs: Sequence[Slab]
    ) -> Sequence[bytes]:
        """Copy the blocks with these ids into these slabs, which `client` has reserved for the transfer; returns the
        checksums of each block's cells. Nothing is read or written any more once it has ended, however it ended."""
        ...


class SlabWriter:
    """The BlockSource of one shard: `read_block(block_id)` gives its part of a block [part.own.block_bytes], from any
    thread; nobody changes it meanwhile. The checksums are those of its part."""

    def __init__(self, part: Part, read_block: Callable[[int], Block]) -> None:
        self._part = part
        self._read_block = read_block

    async def write(
        self, client: StoreClient, transfer_id: str, blocks: Sequence[int], slabs: Sequence[Slab]
    ) -> list[bytes]:
        """Raises what the store answers."""
        if client.arena is not None:
            return await in_thread(partial(self._copy, client.arena, blocks, slabs))
        step = max(1, FRAME_BYTES // self._part.own.block_bytes)
        sums: list[bytes] = []
        for first in range(0, len(blocks), step):
            read = await in_thread(partial(self._read, blocks[first : first + step]))
            for put in self._messages(transfer_id, [own for own, _ in read], slabs[first : first + step]):
                await client.call("Put", put)
            sums += [own_sums for _, own_sums in read]
        return sums

    def _copy(self, arena: Arena, blocks: Sequence[int], slabs: Sequence[Slab]) -> list[bytes]:
        copies = zip(blocks, slabs, strict=True)
        return [self._part.write(arena.slab(slab.index), self._read_block(block)) for block, slab in copies]

    def _read(self, blocks: Sequence[int]) -> list[tuple[Block, bytes]]:
        read = [self._read_block(block) for block in blocks]
        return [(own, checksums(own, self._part.own)) for own in read]

    def _messages(self, transfer_id: str, blocks: Sequence[Block], slabs: Sequence[Slab]) -> Iterator[Put]:
        parts: list[Fragment] = []
        size = 0
        for own, slab in zip(blocks, slabs, strict=True):
            for offset, own_offset, length in self._part.pieces(FRAME_BYTES):
                data = own[own_offset : own_offset + length].data
                parts.append(Fragment(0, self._part.layout.tokens, slab, b"", offset, data, last=False))
                size += length
                if size >= FRAME_BYTES:
                    yield Put(transfer_id, tuple(parts))
                    parts, size = [], 0
        if parts:
            yield Put(transfer_id, tuple(parts))
