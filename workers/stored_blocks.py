"""A shard's blocks in the form in which one kind of stores has them: byte for byte, or encoded.

Reading gives the bytes that go to a store. What comes from one lands where `Landing.write` says and is in the shard's
blocks once it was accepted; encoded bytes never lie in them. A shard has its part of every block, and `part` says where
in whole blocks that is. Where the KV cache is in a GPU's memory, bytes come and go through `device_blocks`. Who may use
which kind is not decided here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kvstore.copying import Block, in_thread
from kvstore.layout import Layout
from kvstore.part import Part
from workers.shard import Shard

if TYPE_CHECKING:  # torch takes seconds to import, and only a cache in it needs it
    from workers.device import DeviceCache


class ShardCache(Protocol):
    """What is needed of a `workers.runner` Runner or Stage."""

    layout: Layout  # of whole blocks
    shard: Shard
    device_cache: DeviceCache | None

    def block(self, index: int) -> Block: ...


class Landing(Protocol):
    """Where the blocks of one fetch arrive, by their place in the sequence's table."""

    def write(self, position: int) -> Block:
        """Memory [part.own.block_bytes] to fill, from any thread."""
        ...

    async def accept(self, stop: int) -> None:
        """Those before place `stop` are good: they belong in the worker's blocks. Nothing is written there any more
        once this has returned or been cancelled."""
        ...


class StoredBlocks(Protocol):
    layout: Layout  # of whole blocks in the stores
    part: Part  # this shard's of them

    def read(self, block: int) -> Block:
        """The bytes [part.own.block_bytes] of a block that nobody changes meanwhile, from any thread."""
        ...

    def reader(self, blocks: Sequence[int]) -> Callable[[int], Block]:
        """`read`, for these blocks, which will be asked for in this order and by one thread at a time."""
        ...

    def landing(self, table: Sequence[int], start: int, stop: int) -> Landing:
        """For the places start..stop of a block table."""
        ...


class Codec(Protocol):
    layout: Layout  # of a shard's own memory
    stored: Layout  # of the same, encoded

    def encode(self, block: Block) -> Block: ...

    def decode(self, stored: Block, block: Block) -> None: ...


def exact_blocks(cache: ShardCache) -> StoredBlocks:
    """Byte for byte, wherever the cache is."""
    if cache.device_cache is not None:
        from workers.device_blocks import DeviceBlocks

        return DeviceBlocks(cache.device_cache, cache.layout, cache.shard)
    return ExactBlocks(cache)


class ExactBlocks:
    """Every copy is a copy, straight from or to the cache."""

    def __init__(self, cache: ShardCache) -> None:
        self.layout = cache.layout
        self.part = Part(cache.layout, cache.shard.rectangle)
        self._cache = cache

    def read(self, block: int) -> Block:
        return self._cache.block(block)

    def reader(self, blocks: Sequence[int]) -> Callable[[int], Block]:
        del blocks
        return self.read

    def landing(self, table: Sequence[int], start: int, stop: int) -> Landing:
        del start, stop
        return _InPlace(self._cache, table)


class EncodedBlocks:
    """Encoded on the way out and decoded on the way in, each shard its own part: `codec` is for that. Scratch memory is
    never more than the blocks it stands for."""

    def __init__(self, cache: ShardCache, codec: Codec) -> None:
        if codec.layout != cache.shard.part(cache.layout):
            raise ValueError("the codec is for another part of a block than this shard's; give it shard.part(layout)")
        self.layout = dataclasses.replace(cache.layout, dtype=codec.stored.dtype, itemsize=codec.stored.itemsize)
        self.part = Part(self.layout, cache.shard.rectangle)
        self._exact = exact_blocks(cache)
        self._codec = codec

    def read(self, block: int) -> Block:
        return self._codec.encode(self._exact.read(block))

    def reader(self, blocks: Sequence[int]) -> Callable[[int], Block]:
        read = self._exact.reader(blocks)
        return lambda block: self._codec.encode(read(block))

    def landing(self, table: Sequence[int], start: int, stop: int) -> Landing:
        return _Scratch(self._exact.landing(table, start, stop), self._codec, start, stop)


class _InPlace:
    def __init__(self, cache: ShardCache, table: Sequence[int]) -> None:
        self._cache = cache
        self._table = table

    def write(self, position: int) -> Block:
        return self._cache.block(self._table[position])

    async def accept(self, stop: int) -> None:
        del stop


class _Scratch:
    def __init__(self, decoded: Landing, codec: Codec, start: int, stop: int) -> None:
        self._decoded = decoded
        self._codec = codec
        self._start = start
        self._arrived = np.empty((stop - start, codec.stored.block_bytes), np.uint8)

    def write(self, position: int) -> Block:
        block: Block = self._arrived[position - self._start]
        return block

    async def accept(self, stop: int) -> None:
        def decode() -> None:
            for position in range(self._start, stop):
                self._codec.decode(self.write(position), self._decoded.write(position))

        await in_thread(decode)
        await self._decoded.accept(stop)
