"""A worker's blocks in the form in which one kind of stores has them: byte for byte, or encoded.

Reading gives the bytes that go to a store. What comes from one lands where `Landing.write` says and is in the worker's
blocks once it was accepted; encoded bytes never lie in them. Who may use which kind is not decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kvstore.copying import Block, in_thread
from kvstore.layout import Layout
from workers.runner import Runner


class Landing(Protocol):
    """Where the blocks of one fetch arrive, by their place in the sequence's table."""

    def write(self, position: int) -> Block:
        """Memory [layout.block_bytes of the store] to fill, from any thread."""
        ...

    async def accept(self, stop: int) -> None:
        """Those before place `stop` are good: they belong in the worker's blocks. Nothing is written there any more
        once this has returned or been cancelled."""
        ...


class StoredBlocks(Protocol):
    layout: Layout  # of the stores

    def read(self, block: int) -> Block:
        """The bytes [layout.block_bytes] of a block that nobody changes meanwhile, from any thread."""
        ...

    def landing(self, table: Sequence[int], start: int, stop: int) -> Landing:
        """For the places start..stop of a block table."""
        ...


class Codec(Protocol):
    stored: Layout

    def encode(self, block: Block) -> Block: ...

    def decode(self, stored: Block, block: Block) -> None: ...


class ExactBlocks:
    """Every copy is a copy."""

    def __init__(self, runner: Runner) -> None:
        self.layout = runner.layout
        self._runner = runner

    def read(self, block: int) -> Block:
        return self._runner.block(block)

    def landing(self, table: Sequence[int], start: int, stop: int) -> Landing:
        del start, stop
        return _InPlace(self._runner, table)


class EncodedBlocks:
    """Encoded on the way out and decoded on the way in. Scratch memory is never more than the blocks it stands for."""

    def __init__(self, runner: Runner, codec: Codec) -> None:
        self.layout = codec.stored
        self._runner = runner
        self._codec = codec

    def read(self, block: int) -> Block:
        return self._codec.encode(self._runner.block(block))

    def landing(self, table: Sequence[int], start: int, stop: int) -> Landing:
        return _Scratch(self._runner, self._codec, table, start, stop)


class _InPlace:
    def __init__(self, runner: Runner, table: Sequence[int]) -> None:
        self._runner = runner
        self._table = table

    def write(self, position: int) -> Block:
        return self._runner.block(self._table[position])

    async def accept(self, stop: int) -> None:
        del stop


class _Scratch:
    def __init__(self, runner: Runner, codec: Codec, table: Sequence[int], start: int, stop: int) -> None:
        self._runner = runner
        self._codec = codec
        self._table = table
        self._start = start
        self._arrived = np.empty((stop - start, codec.stored.block_bytes), np.uint8)

    def write(self, position: int) -> Block:
        block: Block = self._arrived[position - self._start]
        return block

    async def accept(self, stop: int) -> None:
        def decode() -> None:
            for position in range(self._start, stop):
                self._codec.decode(self.write(position), self._runner.block(self._table[position]))

        await in_thread(decode)
